// Versions in a repository: what their files look like, and whether they have settled.

package repository

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// A version that is still being copied must not be used. A version has settled when its files are complete, as far as
// their names tell, and none of them has changed for a while.
const (
	quiet       = time.Second      // how long a folder, or the listings of a store, must stay the same
	quietRemote = 10 * time.Second // age of changes at which one listing is enough; the store's clock may differ
	settleWait  = 5 * time.Second  // how long a caller waits for the only version to settle
	settleTick  = 50 * time.Millisecond
)

// file is one file of a version: in a folder, or an object in a store.
type file struct {
	path    string // relative to the version, with /
	size    int64
	changed time.Time // ctime, since copying keeps mtimes; of an object its last modification
	md5     []byte    // where a store gives one
}

// snapshot is what the files of a version look like at one moment.
type snapshot struct {
	at     time.Time // when
	files  []file    // by path
	newest time.Time // the newest change of a file or folder
	links  bool      // there are links or special files among the files
	id     uint64    // inode of the folder
	stamp  string    // fingerprint of paths, sizes and changes
}

// seal sorts the files and takes their fingerprint.
func (s *snapshot) seal() {
	slices.SortFunc(s.files, func(a, b file) int { return strings.Compare(a.path, b.path) })
	var text []byte
	for _, f := range s.files {
		text = append(append(text, f.path...), 0)
		text = strconv.AppendInt(append(strconv.AppendInt(text, f.size, 10), ' '), f.changed.UnixNano(), 10)
		text = append(hex.AppendEncode(append(text, ' '), f.md5), '\n')
		if f.changed.After(s.newest) {
			s.newest = f.changed
		}
	}
	sum := sha256.Sum256(text)
	s.stamp = hex.EncodeToString(sum[:16])
}

// find returns the file with a path.
func (s *snapshot) find(name string) (file, bool) {
	i, ok := slices.BinarySearchFunc(s.files, name, func(f file, name string) int {
		return strings.Compare(f.path, name)
	})
	if !ok {
		return file{}, false
	}
	return s.files[i], true
}

// whole reports whether the files are those of a SavedModel: saved_model.pb and, if there is an index of variables, all
// data files of the variables. The name of a data file says how many there are.
func (s *snapshot) whole() bool {
	if _, ok := s.find(savedmodel.File); !ok {
		return false
	}
	if _, ok := s.find("variables/variables.index"); !ok {
		return true
	}
	shards := map[int]int{} // data files there are, by how many there have to be
	for _, f := range s.files {
		const form = "variables/variables.data-%05d-of-%05d"
		var i, of int // a longer name that begins so is a file still being copied
		if n, _ := fmt.Sscanf(f.path, form, &i, &of); n == 2 && i < of && f.path == fmt.Sprintf(form, i, of) {
			if shards[of]++; shards[of] == of {
				return true
			}
		}
	}
	return false
}

// size returns the bytes of all files.
func (s *snapshot) size() (bytes int64) {
	for _, f := range s.files {
		bytes += f.size
	}
	return bytes
}

// scan returns how the files of a folder look; it follows links. It runs for each new stream and uses plain system
// calls, because they are faster. Its error is a sentence.
func scan(dir string) (snapshot, error) {
	s := snapshot{at: time.Now(), files: make([]file, 0, 16)}
	err := s.folder(unix.AT_FDCWD, dir, "", 0)
	s.seal()
	return s, err
}

