// Finding a model: from a reference to a folder, its version, settings and signatures.

package repository

import (
	"cmp"
	"context"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// Options are what a Repository needs.
type Options struct {
	ModelRoot    string        // folder or URI in which names are looked up; "" for none
	CacheDir     string        // for fetched and pushed models; made when the first arrives
	CacheBytes   int64         // bound on the models in CacheDir, above which unused ones are removed; 0 is no bound
	PollInterval time.Duration // how old a listing of a store may be; 0 is any age
	OpLibraries  []string      // files and folders of custom operations that models may load
	Quiet        time.Duration // how long a version must stay the same before it is used; a second if 0
	Log          *zap.Logger
}

// Repository finds models in folders and in stores, and keeps those that were fetched or pushed. Its methods are safe
// for concurrent use.
type Repository struct {
	options Options
	ctx     context.Context // ends when the Repository closes
	stop    context.CancelFunc
	mu      sync.Mutex     // held while work begins, and while Close ends ctx
	working sync.WaitGroup // fetches, digests, pushes and collections

	reserve func(ctx context.Context, bytes int64) error // see ReserveWith; nil grants all

	reading   shared[*savedmodel.Model] // by folder and stamp
	readings  memo[reading]             // by folder
	seen      sightings
	stores    stores
	fetches   shared[string] // digests, by URI and stamp
	origins   memo[string]   // digests, by path of the note
	digesting shared[string]
	digests   memo[string] // by folder and stamp
	verified  memo[bool]   // digests of models in the cache-dir whose files this process has hashed

	collecting atomic.Bool // a collection was started and has not begun
	collected  sync.Mutex  // held during a collection
}

// New returns a repository. It removes what dead fronts left in the cache-dir.
func New(options Options) *Repository {
	ctx, stop := context.WithCancel(context.Background())
	options.Quiet = cmp.Or(options.Quiet, quiet)
	r := &Repository{options: options, ctx: ctx, stop: stop}
	r.sweep()
	r.collectSoon()
	return r
}

// ErrClosing is the fault of all requests to a server that is ending.
var ErrClosing = fault.New(fault.Unavailable, "this server is ending; connect to another")

// begin registers work that Close has to await; the work calls working.Done at its end. It returns false if the
// repository is closing.
func (r *Repository) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx.Err() != nil {
		return false
	}
	r.working.Add(1)
	return true
}

// Close ends what runs on goroutines of the Repository and awaits it. It also awaits pushes, which end with their
// callers' streams.
func (r *Repository) Close() {
	r.mu.Lock()
	r.stop()
	r.mu.Unlock()
	r.working.Wait()
	r.stores.close()
}

// Model is a reference that was resolved to a folder.
type Model struct {
	Ref     string // as the caller wrote it
	Version string // the number of the folder, "1" where a SavedModel has no numbered folder
	Dir     string // absolute folder of the SavedModel, "" for the built-in model
	Base    string // what the reference names: an absolute folder or a URI, "" for the built-in model
	// fingerprint of the version's files, which changes when any of them does; "" for the built-in model
	Stamp    string
	Digest   string // of the files, "" until it is known
	Saved    *savedmodel.Model
	Settings Settings // of the model's owner
}

// Latest asks for the highest version.
const Latest = "latest"

// Find returns the model that a reference names now. Latest is the highest version that has settled. If none has
// settled yet, or the requested version has not, Find waits for some seconds. A version in a store is fetched. Its
// faults are those of modelcache.Cache.Resolve.
func (r *Repository) Find(ctx context.Context, ref, version string) (Model, error) {
	return r.lookUp(ctx, ref, version, true)
}

// lookUp is Find; without wait it neither waits for a version nor marks a cached model as used.
func (r *Repository) lookUp(ctx context.Context, ref, version string, wait bool) (Model, error) {
	version = cmp.Or(version, Latest)
	if ref == protocol.Image {
		model, ok := resolveImage(version)
		if !ok {
			return Model{}, fault.New(fault.NotFound, "model %s: no version %s; it is built in and has version %s", ref,
				version, model.Version)
		}
		return model, nil
	}
	base, at, err := r.locate(ref)
	if err != nil {
		return Model{}, err
	}
	if at != nil {
		return r.findRemote(ctx, ref, version, *at, wait)
	}
	model, now, err := r.findLocal(ctx, ref, version, base, wait)
	if err != nil {
		return Model{}, err
	}
	if filepath.Dir(base) == r.models() {
		if model.Digest, now = "sha256:"+filepath.Base(base), (snapshot{}); wait { // the files of a digest never change
			if err := r.verify(ctx, model.Digest); err != nil {
				return Model{}, err
			}
			r.touch(base)
		}
	}
	if model.Settings, err = readSettings(ctx, base); err != nil {
		return Model{}, err
	}
	return r.withSaved(ctx, model, now)
}

