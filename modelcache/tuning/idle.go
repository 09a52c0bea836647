// Tuning while the server is idle: when a search begins, and when it is abandoned.

package tuning

import (
	"context"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
)

const (
	idleTime = 10 * time.Second       // how long no model may be in use before a search begins
	idleTick = 500 * time.Millisecond // how often that is checked
)

// WhileIdle tunes models in memory while no model is in use, until ctx ends. It returns when its search has ended.
func (t *Tuner) WhileIdle(ctx context.Context) {
	ticker := time.NewTicker(idleTick)
	defer ticker.Stop()
	idle := idleTuning{tuner: t, busy: time.Now()}
	for {
		select {
		case <-ctx.Done():
			idle.stop()
			return
		case now := <-ticker.C:
			idle.look(ctx, now)
		}
	}
}

// idleTuning is the state of WhileIdle. It belongs to one goroutine.
type idleTuning struct {
	tuner  *Tuner
	busy   time.Time          // when a model was last in use
	cancel context.CancelFunc // of the search under way
	done   chan struct{}      // closed when that search has ended
}

// look begins a search when no model has been in use for idleTime, and ends it when one is.
func (t *idleTuning) look(ctx context.Context, now time.Time) {
	if t.tuner.options.Pool.Busy() {
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
			t.busy = now // the next search waits for idleTime, too
			t.stop()
		default:
		}
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	t.cancel, t.done = cancel, done
	go func() {
		defer close(done)
		t.tuner.tuneIdle(ctx)
	}()
}

// stop ends the search under way and awaits its end.
func (t *idleTuning) stop() {
	if t.cancel != nil {
		t.cancel()
		<-t.done
		t.cancel, t.done = nil, nil
	}
}

// tuneIdle tunes the models in memory that were not tuned on this kind of machine yet, one after the other. When ctx
// ends, the search under way is abandoned; its model is tuned from the beginning another time.
func (t *Tuner) tuneIdle(ctx context.Context) {
	for _, model := range t.options.Pool.InMemory() {
		if ctx.Err() != nil {
			return
		}
		digest, err := t.options.Repository.Digest(ctx, model)
		if err != nil || digest == "" {
			continue
		}
		if _, tuned := t.options.Profiles.Read(digest).Tuned[Machine()]; tuned {
			continue
		}
		if _, failed := t.untunable.Load(digest); failed {
			continue
		}
		about, err := t.Tune(ctx, model, "", func(protocol.Candidate) {})
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			if kind, _ := fault.KindOf(err); kind == fault.Unavailable { // it may succeed later
				return
			}
			t.untunable.Store(digest, true)
			t.options.Log.Info("model cannot be tuned", zap.String("model", model.Ref), zap.Error(err))
		default:
			t.options.Log.Info("model tuned", zap.String("model", model.Ref), zap.Any("choice", about.Chosen.Choice),
				zap.Float64("relative", about.Chosen.Relative))
		}
	}
}
