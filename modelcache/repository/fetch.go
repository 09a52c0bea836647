// Fetching: a version in a store is copied to this host, once for all callers.

package repository

import (
	"bytes"
	"context"
	"crypto/md5" //nolint:gosec // stores give MD5 sums to check transfers
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"os"
	"path"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"flightsvc/internal/config"
	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
	"flightsvc/internal/rundir"
	"flightsvc/internal/savedmodel"
)

// A version in a store is fetched once per host: into a folder beside the models that is named after this process, and
// renamed to its digest when it is complete. An origin says what was fetched from where, so that no other front fetches
// it again:
//
//	<cache-dir>/models/.fetch-<pid>-<start>-<random>/
//	<cache-dir>/origins/<64 hex>.json   the name is the SHA-256 of URI and stamp
//	<cache-dir>/fetch.lock              empty, never removed; each fetch under way locks one byte of it
const fetchPattern = ".fetch-%d-%d-"

const (
	downloads     = 4                      // files of one fetch that are transferred at once
	readAttempts  = 3                      // tries for an object whose transfer breaks off
	readPause     = 200 * time.Millisecond // half the pause before the second try; it doubles before each further one
	progressEvery = 5 * time.Second        // between two lines of the log
	lockTick      = 50 * time.Millisecond  // between two tries for a lock
	maxNote       = 64 << 10               // bytes of an origin's file
)

// origin is the content of a file that says which model was fetched from a place.
type origin struct {
	Digest string `json:"digest"`
	URI    string `json:"uri"`
}

func (r *Repository) originPath(uri, stamp string) string {
	sum := sha256.Sum256([]byte(uri + "\n" + stamp))
	return filepath.Join(r.options.CacheDir, "origins", hex.EncodeToString(sum[:])+".json")
}

// fetched returns the digest of a version in a store, false if it is not on this host.
func (r *Repository) fetched(uri, stamp string) (string, bool) {
	name := r.originPath(uri, stamp)
	if digest, ok := r.origins.get(name); ok && r.known(digest) {
		return digest, true
	}
	var known origin
	text, err := regular.Read(r.ctx, name, maxNote)
	if err != nil || json.Unmarshal(text, &known) != nil || CheckDigest(known.Digest) != nil || !r.known(known.Digest) {
		return "", false
	}
	r.origins.put(name, known.Digest)
	return known.Digest, true
}

// fetch copies a version to this host, unless it is here, and returns its digest. Callers share one transfer, which
// stops when the last of them leaves; other fronts of this host wait for it.
func (r *Repository) fetch(ctx context.Context, ref, number string, at location, now snapshot) (string, error) {
	digest, ok := r.fetched(at.uri, now.stamp)
	if !ok {
		var err error
		digest, err = r.fetches.do(ctx, r, at.uri+"\n"+now.stamp, func(ctx context.Context) (string, error) {
			unlock, err := r.lockFetch(ctx, at.uri+"\n"+now.stamp)
			if err != nil {
				return "", err
			}
			defer unlock()
			if digest, ok := r.fetched(at.uri, now.stamp); ok {
				return digest, nil
			}
			return r.download(ctx, ref, number, at, now)
		})
		if err != nil {
			return "", err
		}
	}
	if err := r.verify(ctx, digest); err != nil {
		return "", err
	}
	r.touch(r.Place(digest))
	return digest, nil
}

// lockFetch waits until no other process fetches what key stands for, and keeps others from it until unlock is called.
// The lock is on one byte of a file that all fronts share (an open file description lock, see fcntl(2)): it ends with
// the process, so nothing is left to clear up.
func (r *Repository) lockFetch(ctx context.Context, key string) (unlock func(), err error) {
	if err := r.checkPrivate(); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(r.options.CacheDir, "fetch.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, r.diskFault(err)
	}
	sum := fnv.New64a()
	_, _ = io.WriteString(sum, key)
	for {
		one := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(sum.Sum64() >> 2), Len: 1}
		err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &one)
		if err == nil {
			return func() { _ = lock.Close() }, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			_ = lock.Close()
			return nil, r.diskFault(err)
		}
		select {
		case <-ctx.Done():
			_ = lock.Close()
			return nil, ctx.Err()
		case <-time.After(lockTick):
		}
	}
}

// transfer is one fetch under way.
type transfer struct {
	r      *Repository
	ref    string
	at     location
	bucket *blob.Bucket
	root   *os.Root
	done   atomic.Int64 // bytes so far
}