// locate returns where the SavedModel of a reference, or the folder of its versions, has to be: a folder, or a place in
// a store.
func (r *Repository) locate(ref string) (string, *location, error) {
	root := r.options.ModelRoot
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
		dir, err := r.pushed(ref)
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
		return "", nil, fault.New(fault.BadRequest, "model %q: this server reads %s, absolute paths, sha256: digests "+
			"of pushed models and names below its model-root", ref, knownSchemes)
	case root == "":
		return "", nil, fault.New(fault.NotFound, "model %q: this server has no model-root to look up names in; set "+
			"--model-root or give a path", ref)
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

// findLocal is lookUp for a folder, without the model's settings and signatures. It also returns how the files look.
func (r *Repository) findLocal(
	ctx context.Context, ref, version, base string, wait bool,
) (model Model, now snapshot, err error) {
	if info, err := os.Stat(base); err != nil || !info.IsDir() {
		return model, now, fault.New(fault.NotFound, "model %s: there is no folder %s on this host", ref, base)
	}
	model = Model{Ref: ref, Version: "1", Dir: base, Base: base}
	if _, err := os.Stat(filepath.Join(base, savedmodel.File)); err == nil {
		if version != Latest && version != model.Version {
			return model, now, fault.New(fault.NotFound, "model %s: no version %s; %s is a SavedModel without versions",
				ref, version, base)
		}
		if now, err = scan(base); err != nil {
			return model, now, fault.New(fault.BadRequest, "model %s: %w", ref, err)
		}
		model.Stamp = now.stamp
		return model, now, nil
	}
	number, now, err := await(ctx, ref, version, wait, func(int) ([]candidate, error) { return r.local(base), nil })
	switch {
	case err != nil:
	case number == "":
		err = fault.New(fault.NotFound, "model %s: %s holds no %s and no folder of version %s with one", ref, base,
			savedmodel.File, version)
	default:
		model.Version, model.Dir, model.Stamp = number, filepath.Join(base, number), now.stamp
	}
	return model, now, err
}

// choose returns the version that was asked for, or the highest that has settled. It takes no lower version while one
// that had settled is being changed in place. If it finds none, busy names the version to wait for, if any.
func choose(list []candidate, version string) (found candidate, now snapshot, busy string) {
	for _, one := range slices.Backward(list) {
		if version != Latest && version != one.number {
			continue
		}
		now, state := one.look()
		switch {
		case state == settled:
			return one, now, ""
		case state == unsettled:
			return candidate{}, now, one.number
		case state == settling && busy == "":
			busy = one.number
		}
	}
	return candidate{}, snapshot{}, busy
}

// await calls choose. If wait is true, it calls choose again for some seconds while the only version has yet to settle.
// list gets the number of the attempt. The result number is "" if there is no such version.
func await(
	ctx context.Context, ref, version string, wait bool, list func(attempt int) ([]candidate, error),
) (number string, now snapshot, err error) {
	started := time.Now()
	for attempt := 0; ; attempt++ {
		candidates, err := list(attempt)
		if err != nil {
			return "", snapshot{}, err
		}
		found, now, busy := choose(candidates, version)
		switch {
		case found.number != "" || busy == "":
			return found.number, now, nil
		case !wait || time.Since(started) > settleWait:
			return "", snapshot{}, fault.New(fault.Unavailable, "model %s: version %s is incomplete, or has changed "+
				"in the last second; ask again when it has been copied", ref, busy)
		}
		select {
		case <-ctx.Done():
			return "", snapshot{}, ctx.Err()
		case <-time.After(settleTick):
		}
	}
}

// withSaved returns the model with its signatures, as far as its settings let them be served.
func (r *Repository) withSaved(ctx context.Context, model Model, now snapshot) (Model, error) {
	saved, err := r.readSaved(ctx, model.Dir, now)
	if err != nil {
		return Model{}, err
	}
	if model.Saved, err = model.Settings.served(saved); err != nil {
		return Model{}, err
	}
	return model, nil
}

// reading is what saved_model.pb says, as long as the file has this time and size.
type reading struct {
	changed time.Time
	size    int64
	model   *savedmodel.Model
}

// readSaved is savedmodel.Read, once for as long as the file stays as it is in now.
func (r *Repository) readSaved(ctx context.Context, dir string, now snapshot) (*savedmodel.Model, error) {
	graph, _ := now.find(savedmodel.File)
	if known, ok := r.readings.get(dir); ok && known.changed.Equal(graph.changed) && known.size == graph.size {
		return known.model, nil
	}
	model, err := r.readGraph(ctx, dir, now.stamp)
	if err == nil {
		r.readings.put(dir, reading{changed: graph.changed, size: graph.size, model: model})
	}
	return model, err
}

// resolveImage is Find for the built-in model.
func resolveImage(version string) (Model, bool) {
	return Model{Ref: protocol.Image, Version: "1", Saved: protocol.ImageModel}, version == Latest || version == "1"
}
