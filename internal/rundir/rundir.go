// Package rundir manages the files of running fronts: the run-dir with one folder for each front, who may use them, and
// how they are removed.
//
//	<run-dir>/            0700, owned by this user, never a link
//	  <8 hex> or user/    one front: its sockets, and the file "front" that names its process
//
// A folder's lock is flock(2) on the folder itself, so no lock file is left behind; libraries lock only files. A
// program that starts fronts, such as the shim, holds the lock while it looks for a front and starts one. A front holds
// the lock while it removes its folder.
//
// What may enter: files of running processes. Caches and logs live longer and elsewhere.
package rundir

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"flightsvc/internal/regular"
)

// frontFile names the process that owns a folder. It has at most maxFront bytes, and is written as unfinishedFile
// first.
const (
	frontFile      = "front"
	unfinishedFile = "front.new"
	maxFront       = 1 << 10
)

// Default returns the run-dir if none is set: below XDG_RUNTIME_DIR if that is set, else in /tmp with the user's id.
func Default() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "flightsvc")
	}
	return fmt.Sprintf("/tmp/flightsvc-%d", os.Geteuid())
}

// LogDir returns the folder for logs: below XDG_STATE_HOME, else ~/.local/state, else run-dir.
func LogDir(runDir string) string {
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "flightsvc", "log")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "state", "flightsvc", "log")
	}
	return runDir
}

// CacheDir returns the folder for fetched and pushed models if none is set: below XDG_CACHE_HOME, else ~/.cache, else
// below run-dir.
func CacheDir(runDir string) string {
	if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
		return filepath.Join(dir, "flightsvc")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".cache", "flightsvc")
	}
	return filepath.Join(runDir, "cache")
}

// Folder is the folder of one front.
type Folder struct {
	Path string
	// shared means that the folder is outside the run-dir and others may use it: it is neither locked nor removed, and
	// no file in it is touched except the one that names its front.
	shared bool
	self   Process
}

// Claim takes the folder at path for this process. A folder directly below runDir is this process's alone, with all its
// sockets. Any other folder is made if it does not exist, and is kept by Release; who makes a socket there removes it.
func Claim(runDir, path string) (*Folder, error) {
	self, err := Of(os.Getpid())
	if err != nil {
		return nil, err
	}
	f := &Folder{Path: path, self: self, shared: filepath.Dir(path) != filepath.Clean(runDir)}
	if f.shared {
		err = os.MkdirAll(path, 0o700)
	} else {
		err = Ensure(path)
	}
	if err != nil {
		return nil, err
	}
	name := filepath.Join(path, frontFile)
	other, named := front(path)
	_, statErr := os.Lstat(name)
	switch {
	case named && other.Alive():
		return nil, fmt.Errorf("a flightsvc front serves in %s already (process %d)", path, other.PID)
	case f.shared && !named && !os.IsNotExist(statErr):
		return nil, fmt.Errorf("%s exists and does not belong to a flightsvc front; "+
			"choose an endpoint in another folder", name)
	case !f.shared:
		removeSockets(path)
	}
	if err := f.sign(); err != nil {
		if !f.shared {
			_ = remove(path)
		}
		return nil, err
	}
	return f, nil
}

// sign writes the file that names the folder's front, in one step.
func (f *Folder) sign() error {
	data, err := json.Marshal(f.self)
	if err != nil {
		return err
	}
	unfinished := filepath.Join(f.Path, unfinishedFile)
	if err = os.WriteFile(unfinished, data, 0o600); err == nil {
		err = os.Rename(unfinished, filepath.Join(f.Path, frontFile))
	}
	if err != nil {
		_ = os.Remove(unfinished)
	}
	return err
}

// front returns the process that owns a folder, and false if none is named.
func front(path string) (Process, bool) {
	var p Process
	data, err := regular.Read(context.Background(), filepath.Join(path, frontFile), maxFront)
	return p, err == nil && json.Unmarshal(data, &p) == nil && p.PID > 0
}

// Release removes what Claim made, unless another front has taken the folder over since.
func (f *Folder) Release() error {
	release := func() error {
		owner, named := front(f.Path)
		switch {
		case named && owner != f.self:
			return nil
		case f.shared:
			return os.Remove(filepath.Join(f.Path, frontFile))
		}
		return remove(f.Path)
	}
	if f.shared {
		return release()
	}
	return locked(f.Path, unix.LOCK_EX, release)
}

// Sweep removes the folders below runDir whose front has ended. It skips folders whose lock somebody holds.
func Sweep(runDir string) error {
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		path := filepath.Join(runDir, entry.Name())
		owner, named := front(path)
		if !entry.IsDir() || (named && owner.Alive()) {
			continue
		}
		_ = locked(path, unix.LOCK_EX|unix.LOCK_NB, func() error { // held: somebody starts a front there
			if owner, named := front(path); named && owner.Alive() {
				return nil
			}
			return remove(path)
		})
	}
	return nil
}

// remove deletes a front's files in a folder, and then the folder if it is empty.
func remove(path string) error {
	removeSockets(path)
	for _, name := range []string{unfinishedFile, frontFile} {
		if err := os.Remove(filepath.Join(path, name)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return os.Remove(path)
}

// Sample begins the names of files with rows that a runner of the front has kept.
const Sample = "sample-"

// removeSockets removes the sockets in a front's folder, and what its runners have kept.
func removeSockets(path string) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if entry.Type()&os.ModeSocket != 0 && strings.HasSuffix(entry.Name(), ".sock") ||
			entry.Type().IsRegular() && strings.HasPrefix(entry.Name(), Sample) {
			_ = os.Remove(filepath.Join(path, entry.Name()))
		}
	}
}

// locked runs f while it holds the lock of a folder.
func locked(path string, how int, f func() error) error {
	dir, err := os.Open(path) //nolint:gosec // below the run-dir
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }() // which unlocks
	if err := unix.Flock(int(dir.Fd()), how); err != nil {
		return err
	}
	return f()
}

// Starting holds the lock of a front's folder below runDir while f looks for that front, and starts one if there is
// none. Starting makes the folder if necessary, and removes it if f leaves it empty. The shim does the same.
func Starting(runDir, name string, f func(folder string) error) error {
	if err := Ensure(runDir); err != nil {
		return err
	}
	path := filepath.Join(runDir, name)
	for range lockAttempts {
		if err := Ensure(path); err != nil {
			return err
		}
		dir, err := lock(path)
		if err != nil {
			return err
		}
		if dir == nil {
			continue // a front removed it meanwhile
		}
		defer func() { _ = dir.Close() }()     // which unlocks
		defer func() { _ = os.Remove(path) }() // fails if there is anything in it
		return f(path)
	}
	return fmt.Errorf("%s is removed whenever it is created; does another program clean up?", path)
}

// lock returns the folder at path, locked, or nil if the folder was removed or replaced before it was locked.
func lock(path string) (*os.File, error) {
	dir, err := os.Open(path) //nolint:gosec // below the run-dir
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(dir.Fd()), unix.LOCK_EX)
	if err == nil {
		var held, there os.FileInfo
		if held, err = dir.Stat(); err == nil {
			if there, err = os.Lstat(path); err == nil && os.SameFile(held, there) {
				return dir, nil
			}
		}
	}
	_ = dir.Close()
	if os.IsNotExist(err) {
		err = nil
	}
	return nil, err
}

// lockAttempts bounds how often Starting makes a folder that is removed before it is locked.
const lockAttempts = 100

// Occupant returns the process that a front's folder names, and false if there is none or it has ended.
func Occupant(folder string) (Process, bool) {
	owner, named := front(folder)
	return owner, named && owner.Alive()
}
