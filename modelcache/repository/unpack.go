// Unpacking: an archive becomes a folder, within bounds.

package repository

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Bounds on an archive. A SavedModel has some ten files; its largest are its weights.
const (
	maxArchiveBytes = 64 << 30
	maxEntries      = 100_000
	maxNameBytes    = 4096     // of one entry
	maxNamesBytes   = 32 << 20 // of all, since they are kept for the digest
	maxPartBytes    = 255      // between two slashes of a name: NAME_MAX of Linux
	maxDepth        = 64
	maxPadding      = 1 << 20 // zeros after the end: tar fills its last block of 10 KiB, or as -b says
	maxGraphBytes   = 2 << 30 // of saved_model.pb: a protocol buffer's own limit
)

// unpack writes the regular files and folders of a plain POSIX tar below dir, which is empty, and returns the digest of
// the files. It writes nowhere else, and takes neither owners, times nor modes from the archive.
//
// Faults are BadRequest: names that are absolute, not UTF-8, hold ".." or control characters, occur twice, or put a
// file below a file; links, devices, sparse files and whatever else is no regular file or folder; a bound that is
// exceeded; no saved_model.pb at the top; an archive without its end. Errors of archive and of the file system stay as
// they are.
func unpack(dir string, archive io.Reader) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer func() { _ = root.Close() }()
	source := &source{archive: archive, left: maxArchiveBytes}
	u := unpacking{root: root, entries: tar.NewReader(source), buffer: make([]byte, 256<<10)}
	for err == nil {
		err = u.next()
	}
	switch {
	case source.err != nil && source.err != io.EOF: // the original error, which err may have lost
		return "", source.err
	case err != io.EOF && errors.As(err, new(syscall.Errno)):
		return "", err
	case source.err == io.EOF && u.count == 0:
		return "", refused("it ends before its first entry; send a plain POSIX tar, not compressed")
	case source.err == io.EOF: // before the mark of the archive's end
		return "", refused("it ends early")
	case err != io.EOF:
		return "", err
	}
	if err := source.rest(u.buffer); err != nil {
		return "", err
	}
	if !slices.ContainsFunc(u.files, func(file listed) bool { return file.path == savedmodel.File }) {
		return "", refused("there is no %s at its top; send the folder of one SavedModel, its files without a folder "+
			"around them", savedmodel.File)
	}
	return u.files.digest(), nil
}

// refused returns the fault of an archive, BadRequest.
func refused(format string, args ...any) error {
	return fault.New(fault.BadRequest, "the archive is refused: "+format, args...)
}

// source is the archive as it arrives.
type source struct {
	archive io.Reader
	left    int64 // bytes that it may still have
	err     error // why it ended
}

// Read is part of io.Reader.
func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	n, err := s.archive.Read(p)
	if n > 0 && err == io.EOF {
		err = nil // the next Read returns io.EOF again
	}
	s.left -= int64(n)
	if s.left < 0 {
		n, err = 0, refused("it has more than %d bytes", int64(maxArchiveBytes))
	}
	s.err = err
	return n, err
}

// rest reads what follows the mark of the archive's end. That may be zeros only, which fill the last block, and at most
// maxPadding of them.
func (s *source) rest(buffer []byte) error {
	for padding := 0; ; {
		n, err := s.Read(buffer)
		if padding += n; padding > maxPadding {
			return refused("more than %d bytes follow its end", maxPadding)
		}
		if slices.ContainsFunc(buffer[:n], func(b byte) bool { return b != 0 }) {
			return refused("there is data after its end")
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// unpacking is the state of unpack.
type unpacking struct {
	root    *os.Root
	entries *tar.Reader
	buffer  []byte

	count, names int // entries so far, and the bytes of their names
	files        contents
}

// next unpacks one entry. It returns io.EOF after the last one.
func (u *unpacking) next() error {
	header, err := u.entries.Next()
	if err == io.EOF {
		return err
	}
	if err != nil {
		return refused("it is not a plain POSIX tar (%w); send it neither compressed nor in another format", err)
	}
	u.count += 1 + strings.Count(header.Name, "/") // the entry's folders count, too
	u.names += len(header.Name)
	if u.count > maxEntries || u.names > maxNamesBytes {
		return refused("it has more than %d files and folders, or names of more than %d bytes together",
			maxEntries, maxNamesBytes)
	}
	name, err := checkEntry(header)
	if err != nil {
		return err
	}
	if header.Typeflag == tar.TypeDir {
		return u.folder(name)
	}
	if err := u.folder(path.Dir(name)); err != nil {
		return err
	}
	file, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return refused("the name %q occurs twice", name)
	}
	if err != nil {
		return err
	}
	sum := sha256.New()
	size, err := io.CopyBuffer(io.MultiWriter(file, sum), u.entries, u.buffer)
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if errors.Is(err, tar.ErrHeader) {
		return refused("it is not a plain POSIX tar (%w)", err)
	}
	if err != nil {
		return err
	}
	u.files = append(u.files, listed{path: name, size: size, sum: [sha256.Size]byte(sum.Sum(nil))})
	return nil
}

// folder makes a folder, and those above it, unless it is there.
func (u *unpacking) folder(name string) error {
	err := u.root.MkdirAll(name, 0o700)
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTDIR) {
		return refused("%q is a folder, and it or one above it is a file", name)
	}
	return err
}

// checkName says why an archive or a store cannot have a file or folder of this path and size, or nil.
func checkName(name string, size int64) error {
	if len(name) > maxNameBytes {
		return fmt.Errorf("a name has %d bytes, more than %d", len(name), maxNameBytes)
	}
	parts := strings.Split(name, "/")
	tooLong := func(part string) bool { return len(part) > maxPartBytes }
	switch {
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("the name %q holds control characters, or is not UTF-8", name)
	case path.IsAbs(name):
		return fmt.Errorf("the name %q is absolute", name)
	case slices.Contains(parts, ".."):
		return fmt.Errorf("the name %q holds \"..\"", name)
	case len(parts) > maxDepth || slices.ContainsFunc(parts, tooLong):
		return fmt.Errorf("the name %q has more than %d folders, or more than %d bytes between two slashes", name,
			maxDepth, maxPartBytes)
	case path.Clean(name) == savedmodel.File && size > maxGraphBytes:
		return fmt.Errorf("%s has %d bytes, more than %d", savedmodel.File, size, int64(maxGraphBytes))
	}
	return nil
}

// checkEntry returns the path of an entry below the folder, "." for the folder itself, or why the entry is refused.
func checkEntry(header *tar.Header) (string, error) {
	name := header.Name
	if err := checkName(name, header.Size); err != nil {
		return "", refused("%w", err)
	}
	switch header.Typeflag {
	case tar.TypeReg, tar.TypeDir:
	case tar.TypeSymlink, tar.TypeLink:
		return "", refused("%q is a link; a model holds regular files and folders alone", name)
	default:
		return "", refused("%q is of type %q; a model holds regular files and folders alone", name, header.Typeflag)
	}
	for key := range header.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return "", refused("%q is a sparse file; a model holds regular files and folders alone", name)
		}
	}
	clean := path.Clean(name)
	if header.Typeflag == tar.TypeReg && (clean == "." || strings.HasSuffix(name, "/")) {
		return "", refused("%q is not the name of a file", name)
	}
	return clean, nil
}
