package modelcache

import (
	"context"
	"sync"
)

// shared runs one call for all who ask for the same at once. The call goes on while anybody waits for it, and is
// cancelled when nobody does. Its zero value is ready.
type shared[T any] struct {
	mu    sync.Mutex
	calls map[string]*call[T]
}

type call[T any] struct {
	waiting int
	cancel  context.CancelFunc
	done    chan struct{} // closed when value and err are set
	value   T
	err     error
}

// do returns what f returns, for this caller or for one before. f runs on a goroutine of the cache, which Close
// ends and awaits.
func (s *shared[T]) do(ctx context.Context, c *Cache, key string, f func(context.Context) (T, error)) (T, error) {
	var none T
	s.mu.Lock()
	one, ok := s.calls[key]
	if !ok {
		if !c.begin() {
			s.mu.Unlock()
			return none, errClosing
		}
		running, cancel := context.WithCancel(c.ctx)
		one = &call[T]{cancel: cancel, done: make(chan struct{})}
		if s.calls == nil {
			s.calls = map[string]*call[T]{}
		}
		s.calls[key] = one
		go func() {
			defer c.working.Done()
			defer cancel()
			one.value, one.err = f(running)
			if one.err != nil && c.ctx.Err() != nil {
				one.err = errClosing
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
		s.forget(key, one) // who comes now begins anew
	}
	return none, ctx.Err()
}

func (s *shared[T]) forget(key string, one *call[T]) {
	if s.calls[key] == one {
		delete(s.calls, key)
	}
}

// begin counts work that Close has to await, with working.Done at its end; false where the cache is closing.
func (c *Cache) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.working.Add(1)
	return true
}