// download fetches a version and keeps it under its digest. After an error nothing of it remains.
func (r *Repository) download(ctx context.Context, ref, number string, at location, now snapshot) (string, error) {
	bucket, err := r.stores.open(ctx, at)
	if err != nil {
		return "", storeFault(ref, at, err)
	}
	dir, err := r.beside(fetchPattern)
	if err != nil {
		return "", r.diskFault(err)
	}
	defer func() {
		if rmErr := os.RemoveAll(dir); rmErr != nil { // keep may have renamed it
			r.options.Log.Warn("folder of a fetch not removed", zap.Error(rmErr))
		}
	}()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", r.diskFault(err)
	}
	defer func() { _ = root.Close() }()
	log := r.options.Log.With(zap.String("model", ref), zap.String("version", number), zap.String("uri", at.uri))
	log.Info("model being fetched", zap.Stringer("size", config.Bytes(now.size())))
	started := time.Now()
	t := &transfer{r: r, ref: ref, at: at, bucket: bucket, root: root}
	files, err := t.run(ctx, now, log)
	if err != nil {
		return "", fetchFault(ref, number, err)
	}
	again, err := r.list(ctx, at)
	switch {
	case err != nil:
		return "", storeFault(ref, at, err)
	case again.plain == nil || again.plain.stamp != now.stamp:
		return "", fault.New(fault.Unavailable, "model %s: version %s at %s changed while it was fetched; ask again",
			ref, number, at.name)
	}
	err = r.checkGraph(ctx, dir, "model %s: %s of version %s at %s cannot be read",
		ref, savedmodel.File, number, at.name)
	if err != nil {
		return "", err
	}
	digest := files.digest()
	if err := r.keep(dir, digest); err != nil {
		return "", r.diskFault(err)
	}
	if err := r.remember(at.uri, now.stamp, digest); err != nil {
		log.Warn("origin of a fetched model not written; another front may fetch it again", zap.Error(err))
	}
	log.Info("model fetched", zap.String("digest", digest), zap.Stringer("size", config.Bytes(now.size())),
		zap.Duration("fetch_time", time.Since(started)))
	r.collectSoon()
	return digest, nil
}

// keep renames a complete folder beside the models to its digest. If that model is here already, the folder stays as it
// is.
func (r *Repository) keep(dir, digest string) error {
	err := os.Rename(dir, r.Place(digest))
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) { // pushed, or fetched from elsewhere
		return nil
	}
	if err == nil {
		r.verified.put(digest, true)
	}
	return err
}

// remember records where a model came from, in memory and in an origin.
func (r *Repository) remember(uri, stamp, digest string) error {
	name := r.originPath(uri, stamp)
	r.origins.put(name, digest)
	text, err := json.Marshal(origin{Digest: digest, URI: uri})
	if err != nil {
		return err
	}
	return ReplaceFile(name, ".origin-", append(text, '\n'))
}

// ReplaceFile writes a file in one step, by renaming a file whose name begins with temporary. The folder is made if
// need be, and has to be private.
func ReplaceFile(name, temporary string, text []byte) error {
	if err := rundir.Ensure(filepath.Dir(name)); err != nil {
		return fmt.Errorf("cache-dir: %w", err)
	}
	file, err := os.CreateTemp(filepath.Dir(name), temporary)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), name)
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
	return err
}

// run transfers all files, at most downloads at a time, and logs its progress every few seconds.
func (t *transfer) run(ctx context.Context, now snapshot, log *zap.Logger) (contents, error) {
	files := make(contents, len(now.files))
	group, ctx := errgroup.WithContext(ctx)
	over := make(chan struct{})
	group.SetLimit(downloads + 1) // one more for the goroutine that logs
	group.Go(func() error {
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-over:
				return nil
			case <-ctx.Done():
				return nil
			case <-tick.C:
				log.Info("model being fetched", zap.Stringer("done", config.Bytes(t.done.Load())),
					zap.Stringer("size", config.Bytes(now.size())))
			}
		}
	})
	var left atomic.Int64
	left.Store(int64(len(now.files)))
	for i, one := range now.files {
		group.Go(func() (err error) {
			files[i], err = t.file(ctx, one)
			if left.Add(-1) == 0 {
				close(over)
			}
			return err
		})
	}
	return files, group.Wait()
}

// errDisk marks an error of the host's disk, because errors of the network look alike.
type errDisk struct{ error }

func (e errDisk) Unwrap() error { return e.error }

