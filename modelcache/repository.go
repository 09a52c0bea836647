package modelcache

import (
	"cmp"
	"context"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	Saved   *savedmodel.Model
	Stamp   string
	// Settings are the owner's.
	Settings Settings
}

// latest asks for the highest version.
const latest = "latest"

// Resolve finds the SavedModel of a reference: a file URI or an absolute path of a SavedModel or of a folder
// with numbered versions, a name below the model-root, the digest of a pushed model, or Image. version is
// "latest", "" for the same, or a number. It reads saved_model.pb and loads nothing.
// Faults: NotFound for an unknown model or version, BadRequest for a reference of no
// known form or a broken file.
func (c *Cache) find(ctx context.Context, ref, version string) (Model, error) {
	version = cmp.Or(version, latest)
	if ref == Image {
		model, ok := resolveImage(version)
		if !ok {
			return Model{}, fault.New(fault.NotFound, "model %s: no version %s; it is built in and has version %s", ref, version, model.Version)
		}
		return model, nil
	}
	base, err := c.folder(ref)
	if err != nil {
		return Model{}, err
	}
	if info, err := os.Stat(base); err != nil || !info.IsDir() {
		return Model{}, fault.New(fault.NotFound, "model %s: there is no folder %s on this host", ref, base)
	}
	model := Model{Ref: ref, Version: "1", Dir: base}
	if _, err := os.Stat(filepath.Join(base, savedmodel.File)); err != nil {
		number, ok := pick(base, version)
		if !ok {
			return Model{}, fault.New(fault.NotFound, "model %s: %s holds no %s and no folder of version %s with one", ref, base, savedmodel.File, version)
		}
		model.Version, model.Dir = number, filepath.Join(base, number)
	} else if version != latest && version != model.Version {
		return Model{}, fault.New(fault.NotFound, "model %s: no version %s; %s is a SavedModel without versions", ref, version, base)
	}
	saved, err := c.read.model(model.Dir)
	if err != nil {
		return Model{}, err
	}
	if model.Settings, err = readSettings(base); err != nil {
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

// model returns what savedmodel.Read returns.
func (r *readings) model(dir string) (*savedmodel.Model, error) {
	info, err := os.Stat(filepath.Join(dir, savedmodel.File))
	if err != nil {
		return savedmodel.Read(dir) // which says what is wrong
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known, ok := r.known[dir]; ok && known.changed.Equal(info.ModTime()) && known.size == info.Size() {
		return known.model, nil
	}
	model, err := savedmodel.Read(dir)
	if err != nil {
		return nil, err
	}
	if r.known == nil {
		r.known = map[string]reading{}
	}
	r.known[dir] = reading{changed: info.ModTime(), size: info.Size(), model: model}
	return model, nil
}

// folder returns where the SavedModel of a reference, or the folder of its versions, has to be.
func (c *Cache) folder(ref string) (string, error) {
	root := c.options.ModelRoot
	scheme, _, hasScheme := strings.Cut(ref, ":")
	switch {
	case filepath.IsAbs(ref):
		return filepath.Clean(ref), nil
	case hasScheme && scheme == "file":
		uri, err := url.Parse(ref)
		if err != nil || uri.Host != "" || !filepath.IsAbs(uri.Path) {
			return "", fault.New(fault.BadRequest, "model %q: want file:///absolute/path", ref)
		}
		return filepath.Clean(uri.Path), nil
	case hasScheme && scheme == "sha256":
		return c.pushed(ref)
	case hasScheme:
		return "", fault.New(fault.BadRequest, "model %q: this server reads file: URIs, absolute paths, sha256: digests of pushed models and names below its model-root", ref)
	case root == "":
		return "", fault.New(fault.NotFound, "model %q: this server has no model-root to look up names in; set --model-root or give a path", ref)
	case ref == "." || !filepath.IsLocal(ref) || strings.ContainsRune(ref, filepath.Separator):
		return "", fault.New(fault.BadRequest, "model %q: a name is one folder below the model-root", ref)
	}
	return filepath.Join(root, ref), nil
}

// pick returns the numbered folder to use: the one asked for, or the highest.
func pick(base, version string) (string, bool) {
	if version != latest {
		if _, err := strconv.ParseUint(version, 10, 63); err != nil {
			return "", false
		}
		_, err := os.Stat(filepath.Join(base, version, savedmodel.File))
		return version, err == nil
	}
	list := versions(base)
	if len(list) == 0 {
		return "", false
	}
	return list[len(list)-1], true
}

// versions lists the numbered folders below base that hold a SavedModel, by number.
func versions(base string) []string {
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	numbers := map[string]uint64{}
	for _, entry := range entries {
		number, err := strconv.ParseUint(entry.Name(), 10, 63)
		if err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(base, entry.Name(), savedmodel.File)); err == nil {
			numbers[entry.Name()] = number
		}
	}
	return slices.SortedFunc(maps.Keys(numbers), func(a, b string) int {
		return cmp.Or(cmp.Compare(numbers[a], numbers[b]), strings.Compare(b, a)) // of 1 and 01 the first is "1"
	})
}