// folder adds the files of the folder name, which lies in the one that the descriptor in is open on; below is its path
// in the version.
func (s *snapshot) folder(in int, name, below string, depth int) error {
	fd, err := unix.Openat(in, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		s.vanished(err)
		if depth == 0 {
			return &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return nil
	}
	folder := os.NewFile(uintptr(fd), name)
	defer func() { _ = folder.Close() }()
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err == nil {
		s.change(time.Unix(stat.Ctim.Unix()))
		if depth == 0 {
			s.id = stat.Ino
		}
	}
	names, err := folder.Readdirnames(-1)
	if err != nil {
		s.vanished(err)
	}
	for _, name := range names {
		err := unix.Fstatat(fd, name, &stat, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && stat.Mode&unix.S_IFMT == unix.S_IFLNK {
			s.links = true
			s.change(time.Unix(stat.Ctim.Unix()))
			err = unix.Fstatat(fd, name, &stat, 0)
		}
		path := name
		if below != "" {
			path = below + "/" + name
		}
		switch kind := stat.Mode & unix.S_IFMT; {
		case err != nil:
			s.vanished(err)
			continue
		case len(s.files) >= maxEntries || depth > maxDepth:
			return fmt.Errorf("%s has more than %d files, or folders nested deeper than %d",
				folder.Name(), maxEntries, maxDepth)
		case kind == unix.S_IFDIR:
			if err := s.folder(fd, name, path, depth+1); err != nil {
				return err
			}
			continue
		case kind != unix.S_IFREG:
			s.links = true // a special file has no digest, as a link has none
		}
		s.files = append(s.files, file{path: path, size: stat.Size, changed: time.Unix(stat.Ctim.Unix())})
	}
	return nil
}

func (s *snapshot) change(at time.Time) {
	if at.After(s.newest) {
		s.newest = at
	}
}

// vanished counts a file that has gone during the scan as a change. Other errors do not matter yet: a file that cannot
// be read fails when it is read.
func (s *snapshot) vanished(err error) {
	if os.IsNotExist(err) {
		s.change(s.at)
	}
}

// condition is what is known of a version's files.
type condition int

const (
	absent    condition = iota // or incomplete
	settling                   // changed just now
	unsettled                  // was settled, and has changed since
	settled
)

// sightings remembers how versions looked. The zero value is ready to use.
type sightings struct {
	mu   sync.Mutex     // held while one is judged
	seen memo[sighting] // by folder or URI
}

type sighting struct {
	stamp   string
	id      uint64
	since   time.Time // when the version first had this stamp
	settled bool      // the version has settled, with this stamp or an earlier one
}

// judge returns the condition of a version that looks like now. It has settled if its newest change is at least age
// old, or if it has looked the same for the time quiet; the latter helps where clocks disagree.
func (s *sightings) judge(place string, now snapshot, age time.Duration) condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !now.whole() {
		s.seen.drop(place)
		if now.at.Sub(now.newest) < age {
			return settling
		}
		return absent
	}
	last, ok := s.seen.get(place)
	if !ok || last.id != now.id {
		last = sighting{}
	}
	if last.stamp != now.stamp {
		last.stamp, last.id, last.since = now.stamp, now.id, now.at
	}
	state := settling
	switch {
	case now.at.Sub(now.newest) >= age || now.at.Sub(last.since) >= quiet:
		state, last.settled = settled, true
	case last.settled:
		state = unsettled
	}
	s.seen.put(place, last)
	return state
}

// candidate is a version that may be used if it has settled. look returns how its files look now.
type candidate struct {
	number string
	look   func() (snapshot, condition)
}

// byNumber orders versions by number; of equal ones, "1" comes before "01".
func byNumber(a, b string) int {
	x, _ := strconv.ParseUint(a, 10, 63)
	y, _ := strconv.ParseUint(b, 10, 63)
	return cmp.Or(cmp.Compare(x, y), strings.Compare(b, a))
}

func isNumber(text string) bool {
	_, err := strconv.ParseUint(text, 10, 63)
	return err == nil
}

// local lists the numbered folders below base as candidates, by number.
func (r *Repository) local(base string) []candidate {
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	var list []candidate
	for _, entry := range entries {
		if isNumber(entry.Name()) {
			list = append(list, r.localVersion(base, entry.Name()))
		}
	}
	slices.SortFunc(list, func(a, b candidate) int { return byNumber(a.number, b.number) })
	return list
}

func (r *Repository) localVersion(base, number string) candidate {
	return candidate{number: number, look: func() (snapshot, condition) {
		dir := filepath.Join(base, number)
		now, err := scan(dir)
		if err != nil {
			return now, absent
		}
		return now, r.seen.judge(dir, now, r.options.Quiet)
	}}
}

// Settled lists the versions that may be used, ascending; nil for a SavedModel without versions. It waits for nothing
// and fetches nothing. Its faults are those of Find.
func (r *Repository) Settled(ctx context.Context, ref string) ([]string, error) {
	if ref == protocol.Image {
		return nil, nil
	}
	base, at, err := r.locate(ref)
	if err != nil {
		return nil, err
	}
	var list []candidate
	if at != nil {
		listing, err := r.listed(ctx, ref, *at, r.options.PollInterval)
		if err != nil || listing.plain != nil {
			return nil, err
		}
		list = r.remote(*at, listing)
	} else if _, err := os.Stat(filepath.Join(base, savedmodel.File)); err != nil {
		list = r.local(base)
	}
	var numbers []string
	for _, one := range list {
		if _, state := one.look(); state >= unsettled {
			numbers = append(numbers, one.number)
		}
	}
	return numbers, nil
}
