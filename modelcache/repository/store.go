// The cache-dir: models that were pushed, under their digests.

package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/rundir"
	"flightsvc/internal/savedmodel"
)

// Pushed models lie in <cache-dir>/models/<hex>; a folder of that name is complete. A push unpacks into a folder beside
// them that names this process, so that a later front can see that the process is dead, and remove the folder:
//
//	<cache-dir>/models/<64 hex>/saved_model.pb
//	<cache-dir>/models/.push-<pid>-<start>-<random>/
const pushPattern = ".push-%d-%d-"

func (r *Repository) models() string { return filepath.Join(r.options.CacheDir, "models") }

// pushed returns the folder of a pushed model.
func (r *Repository) pushed(digest string) (string, error) {
	if err := CheckDigest(digest); err != nil {
		return "", err
	}
	if !r.known(digest) {
		return "", fault.New(fault.NotFound, "model %s: it has not been pushed to this host; push its folder with "+
			"DoPut (Client.push in Python)", digest)
	}
	return r.Place(digest), nil
}

// Place returns the folder for the model of a digest in the cache-dir. The model need not be there.
func (r *Repository) Place(digest string) string {
	return filepath.Join(r.models(), strings.TrimPrefix(digest, "sha256:"))
}

// Known reports whether the model of a digest is in the cache-dir, and marks it as used, because the caller is about to
// use it. CheckDigest must accept the digest.
func (r *Repository) Known(digest string) bool {
	r.touch(r.Place(digest))
	return r.known(digest)
}

func (r *Repository) known(digest string) bool {
	_, err := os.Stat(filepath.Join(r.Place(digest), savedmodel.File))
	return err == nil
}

// Push unpacks a plain POSIX tar of a SavedModel's folder and keeps it under its digest. It returns the digest, and
// whether the model was here before. The archive is read once, while it is unpacked; see unpack for what it may hold.
// want is the digest that it must have, "" for any. After an error nothing of it remains.
//
// Faults: BadRequest for what is wrong with the archive, Exhausted where the disk is full, Precondition where the
// cache-dir cannot be used, Unavailable if the repository is closing; an error of the reader stays as it is.
func (r *Repository) Push(ctx context.Context, archive io.Reader, want string) (digest string, known bool, err error) {
	if !r.begin() {
		return "", false, ErrClosing
	}
	defer r.working.Done()

	dir, err := r.beside(pushPattern)
	if err != nil {
		return "", false, r.diskFault(err)
	}
	defer func() {
		if rmErr := os.RemoveAll(dir); rmErr != nil { // it may have been renamed to its digest
			r.options.Log.Warn("folder of a push not removed", zap.Error(rmErr))
		}
	}()
	digest, err = unpack(dir, archive)
	if err != nil {
		return "", false, r.diskFault(err)
	}
	if want != "" && digest != want {
		return "", false, fault.New(fault.BadRequest, "the archive has the digest %s, not %s; it changed while it "+
			"was sent, or was cut", digest, want)
	}
	if err := r.checkGraph(ctx, dir, "the archive's %s cannot be read", savedmodel.File); err != nil {
		return "", false, err
	}
	err = os.Rename(dir, r.Place(digest))
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) { // the model is here already
		r.touch(r.Place(digest))
		return digest, true, nil
	}
	if err != nil {
		return "", false, r.diskFault(err)
	}
	r.verified.put(digest, true)
	r.options.Log.Info("model pushed", zap.String("model", digest))
	r.collectSoon()
	return digest, false, nil
}

// Add keeps a SavedModel that write puts into a folder, and returns its digest. ref names the model in errors. An error
// of write is returned as it is. After any error nothing of the model remains.
func (r *Repository) Add(ctx context.Context, ref string, write func(folder string) error) (digest string, err error) {
	dir, err := r.beside(pushPattern)
	if err != nil {
		return "", r.diskFault(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	out := filepath.Join(dir, "model")
	if err := write(out); err != nil {
		return "", err
	}
	files, err := scan(out)
	if err != nil {
		return "", r.diskFault(err)
	}
	if digest, err = digestOf(ctx, Model{Ref: ref, Dir: out, Stamp: files.stamp}); err != nil {
		return "", err
	}
	if err := r.keep(out, digest); err != nil {
		return "", r.diskFault(err)
	}
	r.collectSoon()
	return digest, nil
}

// beside makes a folder among the models, with the name of this process in it.
func (r *Repository) beside(pattern string) (string, error) {
	if err := r.checkPrivate(); err != nil {
		return "", err
	}
	self, err := rundir.Of(os.Getpid())
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(r.models(), fmt.Sprintf(pattern, self.PID, self.Start))
}

// checkPrivate refuses a cache-dir in which another user could replace models. It makes the folders if need be.
func (r *Repository) checkPrivate() error {
	for _, folder := range []string{r.options.CacheDir, r.models()} {
		if err := rundir.Ensure(folder); err != nil {
			return fault.New(fault.Precondition, "cache-dir: %w", err)
		}
	}
	return nil
}

// verify hashes the files of a model in the cache-dir, once in this process: before, anything that can write there may
// have changed them. A model whose files are not those of its digest is removed. The fault is then Unavailable, or
// Precondition if the model cannot be removed.
func (r *Repository) verify(ctx context.Context, digest string) error {
	if _, ok := r.verified.get(digest); ok {
		return nil
	}
	_, err := r.digesting.do(ctx, r, digest, func(ctx context.Context) (string, error) {
		if err := r.checkPrivate(); err != nil {
			return "", err
		}
		dir := r.Place(digest)
		files, err := scan(dir)
		if err != nil {
			return "", fault.New(fault.Precondition, "model %s: %w", digest, err)
		}
		found, err := digestOf(ctx, Model{Ref: digest, Version: "1", Dir: dir, Stamp: files.stamp})
		if err == nil && found != digest {
			r.readings.drop(dir)
			removeErr := r.remove(filepath.Base(dir)) // runners that have loaded it continue
			r.options.Log.Error("a model in the cache-dir was changed and is not used", zap.String("model", digest),
				zap.String("digest of its files", found), zap.NamedError("not removed", removeErr))
			if removeErr != nil {
				return "", fault.New(fault.Precondition, "model %s: its files in the cache-dir were changed and "+
					"cannot be removed: %w; remove %s", digest, removeErr, dir)
			}
			err = fault.New(fault.Unavailable, "model %s: its files in the cache-dir were changed, so they were "+
				"removed; ask again, and push its folder again if it was pushed", digest)
		}
		if err == nil {
			r.verified.put(digest, true)
		}
		return found, err
	})
	return err
}

// diskFault makes a fault of an error of the file system, and returns any other error as it is.
func (r *Repository) diskFault(err error) error {
	var number syscall.Errno
	switch {
	case !errors.As(err, &number):
		return err
	case number == syscall.ENOSPC || number == syscall.EDQUOT:
		return fault.New(fault.Exhausted, "cache-dir %s has no space left for this model; free some, or set "+
			"cache-dir to a larger file system", r.options.CacheDir)
	}
	if _, ok := fault.KindOf(err); ok {
		return err
	}
	return fault.New(fault.Precondition, "cache-dir %s cannot be written (%w); set cache-dir to another place",
		r.options.CacheDir, number)
}
