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
	quarantineTime      = 5 * time.Minute // also how long a version that could not be loaded is passed over
	crashMemory         = time.Minute     // how long a crash slows the next start
	strikeMemory        = time.Hour       // how long one counts of a model that is not in memory
	// after the second crash within crashMemory; doubles with each further one
	firstBackOff   = 200 * time.Millisecond
	longestBackOff = 10 * time.Second
)

// health is what is known against a model version. The Cache's mu guards it. Its zero value is a model
// that nothing is known against.
type health struct {
	ref, version string
	stamp        string // of the files; others begin anew

	crashes          []time.Time // within crashMemory
	last             time.Time   // crash
	strikes          int         // crashes in a row without an answer in between
	suspect          string      // request whose stream alone was open at the last crash
	quarantinedUntil time.Time   // no runner is started before
	failedUntil      time.Time   // it could not be loaded; "latest" passes it over before
	reason           string      // of the last crash or failure, until it is loaded again
}

// healthLocked returns the health of a model version.
func (c *Cache) healthLocked(model repository.Model) *health {
	h, ok := c.healths[model.Dir]
	if stamp := stampOf(model); !ok || h.stamp != stamp {
		h = &health{ref: model.Ref, version: model.Version, stamp: stamp}
		c.healths[model.Dir] = h
	}
	return h
}

// stampOf tells the files of a folder from others that were there before. The files of a digest never change, while
// each name for them has a stamp of its own.
func stampOf(model repository.Model) string {
	if model.Digest != "" {
		return ""
	}
	return model.Stamp
}

// healthOf lets f see or change the health of a model version.
func (c *Cache) healthOf(model repository.Model, f func(*health)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c.healthLocked(model))
}

// refuses returns why no runner is started now, nil if one may be. Its fault is Precondition.
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

// avoided reports whether another version is the better choice.
func (h *health) avoided(now time.Time) bool {
	return now.Before(h.quarantinedUntil) || now.Before(h.failedUntil)
}

// stale reports whether nothing is known against the model any more.
func (h *health) stale(now time.Time) bool {
	return !h.avoided(now) && (h.strikes == 0 && len(h.crashes) == 0 || now.Sub(h.last) > strikeMemory)
}

// crashed notes that a runner ended by itself. requests are those whose streams it had open; loading says that it
// was not ready yet. What one request alone does to runners, however often, counts once: whoever sends
// it finds the record batch that is to blame.
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
		h.strikes = crashesToQuarantine - 1 // afterwards one more is enough
		h.reason = fmt.Sprintf("%d runners in a row ended by themselves, the last %s (%s)", crashesToQuarantine, when,
			how)
	}
}

// backOff returns how long the next start has to wait.
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

// backOff waits before a model is started again whose runners crash.
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

// Pardon ends a model's quarantine.
func (c *Cache) Pardon(model repository.Model) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.healths, model.Dir)
}

// end says how a runner's process ended.
type end struct {
	asked    bool     // by Runner.Close
	loading  bool     // it had not been ready
	reported bool     // it said why in its handshake
	requests []string // whose streams were open
	how      string   // "signal: killed"
}

// ended clears up after a runner's process. A slot that loads is load's to forget: it may be tried once more.
func (c *Cache) ended(s *slot, e end) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !e.loading {
		c.forgetLocked(s)
	}
	if !e.asked && !e.reported {
		c.healthLocked(s.model).crashed(time.Now(), e.loading, e.requests, e.how)
	}
}
