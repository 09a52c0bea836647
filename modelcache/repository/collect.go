// Collection: models of the cache-dir are removed when they exceed cache-size, except those that a process holds.

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

// When the models in the cache-dir exceed cache-size together, unused ones are removed, those used longest ago first. A
// process that uses a model holds a shared flock(2) on the model's folder, which ends with the process at the latest.
// The modification time of the folder is the time of the last use.
const (
	gonePattern = ".gone-%d-%d-"
	justUsed    = time.Minute      // a model used more recently stays, because its caller has yet to Hold it
	touchEvery  = 10 * time.Second // how exact the time of the last use is
	staleFile   = time.Hour        // age from which a temporary file counts as abandoned
)

// Hold keeps a model in the cache-dir from being removed until release is called, which must be once. For any other
// folder it does nothing. Its fault is Unavailable if the model has just been removed: find it again.
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
		_ = folder.Close() // a collection is removing it
		return nil, errGone(model)
	}
	r.touch(model.Dir)
	return func() { _ = folder.Close() }, nil
}

func errGone(model Model) error {
	return fault.New(fault.Unavailable,
		"model %s: its files have just been removed from the cache-dir; ask again", model.Ref)
}

// isStill reports whether path still names the open folder.
func isStill(folder *os.File, path string) bool {
	ours, err := folder.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(ours, now)
}

// touch records that a model in the cache-dir is used now.
func (r *Repository) touch(dir string) {
	now := time.Now()
	if info, err := os.Stat(dir); err == nil && now.Sub(info.ModTime()) > touchEvery {
		_ = os.Chtimes(dir, now, now) // if it fails, the model may be removed too early
	}
}

// collectSoon starts a collection on a goroutine of the Repository. Calls share one collection until it begins.
func (r *Repository) collectSoon() {
	if r.options.CacheBytes == 0 || r.collecting.Swap(true) || !r.begin() {
		return
	}
	go func() {
		defer r.working.Done()
		r.collected.Lock()
		defer r.collected.Unlock()
		r.collecting.Store(false) // a later call may have added a model that this collection does not see
		r.collect(time.Now())
	}()
}

// cached is a model in the cache-dir.
type cached struct {
	name  string
	bytes int64
	used  time.Time
}

// collect removes unused models until the others fit into cache-size, then the origins of removed models.
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
		return cmp.Or(a.used.Compare(b.used), strings.Compare(a.name, b.name))
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

// discard removes a model, unless a process holds it, and reports whether it is gone.
func (r *Repository) discard(name string) (bool, error) {
	path := filepath.Join(r.models(), name)
	folder, err := os.Open(path) //nolint:gosec // in the cache-dir
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // another front was first
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = folder.Close() }() // this releases the lock, too
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil || !isStill(folder, path) {
		return false, nil
	}
	if err := r.remove(name); err != nil {
		return false, err
	}
	return true, nil
}

// remove removes a model, even one that a process holds: runners that have loaded it continue.
func (r *Repository) remove(name string) error {
	aside, err := r.beside(gonePattern)
	if err != nil {
		return err
	}
	err = os.Rename(filepath.Join(r.models(), name), filepath.Join(aside, name)) // from now on no caller finds it
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // another front was first
	}
	return errors.Join(err, os.RemoveAll(aside))
}

// forgetOrigins removes the origins of models that are no longer here.
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
		_ = os.Remove(name) // at worst a fetch that ends just now is made again
		r.origins.drop(name)
	}
}

// sweep removes the unfinished folders and temporary files of dead processes.
func (r *Repository) sweep() {
	entries, _ := os.ReadDir(r.models()) // if it cannot be read, the first push says why
	for _, entry := range entries {
		for _, pattern := range []string{pushPattern, fetchPattern, gonePattern} {
			var owner rundir.Process
			if _, err := fmt.Sscanf(entry.Name(), pattern, &owner.PID, &owner.Start); err != nil || owner.Alive() {
				continue
			}
			if err := os.RemoveAll(filepath.Join(r.models(), entry.Name())); err != nil {
				r.options.Log.Warn("folder of a dead front not removed", zap.Error(err))
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
