// Digests: one hash over a model's files, by which it is named, pushed and profiled.

package repository

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
)

// digestForm is how a digest is written: in references, in commands, in answers.
var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// CheckDigest returns a BadRequest fault for text that is not sha256: and 64 lower-case hexadecimal digits.
func CheckDigest(digest string) error {
	if !digestForm.MatchString(digest) {
		return fault.New(fault.BadRequest,
			"%.80q is not a digest; want sha256: and 64 lower-case hexadecimal digits", digest)
	}
	return nil
}

// contents are the regular files of a folder, from which its digest is made.
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
		_, _ = fmt.Fprintf(sum, "%s %d %x\n", file.path, file.size, file.sum) // writing to a hash never fails
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil))
}

// Digest returns the digest of a model's files. It reads them once for each stamp. The digest is "" for the built-in
// model and for a folder with links in it, which has none. Its faults are Unavailable for files that change meanwhile,
// and Precondition for files that cannot be read.
func (r *Repository) Digest(ctx context.Context, model Model) (string, error) {
	if model.Digest != "" || model.Dir == "" {
		return model.Digest, nil
	}
	key := model.Dir + "\n" + model.Stamp
	if digest, ok := r.digests.get(key); ok {
		return digest, nil
	}
	return r.digesting.do(ctx, r, key, func(ctx context.Context) (string, error) {
		digest, err := digestOf(ctx, model)
		if err == nil {
			r.digests.put(key, digest)
		}
		return digest, err
	})
}

// Size returns the bytes of all files in a folder, or of one file, without those that cannot be read.
func Size(path string) (total int64) {
	_ = filepath.WalkDir(path, func(_ string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			if info, err := entry.Info(); err == nil {
				total += info.Size()
			}
		}
		return nil
	})
	return total
}

// Changed reports whether a model's files are no longer those with which it was found.
func (r *Repository) Changed(model Model) bool {
	if model.Stamp == "" {
		return false
	}
	now, err := scan(model.Dir)
	return err != nil || now.stamp != model.Stamp
}

func digestOf(ctx context.Context, model Model) (string, error) {
	before, err := scan(model.Dir)
	if err != nil {
		return "", fault.New(fault.Precondition, "model %s: %w", model.Ref, err)
	}
	if before.links {
		return "", nil
	}
	var files contents
	buffer := make([]byte, 1<<20)
	for _, one := range before.files {
		sum := sha256.New()
		n, err := hashFile(ctx, filepath.Join(model.Dir, filepath.FromSlash(one.path)), sum, buffer)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return "", errChanging(model)
			}
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			return "", fault.New(fault.Precondition, "model %s: %w", model.Ref, err)
		}
		files = append(files, listed{path: one.path, size: n, sum: [sha256.Size]byte(sum.Sum(nil))})
	}
	if after, err := scan(model.Dir); err != nil || after.stamp != before.stamp || before.stamp != model.Stamp {
		return "", errChanging(model)
	}
	return files.digest(), nil
}

func errChanging(model Model) error {
	return fault.New(fault.Unavailable, "model %s, version %s: its files in %s have just changed; ask again",
		model.Ref, model.Version, model.Dir)
}

// hashFile adds a file's bytes to a hash and returns their number.
func hashFile(ctx context.Context, name string, sum hash.Hash, buffer []byte) (int64, error) {
	in, err := regular.Open(name)
	if err != nil {
		return 0, err
	}
	defer func() { _ = in.Close() }()
	return io.CopyBuffer(sum, regular.Until(ctx, in), buffer)
}
