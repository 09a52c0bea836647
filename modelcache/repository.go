package modelcache

import (
	"cmp"
	"context"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Model is a reference that was resolved to a folder.
type Model struct {
	Ref     string // as the caller wrote it
	Version string // the number of the folder, "1" where a SavedModel has no numbered folder
	Dir     string // absolute folder of the SavedModel, "" for the one that is built in
	Base    string // what the reference names: an absolute folder or a URI, "" for the one that is built in
	Stamp   string // fingerprint of the version's files: another one when any of them changes; "" for the one that is built in
	Digest  string // of the files, "" until it is known
	Saved   *savedmodel.Model
	// Settings are the owner's.
	Settings Settings
}

// latest asks for the highest version.
const latest = "latest"

// find returns what a reference names now. The highest version is the highest that has settled; where there is none
// yet, and for a version that was asked for and has not settled, it waits some seconds. A version in a store is fetched.
func (c *Cache) find(ctx context.Context, ref, version string) (Model, error) {
	return c.lookUp(ctx, ref, version, true)
}

// lookUp is find; without wait it neither waits for a version nor marks a cached model as used.
func (c *Cache) lookUp(ctx context.Context, ref, version string, wait bool) (Model, error) {
	version = cmp.Or(version, latest)
	if ref == Image {
		model, ok := resolveImage(version)
		if !ok {
			return Model{}, fault.New(fault.NotFound, "model %s: no version %s; it is built in and has version %s", ref, version, model.Version)
		}
		return model, nil
	}
	base, at, err := c.locate(ref)
	if err != nil {
		return Model{}, err
	}
	if at != nil {
		return c.findRemote(ctx, ref, version, *at, wait)
	}
	model, now, err := c.findLocal(ctx, ref, version, base, wait)
	if err != nil {
		return Model{}, err
	}
	if filepath.Dir(base) == c.models() {
		if model.Digest, now = "sha256:"+filepath.Base(base), (snapshot{}); wait { // the files of a digest never change
			c.touch(base)
		}
	}
	if model.Settings, err = readSettings(base); err != nil {
		return Model{}, err
	}
	return c.withSaved(ctx, model, now)
}

func (c *Cache) findLocal(ctx context.Context, ref, version, base string, wait bool) (model Model, now snapshot, err error) {
	if info, err := os.Stat(base); err != nil || !info.IsDir() {
		return model, now, fault.New(fault.NotFound, "model %s: there is no folder %s on this host", ref, base)
	}
	model = Model{Ref: ref, Version: "1", Dir: base, Base: base}
	if _, err := os.Stat(filepath.Join(base, savedmodel.File)); err == nil {
		if version != latest && version != model.Version {
			return model, now, fault.New(fault.NotFound, "model %s: no version %s; %s is a SavedModel without versions", ref, version, base)
		}
		if now, err = scan(base); err != nil {
			return model, now, fault.New(fault.BadRequest, "model %s: %w", ref, err)
		}
		model.Stamp = now.stamp
		return model, now, nil
	}
	number, now, err := await(ctx, ref, version, wait, func(int) ([]candidate, error) { return c.local(base), nil })
	switch {
	case err != nil:
	case number == "":
		err = fault.New(fault.NotFound, "model %s: %s holds no %s and no folder of version %s with one", ref, base, savedmodel.File, version)
	default:
		model.Version, model.Dir, model.Stamp = number, filepath.Join(base, number), now.stamp
	}
	return model, now, err
}

// withSaved reads what the model says about itself, as far as its settings let it be served.
func (c *Cache) withSaved(ctx context.Context, model Model, now snapshot) (Model, error) {
	saved, err := c.read.model(ctx, model.Dir, now)
	if err != nil {
		return Model{}, err
	}
	if model.Saved, err = model.Settings.served(saved); err != nil {
		return Model{}, err
	}
	return model, nil
}

// readings remembers what SavedModels say about themselves, for as long as their file stays the
// same. Its zero value is ready.
type readings struct {
	mu    sync.Mutex         // guards known
	known map[string]reading // by folder
}

type reading struct {
	changed time.Time
	size    int64
	model   *savedmodel.Model
}

// model returns what savedmodel.Read returns. now is how the folder looked before.
func (r *readings) model(ctx context.Context, dir string, now snapshot) (*savedmodel.Model, error) {
	graph, _ := now.find(savedmodel.File)
	r.mu.Lock()
	known, ok := r.known[dir]
	r.mu.Unlock()
	if ok && known.changed.Equal(graph.changed) && known.size == graph.size {
		return known.model, nil
	}
	model, err := savedmodel.Read(ctx, dir, nil)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil {
		r.known = map[string]reading{}
	}
	r.known[dir] = reading{changed: graph.changed, size: graph.size, model: model}
	return model, nil
}

// locate returns where the SavedModel of a reference, or the folder of its versions, has to be: a folder, or a place
// in a store.
func (c *Cache) locate(ref string) (string, *location, error) {
	root := c.options.ModelRoot
	scheme, rest, hasScheme := strings.Cut(ref, ":")
	switch {
	case filepath.IsAbs(ref):
		return filepath.Clean(ref), nil, nil
	case hasScheme && scheme == "file":
		uri, err := url.Parse(ref)
		if err != nil || uri.Host != "" || !filepath.IsAbs(uri.Path) {
			return "", nil, fault.New(fault.BadRequest, "model %q: want file:///absolute/path", ref)
		}
		return filepath.Clean(uri.Path), nil, nil
	case hasScheme && scheme == "sha256":
		dir, err := c.pushed(ref)
		return dir, nil, err
	case hasScheme && (slices.Contains(schemes, scheme) || strings.HasPrefix(rest, "//")):
		at, err := parseLocation(ref)
		if err != nil {
			if parsed, parseErr := url.Parse(ref); parseErr == nil {
				ref = parsed.Redacted()
			}
			return "", nil, fault.New(fault.BadRequest, "model %q: %w", ref, err)
		}
		return at.uri, &at, nil
	case hasScheme:
		return "", nil, fault.New(fault.BadRequest, "model %q: this server reads %s, absolute paths, sha256: digests of pushed models and names below its model-root", ref, knownSchemes)
	case root == "":
		return "", nil, fault.New(fault.NotFound, "model %q: this server has no model-root to look up names in; set --model-root or give a path", ref)
	case ref == "." || !filepath.IsLocal(ref) || strings.ContainsRune(ref, filepath.Separator):
		return "", nil, fault.New(fault.BadRequest, "model %q: a name is one folder below the model-root", ref)
	}
	if !IsURI(root) {
		return filepath.Join(root, ref), nil, nil
	}
	at, err := parseLocation(root)
	if err != nil {
		return "", nil, fault.New(fault.Precondition, "model-root: %w", err)
	}
	at = at.below(ref)
	return at.uri, &at, nil
}
