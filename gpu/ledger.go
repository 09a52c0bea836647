// The ledger: what all fronts of a host have promised of each device's memory, in a folder that they share.

package gpu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"flightsvc/internal/fault"
)

// memory is the memory of one device, or of the compute instances of one GPU instance, and the placements that were
// promised some of it. It has a folder in the lock folder. A front plans with this memory while it holds flock(2) on
// that folder, and keeps a file there with the bytes that its processes may still take. The front also holds flock(2)
// on this file for as long as it lives, so an unlocked file belongs to a front that has ended.
type memory struct {
	name   string
	turn   chan struct{}           // held with the lock, and tried first, because that is cheaper than flock(2)
	placed map[*Placement]struct{} // guarded by the Inventory's mu, as all below
	held   *os.File                // our file, nil before the first placement
}

func newMemory(name string) *memory {
	return &memory{name: name, turn: make(chan struct{}, 1), placed: map[*Placement]struct{}{}}
}

// widest is the width of the number in a front's file; it never changes, so that one write replaces the number.
const widest = 20

// tryLock locks a memory for planning; it is not ok if somebody else has the lock.
func (i *Inventory) tryLock(m *memory) (unlock func(), ok bool, err error) {
	select {
	case m.turn <- struct{}{}:
	default:
		return nil, false, nil
	}
	defer func() {
		if !ok {
			<-m.turn
		}
	}()
	file, err := i.folder(m)
	if err != nil {
		return nil, false, fault.New(fault.Precondition, "lock of device %s: %w; "+
			"all users of this host's devices must be able to write to %s", m.name, err, i.lockDir)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, nil
		}
		return nil, false, fault.New(fault.Precondition, "lock of device %s: %s: %w", m.name, file.Name(), err)
	}
	return func() {
		_ = file.Close()
		<-m.turn
	}, true, nil
}

// folder opens the folder of a memory. It makes that and the lock folder for all users, with the mode of /tmp. An
// existing folder stays as it is, but must not be a link.
func (i *Inventory) folder(m *memory) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(i.lockDir), 0o755); err != nil { //nolint:gosec // other users pass through it
		return nil, err
	}
	locks, err := openFolder(unix.AT_FDCWD, i.lockDir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = locks.Close() }()
	return openFolder(int(locks.Fd()), m.name)
}

// openFolder opens a folder by its name in another, and makes it for all users if it does not exist. The mode is set on
// what was opened, not by name: in a folder that all users may write to, a name may belong to another user a moment
// later.
func openFolder(at int, name string) (*os.File, error) {
	made := unix.Mkdirat(at, name, 0o700)
	if made != nil && made != unix.EEXIST {
		return nil, &fs.PathError{Op: "mkdir", Path: name, Err: made}
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	file := os.NewFile(uintptr(fd), name)
	if made == nil {
		if err := file.Chmod(0o777 | fs.ModeSticky); err != nil { // whatever the umask
			_ = file.Close()
			return nil, err
		}
	}
	return file, nil
}

// promised returns the bytes of a memory that placed processes, our own and those of other fronts, may still take. The
// lock is held.
func (i *Inventory) promised(m *memory) (int64, error) {
	i.mu.Lock()
	sum := m.ours()
	own := ""
	if m.held != nil {
		own = m.held.Name()
	}
	i.mu.Unlock()
	entries, err := os.ReadDir(filepath.Join(i.lockDir, m.name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fault.New(fault.Precondition, "other fronts' reservations of a device: %w", err)
	}
	for _, entry := range entries {
		path := filepath.Join(i.lockDir, m.name, entry.Name())
		if path == own || !entry.Type().IsRegular() { // fronts make regular files; opening anything else may block
			continue
		}
		others, err := readHeld(path)
		if err != nil {
			return 0, err
		}
		sum += others
	}
	return sum, nil
}

// readHeld reads the file of another front, and removes it if that front has ended.
func readHeld(path string) (int64, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fault.New(fault.Precondition, "another front's reservation of a device: %w", err)
	}
	defer func() { _ = file.Close() }()
	if unix.Flock(int(file.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		_ = os.Remove(path) // fails for another user's file, which counts nothing as long as it is unlocked
		return 0, nil
	}
	text := make([]byte, widest)
	n, _ := file.ReadAt(text, 0)
	bytes, err := strconv.ParseInt(strings.TrimSpace(string(text[:n])), 10, 64)
	if err != nil || bytes < 0 {
		return 0, fault.New(fault.Precondition, "another front's reservation of a device: %s holds %q; "+
			"want a number of bytes; remove the file if no flightsvc runs", path, text[:n])
	}
	return bytes, nil
}

// ours returns what our own processes may still take, in bytes; the Inventory's mu is held.
func (m *memory) ours() int64 {
	var sum int64
	for p := range m.placed {
		sum += p.outstanding()
	}
	return sum
}

// publish writes what our processes may still take into our file, for the other fronts; i.mu is held. To add a promise
// the memory's lock must be held too; to lower one it need not be.
func (i *Inventory) publish(m *memory) error {
	if m.held == nil {
		file, err := os.CreateTemp(filepath.Join(i.lockDir, m.name), "front-")
		if err != nil {
			return fault.New(fault.Precondition, "device %s: %w", m.name, err)
		}
		m.held = file
		if err := errors.Join(file.Chmod(0o644), unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)); err != nil {
			m.forget()
			return fault.New(fault.Precondition, "device %s: %w", m.name, err)
		}
	}
	if _, err := m.held.WriteAt(fmt.Appendf(nil, "%*d", widest, m.ours()), 0); err != nil {
		return fault.New(fault.Precondition, "device %s: %w", m.name, err)
	}
	return nil
}

// forget removes our file, and with it all promises; the Inventory's mu is held.
func (m *memory) forget() {
	if m.held != nil {
		_ = os.Remove(m.held.Name())
		_ = m.held.Close()
		m.held = nil
	}
}
