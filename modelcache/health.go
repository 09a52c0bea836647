// Crashes: when a model is started again, and when it is quarantined.

package modelcache

import (
	"fmt"
	"time"

	"flightsvc/internal/fault"
	"flightsvc/modelcache/repository"
)

// Bounds on starting runners that crash.
const (
	crashesToQuarantine = 2               // in a row, without an answered record batch in between
	quarantineTime      = 5 * time.Minute // also how long "latest" skips a version that could not be loaded
	crashMemory         = time.Minute     // how long a crash counts towards the delay of the next start
	strikeMemory        = time.Hour       // how long crashes of a model that is not in memory are remembered
	// delay of a start after the second crash within crashMemory; doubles with each further one
	firstBackOff   = 200 * time.Millisecond
	longestBackOff = 10 * time.Second
)

// health is the record of a model version's crashes and failed loads. The Cache's mu guards it. The zero value has
// none.
type health struct {
	ref, version string
	stamp        string // of the files; changed files get a new health

	crashes          []time.Time // within crashMemory
	last             time.Time   // time of the last crash
	strikes          int         // crashes in a row without an answered record batch in between
	suspect          string      // request that alone had streams open at the last crash
	quarantinedUntil time.Time   // no runner is started until then
	failedUntil      time.Time   // a load has failed; "latest" skips the version until then
	reason           string      // of the last crash or failed load, until the model is loaded again
}

// healthLocked returns the health of a model version, a new one if the files have changed.
func (c *Cache) healthLocked(model repository.Model) *health {
	h, ok := c.healths[model.Dir]
	if stamp := stampOf(model); !ok || h.stamp != stamp {
		h = &health{ref: model.Ref, version: model.Version, stamp: stamp}
		c.healths[model.Dir] = h
	}
	return h
}

// stampOf returns a stamp that differs when other files lie in the model's folder. It is "" for a model with a digest,
// whose files never change; its Stamp would differ between the references by which it is found.
func stampOf(model repository.Model) string {
	if model.Digest != "" {
		return ""
	}
	return model.Stamp
}

// healthOf calls f with the health of a model version, under mu.
func (c *Cache) healthOf(model repository.Model, f func(*health)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c.healthLocked(model))
}

// refuses returns a Precondition fault while the model is in quarantine, else nil.
func (h *health) refuses(model repository.Model, now time.Time) error {
	if !now.Before(h.quarantinedUntil) {
		return nil
	}
	return fault.New(fault.Precondition, "model %s, version %s is in quarantine for another %s: %s; to try at once "+
		"load it explicitly (flightsvc load, model.load), or add another version", model.Ref, model.Version,
		h.quarantinedUntil.Sub(now).Round(time.Second), h.reason)
}

func (h *health) answered() { h.strikes, h.suspect = 0, "" }

func (h *health) loaded() { h.reason, h.failedUntil = "", time.Time{} }

func (h *health) failed(now time.Time, reason string) {
	h.failedUntil, h.reason = now.Add(quarantineTime), reason
}

// avoided reports whether "latest" had better mean another version.
func (h *health) avoided(now time.Time) bool {
	return now.Before(h.quarantinedUntil) || now.Before(h.failedUntil)
}

// stale reports whether the record can be forgotten.
func (h *health) stale(now time.Time) bool {
	return !h.avoided(now) && (h.strikes == 0 && len(h.crashes) == 0 || now.Sub(h.last) > strikeMemory)
}

// crashed records that a runner ended by itself. requests are those with open streams; loading means that the runner
// was not ready yet. Crashes in a row with the same single request count once, because its client will find out which
// record batch is at fault.
func (h *health) crashed(now time.Time, loading bool, requests []string, how string) {
	h.crashes, h.last = append(h.crashes, now), now
	suspect := ""
	if !loading && len(requests) == 1 {
		suspect = requests[0]
	}
	if suspect == "" || suspect != h.suspect {
		h.strikes++
	}
	h.suspect = suspect
	when := "while it served"
	if loading {
		when = "while it loaded"
	}
	h.reason = fmt.Sprintf("its runner ended by itself %s (%s)", when, how)
	if h.strikes >= crashesToQuarantine {
		h.quarantinedUntil = now.Add(quarantineTime)
		h.strikes = crashesToQuarantine - 1 // after the quarantine one more crash is enough
		h.reason = fmt.Sprintf("%d runners in a row ended by themselves, the last %s (%s)",
			crashesToQuarantine, when, how)
	}
}

// backOff returns how long the next start has to wait. It forgets crashes older than crashMemory.
func (h *health) backOff(now time.Time) time.Duration {
	for len(h.crashes) > 0 && now.Sub(h.crashes[0]) > crashMemory {
		h.crashes = h.crashes[1:]
	}
	if len(h.crashes) < 2 {
		return 0
	}
	wait := min(firstBackOff<<min(len(h.crashes)-2, 10), longestBackOff)
	return max(h.crashes[len(h.crashes)-1].Add(wait).Sub(now), 0)
}

// backOff delays the start of a runner whose model's runners have crashed repeatedly.
func (c *Cache) backOff(s *slot) error {
	c.mu.Lock()
	wait := c.healthLocked(s.model).backOff(time.Now())
	c.mu.Unlock()
	if wait == 0 {
		return nil
	}
	select {
	case <-time.After(wait):
		return nil
	case <-c.ctx.Done():
		return repository.ErrClosing
	}
}

// Pardon ends a model's quarantine and forgets its crashes.
func (c *Cache) Pardon(model repository.Model) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.healths, model.Dir)
}

// end says how a runner's process ended.
type end struct {
	asked    bool     // by Runner.Close
	loading  bool     // it was not ready yet
	reported bool     // its handshake said why
	requests []string // those with open streams
	how      string   // "signal: killed"
}

// ended forgets the slot of a runner whose process has ended, and records a crash. A slot that is still loading is left
// to load, because start may try once more.
func (c *Cache) ended(s *slot, e end) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.trial { // the model's own runner is not at fault
		return
	}
	if !e.loading {
		c.forgetLocked(s)
	}
	if !e.asked && !e.reported {
		c.healthLocked(s.model).crashed(time.Now(), e.loading, e.requests, e.how)
	}
}
