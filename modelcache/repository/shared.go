package repository

import (
	"context"
	"sync"
)

// shared runs one call for all concurrent callers with the same key. The call goes on while a caller waits for it and
// is cancelled when none does, which golang.org/x/sync/singleflight cannot do. The zero value is ready to use.
type shared[T any] struct {
	mu    sync.Mutex
	calls map[string]*call[T]
}

type call[T any] struct {
	waiting int // callers
	cancel  context.CancelFunc
	done    chan struct{} // closed when value and err are set
	value   T
	err     error
}

// do returns the result of f, or of the call with this key that is under way. f runs on a goroutine of the repository,
// which Close ends and awaits.
func (s *shared[T]) do(ctx context.Context, r *Repository, key string, f func(context.Context) (T, error)) (T, error) {
	var none T
	s.mu.Lock()
	one, ok := s.calls[key]
	if !ok {
		if !r.begin() {
			s.mu.Unlock()
			return none, ErrClosing
		}
		running, cancel := context.WithCancel(r.ctx)
		one = &call[T]{cancel: cancel, done: make(chan struct{})}
		if s.calls == nil {
			s.calls = map[string]*call[T]{}
		}
		s.calls[key] = one
		go func() {
			defer r.working.Done()
			defer cancel()
			one.value, one.err = f(running)
			if one.err != nil && r.ctx.Err() != nil {
				one.err = ErrClosing
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.forget(key, one)
			close(one.done)
		}()
	}
	one.waiting++
	s.mu.Unlock()
	select {
	case <-one.done:
		return one.value, one.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if one.waiting--; one.waiting == 0 {
		one.cancel()
		s.forget(key, one) // the next caller begins a new call
	}
	return none, ctx.Err()
}

func (s *shared[T]) forget(key string, one *call[T]) {
	if s.calls[key] == one {
		delete(s.calls, key)
	}
}
