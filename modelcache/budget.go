// Admission: which loads may begin, and which runners are ended to make room for them.

package modelcache

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"flightsvc/gpu"
	"flightsvc/internal/config"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// The memory that a runner is assumed to need before it was ever measured: bareRunner for the process with TensorFlow
// but without a model (180 to 260 MiB were measured with 2 cores), and the size of the model's files timesOfFiles
// times, once as they are read and once as variables.
const (
	bareRunner   = 256 << 20
	timesOfFiles = 2
)

// headroom is the divisor of the reserve on top of measured memory: an eighth, because a later batch may need more.
const headroom = 8

// claim is the memory of the host, and of a device, that a runner has or waits for. The Cache's mu guards it.
type claim struct {
	model repository.Model
	bytes int64 // of the host
	// lower bound of bytes: what was measured, or the model's setting memory; the rest is headroom or an estimate
	least  int64
	ending bool // the process is ending, so its memory will come back

	target      target
	need        int64          // bytes of a device that the runner is placed with, and may take
	placement   *gpu.Placement // nil on the CPU
	noRoom      *gpu.NoRoom    // why no device had room at the last try
	fellBack    bool           // on the CPU because no device had room
	deviceBytes int64          // the most that the process was seen to use of the device
}

// newClaim returns the claim of a runner that is to be started: what its model's profile says, else an estimate.
func newClaim(model repository.Model, known tuning.Profile) *claim {
	least := int64(model.Settings.Memory)
	c := &claim{model: model, bytes: max(estimate(model), least), least: least}
	if known.HostBytes > 0 {
		c.measure(known.HostBytes)
	}
	return c
}

// ofDevice returns the bytes of a device that become free when the process ends: what it uses, or may still take.
func (c *claim) ofDevice() int64 { return max(c.need, c.deviceBytes) }

// measure sets the claim to the most bytes that were measured plus headroom, but never below the model's setting
// memory.
func (c *claim) measure(most int64) {
	c.least = max(most, int64(c.model.Settings.Memory))
	c.bytes = max(most+most/headroom, c.least)
}

// capLocked lowers a claim that exceeds all memory to that total, but not below what is certain (least): then the
// runner can start, alone, and be measured.
func (b *budget) capLocked(c *claim) {
	if b.total > 0 {
		c.bytes = max(min(c.bytes, b.total), c.least)
	}
}

// budget shares the host's memory among claims. The Cache's mu guards it.
type budget struct {
	total   int64 // 0 is no bound
	granted []*claim
	reading int64         // bytes reserved for reading the graphs of models
	waiting []*claim      // in order of arrival; only the first may be granted
	changed chan struct{} // closed and replaced when a claim that did not fit may fit
}

func (b *budget) held() int64 {
	total := b.reading
	for _, claim := range b.granted {
		total += claim.bytes
	}
	return total
}

// roomForLocked reports whether so many bytes are free, and no load waits for them.
func (b *budget) roomForLocked(bytes int64) bool {
	return len(b.waiting) == 0 && (b.total == 0 || b.held()+bytes <= b.total)
}

func (b *budget) wakeLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// admit waits until the host's memory, and then a device, has room for a claim. Claims are granted in order of arrival;
// for the first one unused runners are ended. It returns context.Canceled once wanted reports false, and after
// LoadTimeout an Exhausted fault that lists what uses the memory.
func (c *Cache) admit(want *claim, wanted func() bool) error {
	ctx, cancel := context.WithTimeout(c.ctx, c.options.LoadTimeout)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.capLocked(want)
	if total := c.memory.total; total > 0 && want.bytes > total {
		return fault.New(fault.Exhausted, "model %s: it needs %s of this host's memory, and there are %s for all "+
			"models; raise the setting memory", want.model.Ref, config.Bytes(want.bytes), config.Bytes(total))
	}
	c.memory.waiting = append(c.memory.waiting, want)
	defer func() {
		c.memory.waiting = slices.DeleteFunc(c.memory.waiting, func(other *claim) bool { return other == want })
		c.memory.wakeLocked()
	}()
	recheck := time.NewTicker(tick) // nothing else tells of a lease that has expired
	defer recheck.Stop()
	for {
		switch {
		case c.ctx.Err() != nil:
			return repository.ErrClosing
		case ctx.Err() != nil && want.noRoom != nil:
			return c.deviceFullLocked(want)
		case ctx.Err() != nil:
			return c.fullLocked(want)
		case !wanted():
			return context.Canceled
		}
		if c.memory.waiting[0] == want {
			short := c.memory.held() + want.bytes - c.memory.total
			if c.memory.total == 0 || short <= 0 {
				c.memory.granted = append(c.memory.granted, want)
				placed, err := c.placeLocked(ctx, want)
				if placed {
					return nil
				}
				c.memory.granted = slices.DeleteFunc(c.memory.granted, func(other *claim) bool { return other == want })
				if err != nil {
					return err
				}
			} else {
				c.evictLocked(short, time.Now())
			}
		}
		c.waitLocked(ctx, recheck)
	}
}

