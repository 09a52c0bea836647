package repository

import "sync"

// remembered bounds the values of a memo, because callers may ask for any number of names.
const remembered = 1024

// memo remembers values by key. When it is full, an arbitrary one is dropped and has to be found out again. The zero
// value is ready to use.
type memo[V any] struct {
	mu    sync.Mutex // guards known
	known map[string]V
}

func (m *memo[V]) get(key string) (V, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	value, ok := m.known[key]
	return value, ok
}

func (m *memo[V]) put(key string, value V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.known == nil {
		m.known = map[string]V{}
	}
	if _, ok := m.known[key]; !ok && len(m.known) >= remembered {
		for other := range m.known {
			delete(m.known, other)
			break
		}
	}
	m.known[key] = value
}

func (m *memo[V]) drop(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.known, key)
}
