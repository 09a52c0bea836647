// Forms: a model's folded form takes over from the saved one, once both have answered the same rows alike.

package modelcache

import (
	"context"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// canFoldLocked reports whether a slot that is about to load might later be served in its folded form: on the CPU, if
// neither its owner nor tuning has chosen another one, and if nothing is known that prevents it.
func (c *Cache) canFoldLocked(s *slot) bool {
	_, tuned := s.profile.Tuned[tuning.Machine()]
	return c.options.Fold && s.uuid == "" && !s.fellBack && s.form == protocol.FormSaved && s.digest != "" && !tuned &&
		s.model.Settings.Form != repository.FormSaved && s.profile.NotFrozen == ""
}

// isSampled reports whether new streams go to a slot's runner and it keeps a run to compare with.
func (s *slot) isSampled() bool { return s.state == StateReady && !s.superseded && s.sample != "" }

// Sampled returns the models that might be served in their folded form and whose runners have kept a run to compare
// with.
func (c *Cache) Sampled() []tuning.Sampled {
	c.mu.Lock()
	var list []*slot
	for _, s := range c.slots {
		if s.isSampled() && s.profile.NotFrozen == "" {
			list = append(list, s)
		}
	}
	c.mu.Unlock()
	var found []tuning.Sampled
	for _, s := range list {
		if _, err := os.Stat(s.sample); err == nil {
			found = append(found, tuning.Sampled{Model: s.model, Digest: s.digest})
		}
	}
	return found
}

// Loading reports whether a load is under way, or waits.
func (c *Cache) Loading() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.slots, func(s *slot) bool { return s.runner == nil })
}

// Spare takes host memory that is free now, false if there is not enough: it ends no runner for it.
func (c *Cache) Spare(bytes int64) (release func(), ok bool) {
	held := &claim{bytes: bytes, least: bytes}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.memory.roomForLocked(bytes) {
		return nil, false
	}
	c.memory.granted = append(c.memory.granted, held)
	return func() { c.give(held) }, true
}

// KeepSaved records why the model with a digest is served in its saved form, for Status, and asks no more for a folded
// one; the rows that were kept for it are removed.
func (c *Cache) KeepSaved(digest, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		if s.digest == digest {
			s.profile.NotFrozen = why
			if s.sample != "" {
				_ = os.Remove(s.sample)
			}
		}
	}
}

// Replace starts a runner of a model's folded form, which has a digest of its own, beside the runner of the saved one,
// and has it run the rows that the latter has kept. If the answers agree, it takes over: open streams stay, and new
// ones go to it.
//
// Faults: Exhausted if there is no memory for both; Unavailable if the saved form's runner has ended; Precondition,
// with the difference, if the answers do not agree; those of a load.
func (c *Cache) Replace(ctx context.Context, sampled tuning.Sampled, folded string) error {
	c.mu.Lock()
	var old *slot
	for _, s := range c.slots {
		if s.model.Dir == sampled.Model.Dir && s.digest == sampled.Digest && s.isSampled() {
			old = s
		}
	}
	if old == nil || c.ctx.Err() != nil {
		c.mu.Unlock()
		return errReplaced
	}
	s := &slot{model: old.model, target: old.target, state: StateQueued, used: time.Now(),
		loaded: make(chan struct{}), digest: old.digest, profile: old.profile, replay: old.sample, trial: true}
	s.profile.Folded = folded
	s.waiting, s.leave = context.WithCancel(c.ctx)
	want := newClaim(s.model, s.profile)
	want.target = s.target
	room := c.memory.roomForLocked(want.bytes)
	c.mu.Unlock()
	defer s.leave()
	if !room {
		return fault.New(fault.Exhausted, "there is no memory for its folded form beside the saved one")
	}
	runner, err := c.startWith(ctx, s, want, func() bool { return ctx.Err() == nil })
	if err != nil {
		return err
	}
	err = compare(old.sample)
	_ = os.Remove(control.Replayed(old.sample))
	if err != nil {
		runner.Close()
		return err
	}
	_ = os.Remove(old.sample) // the rows are needed no more
	c.mu.Lock()
	if !slices.Contains(c.slots, old) || old.superseded || c.ctx.Err() != nil {
		c.mu.Unlock()
		runner.Close()
		return errReplaced
	}
	defer c.mu.Unlock()
	s.runner, s.state, s.trial, s.used = runner, StateReady, false, time.Now()
	close(s.loaded)
	c.slots = append(c.slots, s)
	old.replaced, old.superseded = true, true
	c.options.Log.Info("the folded form serves", zap.String("model", s.model.Ref),
		zap.String("version", s.model.Version), zap.Int("runner", runner.PID()))
	return nil
}

var errReplaced = fault.New(fault.Unavailable, "the runner of the saved form has ended")

// compare returns nil if a sample and its replay agree.
func compare(path string) error {
	sample, err := control.ReadSample(path)
	if err != nil {
		return errReplaced // its runner's end removes the file
	}
	replayed, err := control.ReadSample(control.Replayed(path))
	if err != nil {
		return errReplaced
	}
	return tuning.Agree(replayed.Outputs, sample.Outputs)
}
