// What is done for models in the background: when it begins, and when it is abandoned.

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
	usedTime = 3 * time.Second        // how long after its first answer a model is folded
	lookTick = 500 * time.Millisecond // how often that is checked
)

// InBackground folds models in memory and, if search is true, tunes them while no model is in use, until ctx ends. It
// returns when what it has begun has ended.
func (t *Tuner) InBackground(ctx context.Context, search bool) {
	ticker := time.NewTicker(lookTick)
	defer ticker.Stop()
	b := background{tuner: t, search: search, busy: time.Now(), first: map[string]time.Time{}}
	for {
		select {
		case <-ctx.Done():
			b.stop()
			return
		case now := <-ticker.C:
			b.look(ctx, now)
		}
	}
}

// background is the state of InBackground. It belongs to one goroutine.
type background struct {
	tuner  *Tuner
	search bool
	busy   time.Time            // when a model was last in use
	first  map[string]time.Time // when a model that may be folded was first seen, by digest

	folding bool               // what is under way is no search
	cancel  context.CancelFunc // of what is under way
	done    chan struct{}      // closed when that has ended
}

// look begins to fold a model some time after its first answer, and a search when no model has been in use for
// idleTime. It ends both when a load waits for anything, and a search when a model is in use.
func (b *background) look(ctx context.Context, now time.Time) {
	pool := b.tuner.options.Pool
	loading, busy := pool.Loading(), pool.Busy()
	if busy {
		b.busy = now
	}
	if b.done != nil {
		select {
		case <-b.done:
			b.busy = now // the next search waits for idleTime, too
			b.stop()
		default:
			if loading || busy && !b.folding {
				b.stop()
			}
		}
		return
	}
	if loading {
		return
	}
	if model, ok := b.next(now); ok {
		b.begin(ctx, true, func(ctx context.Context) { b.tuner.fold(ctx, model) })
	} else if b.search && now.Sub(b.busy) >= idleTime {
		b.begin(ctx, false, b.tuner.tuneIdle)
	}
}

// next returns a model to fold.
func (b *background) next(now time.Time) (Sampled, bool) {
	for _, model := range b.tuner.options.Pool.Sampled() {
		first, seen := b.first[model.Digest]
		if !seen {
			b.first[model.Digest] = now
		}
		if seen && now.Sub(first) >= usedTime && b.tuner.folds.due(model.Digest, now) {
			return model, true
		}
	}
	return Sampled{}, false
}

func (b *background) begin(ctx context.Context, folding bool, work func(context.Context)) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	b.folding, b.cancel, b.done = folding, cancel, done
	go func() {
		defer close(done)
		work(ctx)
	}()
}

// stop ends what is under way and awaits its end.
func (b *background) stop() {
	if b.cancel != nil {
		b.cancel()
		<-b.done
		b.cancel, b.done = nil, nil
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
