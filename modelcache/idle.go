package modelcache

import (
	"context"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
)

// idleTime is how long nothing may happen before an idle cache measures.
const idleTime = 10 * time.Second

// idleTuning tunes while nobody uses a model. It belongs to one goroutine.
type idleTuning struct {
	cache  *Cache
	busy   time.Time          // when somebody last used a model
	cancel context.CancelFunc // of the search under way
	done   chan struct{}      // closed when that is over
}

// look begins a search when nobody has used a model for long enough, and ends it when somebody does.
func (t *idleTuning) look(now time.Time) {
	if t.cache.Busy() {
		t.busy = now
		t.stop()
		return
	}
	if now.Sub(t.busy) < idleTime {
		return
	}
	if t.done != nil {
		select {
		case <-t.done:
			t.busy = now // not at once again
			t.stop()
		default:
		}
		return
	}
	ctx, cancel := context.WithCancel(t.cache.ctx)
	done := make(chan struct{})
	t.cancel, t.done = cancel, done
	t.cache.working.Go(func() {
		defer close(done)
		t.cache.tuneIdle(ctx)
	})
}

// stop ends the search under way; its process is gone soon after.
func (t *idleTuning) stop() {
	if t.cancel != nil {
		t.cancel()
		t.cancel, t.done = nil, nil
	}
}

// tuneIdle tunes what is in memory and was not tuned on a machine of this kind, one model after the other. The end of ctx ends
// the search under way, which then starts anew another time.
func (c *Cache) tuneIdle(ctx context.Context) {
	for _, status := range c.Status() {
		if status.State != StateReady || ctx.Err() != nil {
			continue
		}
		model, err := c.Resolve(ctx, status.Model, status.Version)
		if err != nil || model.Dir == "" {
			continue
		}
		digest, err := c.digest(ctx, model)
		if err != nil {
			continue
		}
		if _, tuned := c.profiles.read(digest).Tuned[Machine()]; tuned {
			continue
		}
		if _, failed := c.untunable.Load(digest); failed {
			continue
		}
		about, err := c.Tune(ctx, model, TuneOptions{Quick: true}, func(Candidate) {})
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if kind, _ := fault.KindOf(err); kind == fault.Unavailable { // for now
				return
			}
			c.untunable.Store(digest, true)
			c.options.Log.Info("model cannot be tuned", zap.String("model", model.Ref), zap.Error(err))
		default:
			c.options.Log.Info("model tuned", zap.String("model", model.Ref), zap.Any("choice", about.Chosen.Choice), zap.Float64("relative", about.Chosen.Relative))
		}
	}
}