// file transfers one object.
func (t *transfer) file(ctx context.Context, about file) (listed, error) {
	name := about.path
	err := checkName(name, about.size) // the same bounds as in an archive
	if err == nil && (path.Clean(name) != name || name == ".") {
		err = fmt.Errorf("the name %q is not plain", name)
	}
	if err != nil {
		return listed{}, fault.New(fault.Precondition, "the store holds an object that cannot be a model's file: %w; "+
			"rename it", err)
	}
	if folder := path.Dir(name); folder != "." {
		if err := t.root.MkdirAll(folder, 0o700); err != nil {
			return listed{}, t.r.diskFault(err)
		}
	}
	out, err := t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return listed{}, t.r.diskFault(err)
	}
	sum, plain := sha256.New(), md5.New() //nolint:gosec // see the import
	err = t.read(ctx, about, out, sum, plain)
	if closeErr := out.Close(); err == nil && closeErr != nil {
		err = t.r.diskFault(closeErr)
	}
	if err == nil && about.md5 != nil && !bytes.Equal(plain.Sum(nil), about.md5) && !t.otherTags() {
		err = t.second(ctx, about, sum.Sum(nil))
	}
	return listed{path: name, size: about.size, sum: [sha256.Size]byte(sum.Sum(nil))}, err
}

// otherTags reports whether the checksums of this bucket are known not to be the content's MD5: those of S3 are not for
// objects that are encrypted with KMS keys.
func (t *transfer) otherTags() bool {
	s := &t.r.stores
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.otherTag[t.at.bucket]
}

// second reads an object again whose MD5 is not the store's checksum. If its content is the same twice, the store's
// checksums are no MD5 sums, which is remembered for the bucket.
func (t *transfer) second(ctx context.Context, about file, first []byte) error {
	sum := sha256.New()
	if err := t.read(ctx, about, io.Discard, sum, md5.New()); err != nil { //nolint:gosec // see the import
		return err
	}
	if !bytes.Equal(sum.Sum(nil), first) {
		return fault.New(fault.Unavailable, "%s arrived damaged: its checksum differs from the store's", about.path)
	}
	s := &t.r.stores
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.otherTag == nil {
		s.otherTag = map[string]bool{}
	}
	s.otherTag[t.at.bucket] = true
	return nil
}

// read copies an object to out and sums. A transfer that breaks off is continued, in readAttempts tries altogether.
func (t *transfer) read(ctx context.Context, about file, out io.Writer, sums ...hash.Hash) error {
	sinks := make([]io.Writer, 0, 3)
	for _, sum := range sums {
		sinks = append(sinks, sum)
	}
	hashes, buffer := io.MultiWriter(sinks...), make([]byte, 1<<20)
	var offset int64
	for attempt := 1; ; attempt++ {
		n, err := t.part(ctx, about, offset, out, hashes, buffer)
		offset += n
		var disk errDisk
		switch {
		case errors.As(err, &disk):
			return t.r.diskFault(disk.error)
		case err == nil && offset == about.size:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case gcerrors.Code(err) == gcerrors.NotFound:
			return fault.New(fault.Unavailable,
				"%s has disappeared, so the version is being changed; ask again", about.path)
		case offset > about.size || err == nil:
			return fault.New(fault.Unavailable, "%s has %d bytes, and the store said %d; ask again",
				about.path, offset, about.size)
		case attempt >= readAttempts:
			return fault.New(fault.Unavailable, "the transfer of %s broke off after %d of %d bytes (%w), %d times; "+
				"ask again, and check the network if it happens again",
				about.path, offset, about.size, rootOf(err), attempt)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(readPause << attempt):
		}
	}
}

// part copies an object from offset on, and returns how many bytes came, even with an error.
func (t *transfer) part(
	ctx context.Context, about file, offset int64, out, hashes io.Writer, buffer []byte,
) (n int64, err error) {
	in, err := t.bucket.NewRangeReader(ctx, t.at.prefix+about.path, offset, -1, nil)
	if err != nil {
		return 0, err
	}
	defer func() { _ = in.Close() }()
	for {
		got, err := in.Read(buffer)
		if _, writeErr := out.Write(buffer[:got]); writeErr != nil {
			return n, errDisk{writeErr}
		}
		_, _ = hashes.Write(buffer[:got]) // never fails
		n += int64(got)
		t.done.Add(int64(got))
		if err == io.EOF && offset+n < about.size {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// fetchFault adds to the fault of a transfer which model and version it was for.
func fetchFault(ref, number string, err error) error {
	if kind, ok := fault.KindOf(err); ok {
		return fault.New(kind, "model %s: version %s cannot be fetched: %w", ref, number, err)
	}
	return err
}
