package modelcache

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Entry is one version of a model that this host knows.
type Entry struct {
	Model        // Version and Saved may be empty where Err is set
	State string // StateLoading, StateReady or StateUnloaded
	Err   error  // why it cannot be read
}

// Index lists the built-in model, the models below the model-root, those that were pushed, and those in memory, each version once, by
// reference and version. It loads nothing. Its fault is Precondition where the model-root cannot be read.
func (c *Cache) Index(ctx context.Context) ([]Entry, error) {
	image, _ := resolveImage(latest)
	list := []Entry{{Model: image, State: StateUnloaded}}
	if root := c.options.ModelRoot; root != "" {
		folders, err := os.ReadDir(root)
		if err != nil {
			return nil, fault.New(fault.Precondition, "model-root: %w", err)
		}
		for _, folder := range folders {
			base := filepath.Join(root, folder.Name())
			info, err := os.Stat(base) // a link to a folder is one
			if err != nil || !info.IsDir() || strings.HasPrefix(folder.Name(), ".") || folder.Name() == Image {
				continue
			}
			numbers := []string{latest}
			if _, err := os.Stat(filepath.Join(base, savedmodel.File)); err != nil {
				if found := versions(base); len(found) > 0 {
					numbers = found
				}
			}
			for _, number := range numbers {
				list = append(list, c.entry(ctx, folder.Name(), number))
			}
		}
	}
	folders, _ := os.ReadDir(c.models()) // there is none before the first push
	for _, folder := range folders {
		if digest := "sha256:" + folder.Name(); CheckDigest(digest) == nil {
			list = append(list, c.entry(ctx, digest, latest))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		state := s.state
		i := slices.IndexFunc(list, func(e Entry) bool {
			gone := e.Dir == "" && e.Ref == s.model.Ref && (e.Version == "" || e.Version == s.model.Version) // since it was loaded
			return gone || e.Dir == s.model.Dir
		})
		if i < 0 {
			i, list = len(list), append(list, Entry{Model: s.model})
		}
		list[i].State = state
	}
	slices.SortStableFunc(list, func(a, b Entry) int {
		return cmp.Or(strings.Compare(a.Ref, b.Ref), cmp.Compare(len(a.Version), len(b.Version)), strings.Compare(a.Version, b.Version))
	})
	return list, nil
}

func (c *Cache) entry(ctx context.Context, ref, version string) Entry {
	model, err := c.find(ctx, ref, version)
	if err != nil {
		model.Ref = ref
		if version != latest {
			model.Version = version
		}
	}
	return Entry{Model: model, State: StateUnloaded, Err: err}
}