// waitLocked unlocks mu, waits until memory may have become free (memory.changed), recheck ticks or ctx ends, and locks
// mu again.
func (c *Cache) waitLocked(ctx context.Context, recheck *time.Ticker) {
	changed := c.memory.changed
	c.mu.Unlock()
	select {
	case <-changed:
	case <-recheck.C:
	case <-ctx.Done():
	}
	c.mu.Lock()
}

// reserve takes host memory for reading a model's graph. It waits for it and ends unused runners, as admit does; its
// fault is Exhausted. A negative number of bytes gives memory back, at once.
func (c *Cache) reserve(ctx context.Context, bytes int64) error {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, c.options.LoadTimeout)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	recheck := time.NewTicker(tick) // nothing else tells of a lease that has expired
	defer recheck.Stop()
	for {
		short := c.memory.held() + bytes - c.memory.total
		if bytes < 0 || c.memory.total == 0 || short <= 0 {
			c.memory.reading += bytes
			c.memory.wakeLocked()
			return nil
		}
		if caller.Err() != nil {
			return caller.Err()
		}
		if ctx.Err() != nil || c.memory.reading+bytes > c.memory.total {
			return fault.New(fault.Exhausted, "reading its %s needs %s of this host's memory, and of %s for all "+
				"models %s are taken; end some streams, or raise the setting memory", savedmodel.File,
				config.Bytes(c.memory.reading+bytes), config.Bytes(c.memory.total), config.Bytes(c.memory.held()))
		}
		c.evictLocked(short, time.Now())
		c.waitLocked(ctx, recheck)
	}
}

// borrow waits, as a load does, for the memory of one more runner of a model; release gives it back.
func (c *Cache) borrow(ctx context.Context, model repository.Model, digest string) (release func(), err error) {
	want := newClaim(model, c.options.Profiles.Read(digest))
	if err := c.admit(want, func() bool { return ctx.Err() == nil }); err != nil {
		return nil, err
	}
	return func() { c.give(want) }, nil
}

// give gives back the memory of a granted claim.
func (c *Cache) give(held *claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.granted = slices.DeleteFunc(c.memory.granted, func(other *claim) bool { return other == held })
	c.memory.wakeLocked()
}

// wake makes all that wait for memory check again.
func (c *Cache) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.wakeLocked()
}

// idleLocked returns the slots that are ready and unused, the least recently used first: no caller waits for them, and
// their runners have neither a lease nor a moving stream.
func (c *Cache) idleLocked(now time.Time) []*slot {
	var idle []*slot
	for _, s := range c.slots {
		if s.runner == nil || s.callers > 0 || s.state != StateReady {
			continue
		}
		if streams, leases := s.runner.Pins(now); streams+leases == 0 {
			idle = append(idle, s)
		}
	}
	slices.SortFunc(idle, func(a, b *slot) int { return a.used.Compare(b.used) })
	return idle
}

// evictLocked ends unused runners, the least recently used first, until at least short bytes come free, counting those
// of runners that are ending already. If all of them together would not free enough, it ends none.
func (c *Cache) evictLocked(short int64, now time.Time) {
	for _, claim := range c.memory.granted {
		if claim.ending {
			short -= claim.bytes
		}
	}
	idle := c.idleLocked(now)
	free := int64(0)
	for i, s := range idle {
		if free >= short {
			idle = idle[:i]
			break
		}
		free += s.claim.bytes
	}
	if free < short {
		return
	}
	for _, s := range idle {
		c.retireLocked(s, "others need its memory", now)
	}
}

// fullLocked returns the fault of a claim that has waited too long for host memory. It lists what uses the memory.
func (c *Cache) fullLocked(want *claim) error {
	var holders []string
	for _, s := range c.slots {
		if s.claim == nil || !slices.Contains(c.memory.granted, s.claim) {
			continue
		}
		holders = append(holders, c.holderLocked(s, s.claim.bytes))
	}
	slices.Sort(holders)
	return fault.New(fault.Exhausted, "model %s, version %s: it needs %s of this host's memory and has waited %s for "+
		"it; of %s for all models %s are used by %s; end some of their streams, or raise the setting memory",
		want.model.Ref, want.model.Version, config.Bytes(want.bytes), c.options.LoadTimeout,
		config.Bytes(c.memory.total), config.Bytes(c.memory.held()),
		cmp.Or(strings.Join(holders, ", "), "models that are ending"))
}

// holderLocked describes a slot for such a fault: its memory, and the streams and leases that keep it there.
func (c *Cache) holderLocked(s *slot, bytes int64) string {
	about := fmt.Sprintf("%s version %s (%s", s.model.Ref, s.model.Version, config.Bytes(bytes))
	if s.runner != nil {
		if streams, leases := s.runner.Pins(time.Now()); streams+leases > 0 {
			about += fmt.Sprintf(", %d streams, %d leases", streams, leases)
		}
	}
	return about + ")"
}

// estimate guesses from the size of a model's files how many bytes of the host its runner will need.
func estimate(model repository.Model) int64 {
	total := int64(bareRunner)
	if model.Dir == "" {
		return total
	}
	return total + timesOfFiles*repository.Size(model.Dir)
}
