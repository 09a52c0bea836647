// Collection: which models of the cache-dir go when they are too many, and what keeps one there.

package repository

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"flightsvc/internal/config"
	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
	"flightsvc/internal/rundir"
)

// Models in the cache-dir that nobody uses go when they are more than cache-size together, those used longest ago
// first. A model in use is one whose folder somebody has locked (flock(2), shared, on the folder itself: it ends with
// its process); the modification time of the folder says when it was used last.
const (
	gonePattern = ".gone-%d-%d-"
	justUsed    = time.Minute      // in which a model that was found must be held, or may go
	touchEvery  = 10 * time.Second // how exact the time of the last use is
	staleFile   = time.Hour        // age of a temporary file that nobody finishes
)

// Hold keeps a model of the cache-dir where it is until release is called, which must be once. For any other folder it
// does nothing. Its fault is Unavailable where the model has just gone: find it again.
func (r *Repository) Hold(ctx context.Context, model Model) (release func(), err error) {
	if filepath.Dir(model.Dir) != r.models() {
		return func() {}, nil
	}
	if err := r.verify(ctx, "sha256:"+filepath.Base(model.Dir)); err != nil {
		return nil, err
	}
	folder, err := os.Open(model.Dir)
	if err != nil {
		return nil, errGone(model)
	}
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil || !isStill(folder, model.Dir) {
		_ = folder.Close() // the collector has it
		return nil, errGone(model)
	}
	r.touch(model.Dir)
	return func() { _ = folder.Close() }, nil
}

func errGone(model Model) error {
	return fault.New(fault.Unavailable, "model %s: its files have just been removed from the cache-dir; ask again",
		model.Ref)
}

// isStill reports whether a path names the open folder.
func isStill(folder *os.File, path string) bool {
	ours, err := folder.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(ours, now)
}

// touch notes that a model of the cache-dir is used.
func (r *Repository) touch(dir string) {
	now := time.Now()
	if info, err := os.Stat(dir); err == nil && now.Sub(info.ModTime()) > touchEvery {
		_ = os.Chtimes(dir, now, now) // at worst it goes too early
	}
}

// collectSoon collects on a goroutine of the cache; of several calls at once one is enough.
func (r *Repository) collectSoon() {
	if r.options.CacheBytes == 0 || r.collecting.Swap(true) || !r.begin() {
		return
	}
	go func() {
		defer r.working.Done()
		r.collected.Lock()
		defer r.collected.Unlock()
		r.collecting.Store(false) // whoever asks from now on may have brought something that this one does not see
		r.collect(time.Now())
	}()
}

// cached is a model in the cache-dir.
type cached struct {
	name  string
	bytes int64
	used  time.Time
}

// collect removes models until they fit, and then what is known of the origin of models that are gone.
func (r *Repository) collect(now time.Time) {
	entries, err := os.ReadDir(r.models())
	if err != nil {
		return // there is none yet
	}
	var list []cached
	var total int64
	for _, entry := range entries {
		if CheckDigest("sha256:"+entry.Name()) != nil {
			continue
		}
		info, err := entry.Info()
		if err != nil {
			continue
		}
		files, err := scan(filepath.Join(r.models(), entry.Name()))
		if err != nil {
			continue
		}
		list = append(list, cached{name: entry.Name(), bytes: files.size(), used: info.ModTime()})
		total += files.size()
	}
	slices.SortFunc(list, func(a, b cached) int {
		return cmp.Or(a.used.Compare(b.used),
			strings.Compare(a.name, b.name))
	})
	for _, one := range list {
		if total <= r.options.CacheBytes || r.ctx.Err() != nil || now.Sub(one.used) < justUsed {
			break
		}
		removed, err := r.discard(one.name)
		switch {
		case err != nil:
			r.options.Log.Warn("cached model not removed", zap.String("model", "sha256:"+one.name), zap.Error(err))
		case removed:
			total -= one.bytes
			r.options.Log.Info("cached model removed for space (cache-size)", zap.String("model", "sha256:"+one.name),
				zap.Stringer("size", config.Bytes(one.bytes)), zap.Time("last_used", one.used))
		}
	}
	r.forgetOrigins()
}

// discard removes a model, unless somebody holds it.
func (r *Repository) discard(name string) (bool, error) {
	path := filepath.Join(r.models(), name)
	folder, err := os.Open(path) //nolint:gosec // in the cache-dir
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // another front was first
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = folder.Close() }() // and with it the lock
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil || !isStill(folder, path) {
		return false, nil
	}
	if err := r.remove(name); err != nil {
		return false, err
	}
	return true, nil
}

// remove removes a model, even one that somebody holds: what has loaded it goes on.
func (r *Repository) remove(name string) error {
	aside, err := r.beside(gonePattern)
	if err != nil {
		return err
	}
	err = os.Rename(filepath.Join(r.models(), name), filepath.Join(aside, name)) // from now on nobody finds it
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // another front was first
	}
	return errors.Join(err, os.RemoveAll(aside))
}

// forgetOrigins removes the notes about models that are not here any more.
func (r *Repository) forgetOrigins() {
	folder := filepath.Join(r.options.CacheDir, "origins")
	entries, _ := os.ReadDir(folder)
	for _, entry := range entries {
		name := filepath.Join(folder, entry.Name())
		var known origin
		text, err := regular.Read(r.ctx, name, maxNote)
		if err != nil || !strings.HasSuffix(name, ".json") || json.Unmarshal(text, &known) == nil &&
			r.known(known.Digest) {
			continue
		}
		_ = os.Remove(name) // a fetch that ends just now is noted in memory
		r.origins.drop(name)
	}
}

// sweep removes what processes that are dead were bringing or removing.
func (r *Repository) sweep() {
	entries, _ := os.ReadDir(r.models()) // where there is none, the first push says what is wrong
	for _, entry := range entries {
		for _, pattern := range []string{pushPattern, fetchPattern, gonePattern} {
			var owner rundir.Process
			if _, err := fmt.Sscanf(entry.Name(), pattern, &owner.PID, &owner.Start); err != nil || owner.Alive() {
				continue
			}
			if err := os.RemoveAll(filepath.Join(r.models(), entry.Name())); err != nil {
				r.options.Log.Warn("leavings of a dead front not cleared away", zap.Error(err))
			}
		}
	}
	for folder, temporary := range map[string]string{"profiles": ".profile-", "origins": ".origin-"} {
		entries, _ := os.ReadDir(filepath.Join(r.options.CacheDir, folder))
		for _, entry := range entries {
			info, err := entry.Info()
			if err == nil && strings.HasPrefix(entry.Name(), temporary) && time.Since(info.ModTime()) > staleFile {
				_ = os.Remove(filepath.Join(r.options.CacheDir, folder, entry.Name()))
			}
		}
	}
}
