package repository

import "sync"

// remembered is how many values a memo keeps: callers may ask for any number of names.
const remembered = 1024

// memo remembers what was found out, by key. When it is full, any one of the others goes, and is found out again.
// Its zero value is ready.
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
