// Slots: the states of a model version on a device, and what ends its runner.

package modelcache

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// The states of a model version. A queued one waits for memory; a draining one takes no new stream and ends with its
// last one; a failed one could not be loaded; a quarantined one is not started for a while because its runners crashed.
const (
	StateQueued      = "queued"
	StateLoading     = "loading"
	StateWarming     = "warming"
	StateReady       = "ready"
	StateDraining    = "draining"
	StateUnloaded    = "unloaded"
	StateFailed      = "failed"
	StateQuarantined = "quarantined"
)

// slot is one model version on one device, in memory or being loaded. The Cache's mu guards all fields but loaded.
type slot struct {
	model   repository.Model
	target  target        // of the first caller
	loaded  chan struct{} // closed when runner or err is set
	state   string
	callers int             // calls of Ready that wait
	waiting context.Context // ends when all callers have left
	leave   context.CancelFunc
	runner  *Runner
	err     error

	uuid     string // of the device, "" for the CPU
	fellBack bool   // on the CPU because no device had room

	claim       *claim // once it is granted
	digest      string // "" if the model has none
	profile     tuning.Profile
	bytes       int64     // of the host that the process uses now
	deviceBytes int64     // the same of the device
	used        time.Time // when the runner last had a stream or a lease
	// superseded says that a newer version serves, or the folded form. The runner then ends with its last stream.
	superseded bool

	form     string // protocol.FormSaved or protocol.FormFolded, once it is known
	sample   string // file in which the runner keeps its first run, "" for none
	replay   string // file of a sample that the runner runs before it is ready
	trial    bool   // it is not in the cache's list yet, and perhaps never will be
	replaced bool   // its folded form serves: no caller gets this runner any more
}

// endLocked ends a slot's runner, even one with streams, on a goroutine that ending counts.
func (c *Cache) endLocked(s *slot, why string, ending *sync.WaitGroup) {
	s.runner.refuse()
	s.state, s.claim.ending = StateDraining, true
	c.forgetLocked(s) // later callers get a new runner
	c.options.Log.Info("model unloaded", zap.String("model", s.model.Ref), zap.String("version", s.model.Version),
		zap.Int("runner", s.runner.PID()), zap.String("why", why))
	c.working.Add(1)
	ending.Go(func() {
		defer c.working.Done()
		s.claim.placement.Measure(s.runner.PID()) // so that the placement knows how much has to come back
		s.runner.Close()
	})
}

// endIdle ends runners that were unused for their keep-alive, superseded versions without a moving stream, and saved
// forms without any: a stream that rests learns nothing of another form.
func (c *Cache) endIdle(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range slices.Clone(c.slots) {
		if s.runner == nil || s.state != StateReady {
			continue
		}
		if streams, leases := s.runner.Pins(now); streams+leases+s.callers > 0 {
			s.used = now
			continue
		}
		keep := cmp.Or(time.Duration(s.model.Settings.KeepAlive), c.options.KeepAlive)
		why := "keep-alive is over"
		switch open, _, _ := s.runner.tally(); {
		case s.replaced && open == 0:
			keep, why = 1, "its folded form serves" // a nanosecond, so at once
		case s.superseded && !s.replaced:
			keep, why = 1, "a newer version serves"
		}
		if keep > 0 && now.Sub(s.used) >= keep {
			c.retireLocked(s, why, now)
		}
	}
}

// forgetOld drops old records of models that are neither in memory nor being loaded, because callers may ask for any
// number of names.
func (c *Cache) forgetOld(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	used := map[string]bool{}
	for _, s := range c.slots {
		used[s.model.Dir] = true
	}
	maps.DeleteFunc(c.serving, func(_ string, s *serving) bool {
		return !used[s.model.Dir] && !s.moving && now.Sub(s.since) > time.Minute
	})
	maps.DeleteFunc(c.healths, func(dir string, h *health) bool { return !used[dir] && h.stale(now) })
}

