// Admission: which loads may begin, and which runners are ended to make room for them.

package modelcache

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
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

// What a runner is counted with before it was ever measured: what TensorFlow and the runner have for themselves
// (here 180 to 260 MiB with 2 cores), and its files twice, once as they are read and once as variables.
const (
	bareRunner   = 256 << 20
	timesOfFiles = 2
)

// headroom is added to what was measured, an eighth: batches differ.
const headroom = 8

// claim is memory of the host that a runner has, or waits for. The Cache's mu guards it.
type claim struct {
	model repository.Model
	bytes int64
	// bytes below which it cannot be counted: what was measured, or the settings say; the rest is headroom, or an
	// estimate
	least  int64
	ending bool // the process is ending, and the memory comes back

	target      target
	need        int64          // bytes of a device that it is placed with, and may take
	placement   *gpu.Placement // nil on the processor
	noRoom      *gpu.NoRoom    // why it waits for a device
	fellBack    bool           // on the processor for want of a device
	deviceBytes int64          // the most that the process had of the device
}

// newClaim returns what a runner of a model is counted with before it is measured now.
func newClaim(model repository.Model, known tuning.Profile) *claim {
	least := int64(model.Settings.Memory)
	c := &claim{model: model, bytes: max(estimate(model), least), least: least}
	if known.HostBytes > 0 {
		c.measure(known.HostBytes)
	}
	return c
}

// ofDevice returns the bytes of a device that come back with the process: those that it has, and those that it may
// take.
func (c *claim) ofDevice() int64 { return max(c.need, c.deviceBytes) }

// measure sets the claim to the most that was seen, with some headroom, or to what the settings say.
func (c *claim) measure(most int64) {
	c.least = max(most, int64(c.model.Settings.Memory))
	c.bytes = max(most+most/headroom, c.least)
}

// capLocked takes off a claim what is not certain where it is more than all the memory: alone, it is measured.
func (b *budget) capLocked(c *claim) {
	if b.total > 0 {
		c.bytes = max(min(c.bytes, b.total), c.least)
	}
}

// budget shares the host's memory among claims. The Cache's mu guards it.
type budget struct {
	total   int64 // 0 is no bound
	granted []*claim
	reading int64         // bytes with which graphs of models are read now
	waiting []*claim      // in order; the first alone may be granted
	changed chan struct{} // closed, and made anew, when a claim may fit that did not
}

func (b *budget) held() int64 {
	total := b.reading
	for _, claim := range b.granted {
		total += claim.bytes
	}
	return total
}

func (b *budget) wakeLocked() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// admit waits until the host's memory has room for a claim, in order of arrival, and evicts runners that nobody
// uses to make some. It gives up when nobody wants the model any more, or after LoadTimeout with an Exhausted that
// says who has the memory.
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
	recheck := time.NewTicker(tick) // leases expire without a word
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

// waitLocked waits, with mu unlocked, until memory or what holds it has changed, recheck ticks, or ctx ends.
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

// reserve waits until the host's memory has room for reading the graph of a model, as admit does for a runner. Fewer
// bytes than 0 are given back.
func (c *Cache) reserve(ctx context.Context, bytes int64) error {
	ctx, cancel := context.WithTimeout(ctx, c.options.LoadTimeout)
	defer cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	recheck := time.NewTicker(tick) // leases expire without a word
	defer recheck.Stop()
	for {
		short := c.memory.held() + bytes - c.memory.total
		if bytes < 0 || c.memory.total == 0 || short <= 0 {
			c.memory.reading += bytes
			c.memory.wakeLocked()
			return nil
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

// borrow waits for memory for one more runner of a model, as a load does, until release is called.
func (c *Cache) borrow(ctx context.Context, model repository.Model, digest string) (release func(), err error) {
	want := newClaim(model, c.options.Profiles.Read(digest))
	if err := c.admit(want, func() bool { return ctx.Err() == nil }); err != nil {
		return nil, err
	}
	return func() { c.give(want) }, nil
}

// give returns a claim's memory.
func (c *Cache) give(held *claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.granted = slices.DeleteFunc(c.memory.granted, func(other *claim) bool { return other == held })
	c.memory.wakeLocked()
}

// wake lets those who wait for memory look again.
func (c *Cache) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.memory.wakeLocked()
}

// idleLocked returns the slots without a lease and without a moving stream, the least recently used first.
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

// evictLocked ends runners without a lease and without a moving stream, the least recently used first,
// until they free so many bytes. If all of them would not, none is ended.
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

// fullLocked says who has the memory that a claim has waited for.
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

// holderLocked says how much memory a slot has and what keeps it there.
func (c *Cache) holderLocked(s *slot, bytes int64) string {
	about := fmt.Sprintf("%s version %s (%s", s.model.Ref, s.model.Version, config.Bytes(bytes))
	if s.runner != nil {
		if streams, leases := s.runner.Pins(time.Now()); streams+leases > 0 {
			about += fmt.Sprintf(", %d streams, %d leases", streams, leases)
		}
	}
	return about + ")"
}

// estimate guesses what a runner of a model will have in memory.
func estimate(model repository.Model) int64 {
	total := int64(bareRunner)
	if model.Dir == "" {
		return total
	}
	_ = filepath.WalkDir(model.Dir, func(_ string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			if info, err := entry.Info(); err == nil {
				total += timesOfFiles * info.Size()
			}
		}
		return nil // what cannot be read is not loaded either
	})
	return total
}
