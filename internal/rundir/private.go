package rundir

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Ensure makes dir, private to this user. If dir exists it checks that dir is private, and that no other user can put
// another folder in its place.
func Ensure(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var about unix.Stat_t
	if err := unix.Lstat(dir, &about); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	switch {
	case about.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a folder (links are refused); set another one", dir)
	case int(about.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, not to user %d; set another one", dir, about.Uid, os.Geteuid())
	case about.Mode&0o077 != 0:
		return fmt.Errorf("%s is open to other users (mode %04o); run chmod 700 on it, or set another one",
			dir, about.Mode&0o777)
	}
	return checkParents(dir)
}

// maxLinks is how many links a path may lead through, the kernel's limit.
const maxLinks = 40

// checkParents refuses a path in which another user may replace a folder or a link. It follows links.
func checkParents(path string) error {
	above, below := "/", strings.Split(path[1:], "/")
	for links := 0; ; {
		if err := checkParent(above); err != nil {
			return fmt.Errorf("%s cannot be private: %w", path, err)
		}
		next := filepath.Join(above, below[0])
		target, err := os.Readlink(next)
		switch {
		case err != nil && len(below) == 1:
			return nil
		case err != nil: // no link
			above, below = next, below[1:]
			continue
		}
		if links++; links > maxLinks {
			return fmt.Errorf("%s leads through more than %d links", path, maxLinks)
		}
		if err := checkParent(next); err != nil {
			return fmt.Errorf("%s cannot be private: %w", path, err)
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(above, target)
		}
		above, below = "/", append(strings.Split(filepath.Clean(target)[1:], "/"), below[1:]...)
	}
}

// checkParent refuses a folder or link that belongs to another user than root, and a folder in which others may rename
// what is not theirs. It accepts the top of a mounted volume that root opened to everybody, because Kubernetes makes
// volumes so.
func checkParent(path string) error {
	const set = unix.STATX_UID | unix.STATX_GID | unix.STATX_MODE
	var about unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, set, &about); err != nil {
		return &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if about.Uid != 0 && int(about.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who may replace what is in it; set another folder", path, about.Uid)
	}
	open := about.Mode&unix.S_IWOTH != 0 || about.Mode&unix.S_IWGRP != 0 && int(about.Gid) != os.Getegid()
	volume := about.Uid == 0 && about.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
	if about.Mode&unix.S_IFMT == unix.S_IFDIR && open && about.Mode&unix.S_ISVTX == 0 && !volume {
		return fmt.Errorf("other users may replace what is in %s (mode %04o); "+
			"run chmod o-w,g-w on it, or set another folder", path, about.Mode&0o7777)
	}
	return nil
}
