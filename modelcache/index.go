package modelcache

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"flightsvc/modelcache/repository"
)

// Entry is one version of a model that this host knows.
type Entry struct {
	repository.Entry
	State string // that of its slot, StateUnloaded if it has none
}

// Index lists the models of the repository and those in memory, each version once, sorted by reference and version. It
// loads nothing. Its fault is Precondition where the model-root cannot be read.
func (c *Cache) Index(ctx context.Context) ([]Entry, error) {
	known, err := c.options.Repository.Index(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]Entry, len(known))
	for i, entry := range known {
		list[i] = Entry{Entry: entry, State: StateUnloaded}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		state := s.state
		i := slices.IndexFunc(list, func(e Entry) bool {
			// the files may have been removed since the model was loaded
			gone := e.Dir == "" && e.Ref == s.model.Ref && (e.Version == "" || e.Version == s.model.Version)
			return gone || e.Dir == s.model.Dir
		})
		if i < 0 {
			i, list = len(list), append(list, Entry{Entry: repository.Entry{Model: s.model}})
		}
		list[i].State = state
	}
	slices.SortStableFunc(list, func(a, b Entry) int {
		return cmp.Or(strings.Compare(a.Ref, b.Ref), cmp.Compare(len(a.Version), len(b.Version)),
			strings.Compare(a.Version, b.Version))
	})
	return list, nil
}
