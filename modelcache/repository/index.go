// The index: all models that this host knows.

package repository

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
)

// Entry is one version of a model that this host knows.
type Entry struct {
	// Version and Saved may be empty if Err is set; Saved and Dir are empty for a model in a store that was not fetched
	// yet.
	Model
	Err error // why it cannot be read
}

// Index lists the built-in model, the models below the model-root, and those that were pushed, each version once. It
// loads nothing. Its fault is Precondition where the model-root cannot be read.
func (r *Repository) Index(ctx context.Context) ([]Entry, error) {
	image, _ := resolveImage(Latest)
	list := []Entry{{Model: image}}
	if root := r.options.ModelRoot; IsURI(root) {
		remote, err := r.indexRemote(ctx, root)
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
			info, err := os.Stat(base) // a link to a folder counts, too
			if err != nil || !info.IsDir() || strings.HasPrefix(folder.Name(), ".") || folder.Name() == protocol.Image {
				continue
			}
			numbers, err := r.Settled(ctx, folder.Name())
			if err != nil || len(numbers) == 0 {
				numbers = []string{Latest}
			}
			for _, number := range numbers {
				list = append(list, r.entry(ctx, folder.Name(), number))
			}
		}
	}
	folders, _ := os.ReadDir(r.models()) // there is none before the first push
	for _, folder := range folders {
		if digest := "sha256:" + folder.Name(); CheckDigest(digest) == nil {
			list = append(list, r.entry(ctx, digest, Latest))
		}
	}
	return list, nil
}

func (r *Repository) entry(ctx context.Context, ref, version string) Entry {
	model, err := r.lookUp(ctx, ref, version, false)
	if err != nil {
		model.Ref = ref
		if version != Latest {
			model.Version = version
		}
	}
	return Entry{Model: model, Err: err}
}

// indexRemote lists the models below a model-root in a store. It fetches none: only those that are on this host already
// have signatures.
func (r *Repository) indexRemote(ctx context.Context, root string) ([]Entry, error) {
	at, err := parseLocation(root)
	if err != nil {
		return nil, fault.New(fault.Precondition, "model-root: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	names, err := r.names(ctx, at)
	if err != nil {
		return nil, storeFault("model-root", at, err)
	}
	entries := make([][]Entry, len(names))
	var group errgroup.Group
	group.SetLimit(listingsAtOnce)
	for i, name := range names {
		group.Go(func() error {
			entries[i] = r.remoteEntries(ctx, name, at.below(name))
			return nil
		})
	}
	_ = group.Wait() // its functions return no errors
	return slices.Concat(entries...), nil
}

func (r *Repository) remoteEntries(ctx context.Context, ref string, at location) (list []Entry) {
	found, err := r.listed(ctx, ref, at, r.options.PollInterval)
	for _, one := range r.remote(at, found) {
		now, state := one.look()
		if state < unsettled {
			continue
		}
		entry := Entry{Model: Model{Ref: ref, Version: one.number, Base: at.uri, Stamp: now.stamp}}
		place := at
		if found.plain == nil {
			place = at.below(one.number)
		}
		if digest, ok := r.fetched(place.uri, now.stamp); ok {
			entry.Model, entry.Err = r.lookUp(ctx, ref, one.number, false)
			entry.Digest = digest
		}
		list = append(list, entry)
	}
	if len(list) == 0 {
		if err == nil {
			err = fault.New(fault.NotFound, "model %s: there is no complete SavedModel at %s", ref, at.name)
		}
		list = []Entry{{Model: Model{Ref: ref, Base: at.uri}, Err: err}}
	}
	return list
}