// retireLocked ends the runner of a slot without a moving stream or a lease, and reports whether it did.
func (c *Cache) retireLocked(s *slot, why string, now time.Time) bool {
	if s.runner == nil || s.callers > 0 {
		return false
	}
	if streams, leases := s.runner.retire(now); streams+leases > 0 {
		return false
	}
	c.endLocked(s, why, &c.working)
	return true
}

// measure records how much memory the runners' processes use, adjusts their claims, and keeps the most in the models'
// profiles. If all claims together then exceed the host's memory, it ends unused runners.
func (c *Cache) measure() {
	c.mu.Lock()
	list := slices.Clone(c.slots)
	c.mu.Unlock()
	for _, s := range list {
		c.mu.Lock()
		runner, ready := s.runner, s.state == StateReady
		c.mu.Unlock()
		if !ready {
			continue
		}
		bytes, err := runner.process.Memory()
		if err != nil {
			continue // the process has just ended
		}
		c.measureDevice(s, runner.PID())
		c.mu.Lock()
		s.bytes = bytes
		most := max(bytes, s.profile.HostBytes)
		grown := most > s.profile.HostBytes+s.profile.HostBytes/16
		if grown {
			s.profile.HostBytes = most
		}
		s.claim.measure(most)
		c.memory.capLocked(s.claim)
		c.memory.wakeLocked()
		if short := c.memory.held() - c.memory.total; c.memory.total > 0 && short > 0 {
			now, idle := time.Now(), int64(0)
			for _, other := range c.idleLocked(now) {
				idle += other.claim.bytes
			}
			c.evictLocked(min(short, idle), now) // not more than they have, since evictLocked would end none
		}
		c.mu.Unlock()
		if grown {
			c.learn(s, func(p *tuning.Profile) { p.HostBytes = max(p.HostBytes, most) })
		}
	}
}

// Unload ends the runners of a model and returns the version that they had. Without a runner it does nothing. A model
// whose files are gone is found by the reference with which it was loaded. Faults: Precondition while the model loads,
// or has open streams or leases; those of Resolve.
func (c *Cache) Unload(ctx context.Context, ref, version string) (string, error) {
	version = cmp.Or(version, repository.Latest)
	model, err := c.Resolve(ctx, ref, version)
	c.mu.Lock()
	found := c.loadedAsLocked(func(s *slot) bool { return err == nil && s.model.Dir == model.Dir })
	if err != nil {
		found = c.loadedAsLocked(func(s *slot) bool {
			return s.model.Ref == ref && (version == repository.Latest || version == s.model.Version)
		})
		if len(found) == 0 {
			c.mu.Unlock()
			return "", err
		}
		model, err = found[0].model, nil
	}
	if c.ctx.Err() != nil {
		err = repository.ErrClosing
	}
	for _, s := range found {
		if err != nil {
			break
		}
		if s.runner == nil {
			err = fault.New(fault.Precondition, "model %s, version %s: it is being loaded; unload it when it is ready",
				ref, model.Version)
		} else if streams, leases := s.runner.Pins(time.Now()); streams+leases > 0 {
			err = inUse(ref, model.Version, streams, leases)
		}
	}
	var ending sync.WaitGroup
	for _, s := range found {
		if err != nil {
			break
		}
		if streams, leases := s.runner.retire(time.Now()); streams+leases > 0 {
			err = inUse(ref, model.Version, streams, leases)
			break
		}
		c.endLocked(s, "a caller asked for it", &ending)
	}
	c.mu.Unlock()
	ending.Wait()
	return model.Version, err
}

func inUse(ref, version string, streams, leases int) error {
	return fault.New(fault.Precondition, "model %s, version %s: it is in use by %d open streams and %d leases for "+
		"streams that may open; unload it when they have ended", ref, version, streams, leases)
}

func (c *Cache) loadedAsLocked(is func(*slot) bool) (found []*slot) {
	for _, s := range c.slots {
		if is(s) {
			found = append(found, s)
		}
	}
	return found
}

// forget drops a slot, so that the next caller starts another.
func (c *Cache) forget(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetLocked(s)
}

func (c *Cache) forgetLocked(s *slot) {
	c.slots = slices.DeleteFunc(c.slots, func(other *slot) bool { return other == s })
}
