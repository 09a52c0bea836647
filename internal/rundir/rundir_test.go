// Tests of folders, their owners and their locks, and of processes.

package rundir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// runDir is a folder with a short path, as sockets need.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "fs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func self(t *testing.T) Process {
	t.Helper()
	p, err := Of(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// dead is a process that has ended.
func dead(t *testing.T) Process {
	t.Helper()
	p := sleeper(t)
	if !p.Alive() {
		t.Fatal("the process to be does not live")
	}
	end(t, p)
	return p
}

var sleepers = map[int]*exec.Cmd{}

func sleeper(t *testing.T) Process {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sleepers[cmd.Process.Pid] = cmd
	p, err := Of(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func end(t *testing.T, p Process) {
	t.Helper()
	_ = sleepers[p.PID].Process.Kill()
	_ = sleepers[p.PID].Wait()
}

// name writes the file that names a folder's front.
func name(t *testing.T, dir string, p Process) {
	t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, frontFile), string(data))
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// socket leaves a socket behind that nobody listens on.
func socket(t *testing.T, path string) {
	t.Helper()
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	_ = listener.Close()
}

// list returns the names in a folder, joined.
func list(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return strings.Join(names, " ")
}

// holds compares the names in a folder, joined.
func holds(t *testing.T, dir, want string) {
	t.Helper()
	if got := list(t, dir); got != want {
		t.Errorf("%s holds %q, want %q", dir, got, want)
	}
}

func claim(t *testing.T, root, path string) *Folder {
	t.Helper()
	folder, err := Claim(root, path)
	if err != nil {
		t.Fatal(err)
	}
	return folder
}

func release(t *testing.T, folder *Folder) {
	t.Helper()
	if err := folder.Release(); err != nil {
		t.Error(err)
	}
}

func TestEnsure(t *testing.T) {
	root := runDir(t)
	made := filepath.Join(root, "a", "b")
	for range 2 { // made, and found
		if err := Ensure(made); err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(made); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("made with mode %v, %v", info.Mode(), err)
	}
	link := filepath.Join(root, "link")
	if err := os.Symlink(made, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, "file")
	put(t, file, "")
	cases := map[string]string{link: "links are refused", file: "not a directory"}
	for i, mode := range []os.FileMode{0o701, 0o710, 0o704, 0o777} {
		open := filepath.Join(root, fmt.Sprint(i))
		if err := os.Mkdir(open, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(open, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		cases[open] = fmt.Sprintf("mode %04o", mode)
	}
	if os.Geteuid() == 0 {
		others := filepath.Join(root, "others")
		if err := os.Mkdir(others, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(others, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		cases[others] = "belongs to user 65534, not to user 0"
	}
	for path, part := range cases {
		if err := Ensure(path); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", path, err, part)
		}
	}
}

// TestEnsureChecksParents holds that no other user can put another folder in the place of a private one.
func TestEnsureChecksParents(t *testing.T) {
	folder := func(mode uint32, parts ...string) string {
		t.Helper()
		path := filepath.Join(parts...)
		if err := unix.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Chmod(path, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return path
	}
	link := func(target, path string) {
		t.Helper()
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	root := runDir(t)
	open, sticky := folder(0o777, root, "open"), folder(0o1777, root, "sticky")
	folder(0o755, open, "inner")
	link("sticky", filepath.Join(root, "to-sticky"))
	link(open, filepath.Join(root, "to-open"))
	link("loop", filepath.Join(root, "loop"))
	for path, want := range map[string]string{
		"sticky/mine":        "",
		"to-sticky/deep/own": "",
		"open/mine":          "other users may replace what is in " + open + " (mode 0777)",
		"open/inner/mine":    "other users may replace what is in " + open,
		"to-open/mine":       "other users may replace what is in " + open,
		"loop/mine":          "file exists",
	} {
		if err := Ensure(filepath.Join(root, path)); (err == nil) != (want == "") ||
			err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}

	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root, to give folders to another user and to mount a volume")
	}
	const nobody = 65534
	others := folder(0o755, root, "others")
	folder(0o700, others, "mine")
	link(root, filepath.Join(sticky, "of-another"))
	volume := folder(0o755, root, "volume")
	if err := errors.Join(os.Chown(others, nobody, nobody),
		os.Lchown(filepath.Join(sticky, "of-another"), nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"others/mine", "sticky/of-another/mine"} {
		if err := Ensure(filepath.Join(root, path)); err == nil ||
			!strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := unix.Mount("tmpfs", volume, "tmpfs", 0, "mode=0777"); err != nil {
		t.Skipf("skipped: needs the right to mount: %v", err)
	}
	defer func() { _ = unix.Unmount(volume, 0) }()
	if err := Ensure(filepath.Join(volume, "mine")); err != nil {
		t.Errorf("in a volume that is open to all: %v", err)
	}
}

// TestClaimLeavesNothingOnAFullDisk fills the run-dir's file system.
func TestClaimLeavesNothingOnAFullDisk(t *testing.T) {
	root := runDir(t)
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=0700,size=4096"); err != nil {
		t.Skipf("skipped: needs the right to mount: %v", err)
	}
	defer func() { _ = unix.Unmount(root, 0) }()
	put(t, filepath.Join(root, "filler"), strings.Repeat("x", 4096))
	if _, err := Claim(root, filepath.Join(root, "0123abcd")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	holds(t, root, "filler")
}

func TestClaimAndRelease(t *testing.T) {
	root := runDir(t)
	path := filepath.Join(root, "0123abcd")
	folder := claim(t, root, path)
	if owner, ok := front(path); !ok || owner != self(t) {
		t.Errorf("the folder belongs to %v, %t", owner, ok)
	}
	socket(t, filepath.Join(path, "front.sock"))
	release(t, folder)
	holds(t, root, "")
}

func TestClaimTakesOverFromTheDead(t *testing.T) {
	root := runDir(t)
	path := filepath.Join(root, "user")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	socket(t, filepath.Join(path, "front.sock"))
	for _, text := range []string{"", "{", "null"} { // cut off while it was written
		put(t, filepath.Join(path, frontFile), text)
		folder := claim(t, root, path)
		if got := list(t, path); got != frontFile || folder == nil {
			t.Errorf("the folder holds %s", got)
		}
	}
	name(t, path, dead(t))
	folder := claim(t, root, path)

	// Another front took over: what it has stays.
	other := sleeper(t)
	defer end(t, other)
	name(t, path, other)
	socket(t, filepath.Join(path, "front.sock"))
	release(t, folder)
	holds(t, path, "front front.sock")
	if _, err := Claim(root, path); err == nil || !strings.Contains(err.Error(),
		fmt.Sprintf("serves in %s already (process %d)", path, other.PID)) {
		t.Errorf("claiming from a live front: %v", err)
	}
	holds(t, path, "front front.sock")
}

func TestReleaseWaitsForAStarter(t *testing.T) {
	root := runDir(t)
	path := filepath.Join(root, "user")
	folder := claim(t, root, path)
	starter, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(starter.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	released := make(chan error, 1)
	go func() { released <- folder.Release() }()
	if err := Sweep(root); err != nil { // held: must neither wait nor remove
		t.Error(err)
	}
	select {
	case err := <-released:
		t.Fatalf("released under a starter's lock: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	other := sleeper(t)
	defer end(t, other)
	name(t, path, other) // the starter's front
	_ = starter.Close()
	if err := <-released; err != nil {
		t.Error(err)
	}
	holds(t, path, frontFile)
}

// TestSharedFolderKeepsWhatIsNotOurs holds for a folder that others use, such as /run: nothing in it goes but our file.
func TestSharedFolderKeepsWhatIsNotOurs(t *testing.T) {
	root, shared := runDir(t), runDir(t)
	if err := os.Chmod(shared, 0o755); err != nil { // not ours to judge
		t.Fatal(err)
	}
	socket(t, filepath.Join(shared, "docker.sock"))
	put(t, filepath.Join(shared, "notes.txt"), "precious")
	for range 2 {
		folder := claim(t, root, shared)
		holds(t, shared, "docker.sock front notes.txt")
		release(t, folder)
		holds(t, shared, "docker.sock notes.txt")
	}
	// A folder of several levels below the run-dir, or the run-dir itself, is shared too.
	for _, path := range []string{filepath.Join(root, "a", "b"), root} {
		folder := claim(t, root, path)
		release(t, folder)
		if got := list(t, path); path != root && got != "" || path == root && got != "a" {
			t.Errorf("%s holds %s", path, got)
		}
	}

	name(t, shared, dead(t))
	folder := claim(t, root, shared)
	other := sleeper(t)
	defer end(t, other)
	name(t, shared, other)
	release(t, folder)
	if _, ok := front(shared); !ok {
		t.Error("the file of another front was removed")
	}
	if _, err := Claim(root, shared); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("claiming from a live front: %v", err)
	}

	put(t, filepath.Join(shared, frontFile), "a file of somebody else")
	if _, err := Claim(root, shared); err == nil || !strings.Contains(err.Error(),
		"does not belong to a flightsvc front") {
		t.Errorf("claiming over a foreign file: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(shared, frontFile)); string(data) != "a file of somebody else" {
		t.Errorf("the file holds %q, %v", data, err)
	}
}

func TestSweep(t *testing.T) {
	root := runDir(t)
	at := func(parts ...string) string { return filepath.Join(append([]string{root}, parts...)...) }
	live, gone := sleeper(t), dead(t)
	defer end(t, live)
	for _, dir := range []string{"dead", "deadplus", "live", "locked", "empty", "foreign", "cut", "unfinished"} {
		if err := os.Mkdir(at(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"dead", "deadplus", "locked"} {
		name(t, at(dir), gone)
		socket(t, at(dir, "front.sock"))
	}
	put(t, at("deadplus", "notes.txt"), "precious")
	put(t, at("cut", frontFile), "") // the disk was full
	put(t, at("unfinished", unfinishedFile), "{")
	name(t, at("live"), live)
	put(t, at("foreign", "notes.txt"), "precious")
	put(t, at("file.log"), "a log")
	outside := runDir(t)
	name(t, outside, gone)
	if err := os.Symlink(outside, at("link")); err != nil {
		t.Fatal(err)
	}
	held, err := os.Open(at("locked"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}

	if err := Sweep(root); err != nil {
		t.Fatal(err)
	}
	holds(t, root, "deadplus file.log foreign link live locked")
	for dir, want := range map[string]string{"deadplus": "notes.txt", "foreign": "notes.txt", "live": "front",
		"locked": "front front.sock"} {
		holds(t, at(dir), want)
	}
	holds(t, outside, "front")
	if err := Sweep(at("nope")); err == nil {
		t.Error("a folder that is not there was swept")
	}
}

func TestFoldersFollowTheEnvironment(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("XDG_STATE_HOME", "/state")
	t.Setenv("XDG_CACHE_HOME", "/cache")
	if got := Default() + " " + LogDir("/r") + " " +
		CacheDir("/r"); got != "/run/user/7/flightsvc /state/flightsvc/log /cache/flightsvc" {
		t.Error(got)
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "/home/me")
	if got, want := Default()+" "+LogDir("/r")+" "+CacheDir("/r"),
		fmt.Sprintf("/tmp/flightsvc-%d /home/me/.local/state/flightsvc/log /home/me/.cache/flightsvc",
			os.Geteuid()); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	t.Setenv("HOME", "")
	if got := LogDir("/r") + " " + CacheDir("/r"); got != "/r /r/cache" {
		t.Error(got)
	}
}

func TestProcess(t *testing.T) {
	me := self(t)
	if !me.Alive() {
		t.Error("this process is said to be dead")
	}
	if parsed, err := ParseProcess(fmt.Sprintf("%d:%d", me.PID, me.Start)); err != nil || parsed != me {
		t.Errorf("%v reads as %v, %v", me, parsed, err)
	}
	if (Process{PID: me.PID, Start: me.Start + 1}).Alive() {
		t.Error("a process of another start time is taken for this one")
	}
	for _, text := range []string{"", "1", "1:", ":1", "a:b", "0:1", "-1:1", "1;2", "1:2:3", "1:2x"} {
		if p, err := ParseProcess(text); err == nil || !strings.Contains(err.Error(), "PID:START") {
			t.Errorf("%q reads as %v, %v", text, p, err)
		}
	}
	// A name may hold anything, also what looks like the end of it.
	tricky := filepath.Join(runDir(t), "a) R 1 (b")
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tricky, data, 0o700); err != nil { //nolint:gosec // it is to run
		t.Fatal(err)
	}
	cmd := exec.Command(tricky, "600")
	cmd.Args[0] = "sleep"
	plain := sleeper(t)
	defer end(t, plain)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	p, err := Of(cmd.Process.Pid)
	if err != nil || p.Start < plain.Start-1000 || p.Start > plain.Start+1000 {
		t.Errorf("the start is %d, %v; another of that moment has %d", p.Start, err, plain.Start)
	}
}

func TestWatch(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	gone := make(chan struct{})
	p := sleeper(t)
	if err := p.Watch(ctx, -1, func() { close(gone) }); err != nil {
		t.Fatal(err)
	}
	given := make(chan struct{})
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Watch(ctx, fd, func() { close(given) }); err != nil {
		t.Fatal(err)
	}
	end(t, p)
	for _, ended := range []chan struct{}{gone, given} {
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Fatal("the end was not seen")
		}
	}

	never := func() { t.Error("a process that lives is said to have ended") }
	if err := p.Watch(ctx, -1, never); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", p.PID)) {
		t.Errorf("watching the dead: %v", err)
	}
	me := self(t)
	other := Process{PID: me.PID, Start: me.Start + 1}
	if err := other.Watch(ctx, -1, never); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("watching under another's id: %v", err)
	}
	if err := me.Watch(ctx, -1, never); err != nil {
		t.Fatal(err)
	}
	cancel() // ends the watch; goleak waits for it
	fds := func() []string {
		entries, _ := filepath.Glob("/proc/self/fd/*")
		return slices.DeleteFunc(entries, func(path string) bool {
			to, _ := os.Readlink(path)
			return !strings.Contains(to, "pidfd")
		})
	}
	for deadline := time.Now().Add(5 * time.Second); len(fds()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("pidfds are left: %v", fds())
		}
	}
}
