package modelcache

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"flightsvc/internal/fault"
)

// Entry is one version of a model that this host knows.
type Entry struct {
	Model        // Version and Saved may be empty where Err is set; Saved and Dir are, for a model in a store that was not fetched yet
	State string // StateLoading, StateReady or StateUnloaded
	Err   error  // why it cannot be read
}

// Index lists the built-in model, the models below the model-root, those that were pushed, and those in memory, each version once, by
// reference and version. It loads nothing. Its fault is Precondition where the model-root cannot be read.
func (c *Cache) Index(ctx context.Context) ([]Entry, error) {
	image, _ := resolveImage(latest)
	list := []Entry{{Model: image, State: StateUnloaded}}
	if root := c.options.ModelRoot; IsURI(root) {
		remote, err := c.indexRemote(ctx, root)
		if err != nil {
			return nil, err
		}
		list = append(list, remote...)
	} else if root != "" {
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
			numbers, err := c.settled(ctx, folder.Name())
			if err != nil || len(numbers) == 0 {
				numbers = []string{latest}
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
	model, err := c.lookUp(ctx, ref, version, false)
	if err != nil {
		model.Ref = ref
		if version != latest {
			model.Version = version
		}
	}
	return Entry{Model: model, State: StateUnloaded, Err: err}
}

// indexRemote lists the models below a model-root in a store, some at once. It fetches none: what a model says of itself is
// known of those that are here.
func (c *Cache) indexRemote(ctx context.Context, root string) ([]Entry, error) {
	at, err := parseLocation(root)
	if err != nil {
		return nil, fault.New(fault.Precondition, "model-root: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	names, err := c.names(ctx, at)
	if err != nil {
		return nil, storeFault("model-root", at, err)
	}
	entries := make([][]Entry, len(names))
	var group errgroup.Group
	group.SetLimit(listingsAtOnce)
	for i, name := range names {
		group.Go(func() error {
			entries[i] = c.remoteEntries(ctx, name, at.below(name))
			return nil
		})
	}
	_ = group.Wait() // none fails
	return slices.Concat(entries...), nil
}

func (c *Cache) remoteEntries(ctx context.Context, ref string, at location) (list []Entry) {
	found, err := c.listed(ctx, ref, at, c.options.PollInterval)
	for _, one := range c.remote(at, found) {
		now, state := one.look()
		if state < unsettled {
			continue
		}
		entry := Entry{Model: Model{Ref: ref, Version: one.number, Base: at.uri, Stamp: now.stamp}, State: StateUnloaded}
		place := at
		if found.plain == nil {
			place = at.below(one.number)
		}
		if digest, ok := c.fetched(place.uri, now.stamp); ok {
			entry.Model, entry.Err = c.lookUp(ctx, ref, one.number, false)
			entry.Digest = digest
		}
		list = append(list, entry)
	}
	if len(list) == 0 {
		if err == nil {
			err = fault.New(fault.NotFound, "model %s: there is no whole SavedModel at %s", ref, at.name)
		}
		list = []Entry{{Model: Model{Ref: ref, Base: at.uri}, State: StateUnloaded, Err: err}}
	}
	return list
}
