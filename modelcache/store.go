package modelcache

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/rundir"
	"flightsvc/internal/savedmodel"
)

// Pushed models lie in <cache-dir>/models/<hex>, each complete from the moment that it has its name. A push
// unpacks beside them, into a folder with the name of this process, which a later front can tell is dead:
//
//	<cache-dir>/models/<64 hex>/saved_model.pb
//	<cache-dir>/models/.push-<pid>-<start>-<random>/
const pushPattern = ".push-%d-%d-"

// digestForm is how a digest is written: in references, in commands, in answers.
var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// CheckDigest refuses text that is not sha256: and 64 hexadecimal digits.
func CheckDigest(digest string) error {
	if !digestForm.MatchString(digest) {
		return fault.New(fault.BadRequest, "%.80q is no digest; want sha256: and 64 lower-case hexadecimal digits", digest)
	}
	return nil
}

// contents are what a digest is made of: the regular files of a folder.
type contents []listed

type listed struct {
	path string // relative, with /
	size int64
	sum  [sha256.Size]byte
}

// digest returns "sha256:" and the SHA-256 over lines "<path> <size> <sha256>\n" of all files, sorted by the
// bytes of their paths.
func (l contents) digest() string {
	slices.SortFunc(l, func(a, b listed) int { return strings.Compare(a.path, b.path) })
	sum := sha256.New()
	for _, file := range l {
		_, _ = fmt.Fprintf(sum, "%s %d %x\n", file.path, file.size, file.sum) // a hash takes all
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil))
}

func (c *Cache) models() string { return filepath.Join(c.options.CacheDir, "models") }

// pushed returns the folder of a pushed model.
func (c *Cache) pushed(digest string) (string, error) {
	if err := CheckDigest(digest); err != nil {
		return "", err
	}
	if !c.known(digest) {
		return "", fault.New(fault.NotFound, "model %s: it has not been pushed to this host; push its folder with DoPut (Client.push in Python)", digest)
	}
	return c.place(digest), nil
}

func (c *Cache) place(digest string) string {
	return filepath.Join(c.models(), strings.TrimPrefix(digest, "sha256:"))
}

// Known reports whether the model of a digest, which CheckDigest takes, lies on this host; whoever asks is about to
// use it.
func (c *Cache) Known(digest string) bool {
	c.touch(c.place(digest))
	return c.known(digest)
}

func (c *Cache) known(digest string) bool {
	_, err := os.Stat(filepath.Join(c.place(digest), savedmodel.File))
	return err == nil
}

// Push unpacks a plain POSIX tar of a SavedModel's folder and keeps it under its digest, which it returns,
// with whether it was known before. The archive is read once, as it is unpacked; what it may hold is said at unpack.
// want is the digest that it must have, "" for any. After an error nothing of it is left.
//
// Faults: BadRequest for what is wrong with the archive, Exhausted where the disk is full, Precondition where
// the cache-dir cannot be used, Unavailable if the cache is closing; an error of the reader stays as it is.
func (c *Cache) Push(archive io.Reader, want string) (digest string, known bool, err error) {
	if !c.begin() {
		return "", false, errClosing
	}
	defer c.working.Done()

	dir, err := c.beside(pushPattern)
	if err != nil {
		return "", false, c.diskFault(err)
	}
	defer func() {
		if rmErr := os.RemoveAll(dir); rmErr != nil { // nothing is there once it has its name
			c.options.Log.Warn("push not cleared away", zap.Error(rmErr))
		}
	}()
	digest, err = unpack(dir, archive)
	if err != nil {
		return "", false, c.diskFault(err)
	}
	if want != "" && digest != want {
		return "", false, fault.New(fault.BadRequest, "the archive has the digest %s, not %s; it changed while it was sent, or was cut", digest, want)
	}
	if _, err := savedmodel.Read(c.ctx, dir, nil); err != nil {
		return "", false, fault.New(fault.BadRequest, "the archive's %s cannot be read: %w", savedmodel.File, errors.Unwrap(err))
	}
	err = os.Rename(dir, c.place(digest))
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) { // or another push was first
		c.touch(c.place(digest))
		return digest, true, nil
	}
	if err != nil {
		return "", false, c.diskFault(err)
	}
	c.options.Log.Info("model pushed", zap.String("model", digest))
	c.collectSoon()
	return digest, false, nil
}

// beside makes a folder among the models, with the name of this process in it.
func (c *Cache) beside(pattern string) (string, error) {
	if err := rundir.Ensure(c.models()); err != nil {
		return "", fault.New(fault.Precondition, "cache-dir: %w", err)
	}
	self, err := rundir.Of(os.Getpid())
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(c.models(), fmt.Sprintf(pattern, self.PID, self.Start))
}

// diskFault makes a fault of an error of the file system, and returns any other as it is.
func (c *Cache) diskFault(err error) error {
	var number syscall.Errno
	switch {
	case !errors.As(err, &number):
		return err
	case number == syscall.ENOSPC || number == syscall.EDQUOT:
		return fault.New(fault.Exhausted, "there is no space left for this model in cache-dir %s; free some, or set cache-dir to a larger place", c.options.CacheDir)
	}
	if _, ok := fault.KindOf(err); ok {
		return err
	}
	return fault.New(fault.Precondition, "cache-dir %s cannot be written (%w); set cache-dir to another place", c.options.CacheDir, number)
}
