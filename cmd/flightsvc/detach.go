// Detaching: a front is started in the background, and reports on standard output that it serves.

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"flightsvc/internal/config"
	"flightsvc/internal/rundir"
)

// hello is the handshake line: JSON that a front prints on standard output when it serves.
type hello struct {
	Flightsvc string `json:"flightsvc,omitempty"` // version
	Build     string `json:"build,omitempty"`
	Endpoint  string `json:"endpoint,omitempty"`
	PID       int    `json:"pid,omitempty"`
	Error     string `json:"error,omitempty"` // why a detached front did not start; read by detach only
}

func (h hello) print() error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	_, err = fmt.Println(string(line))
	return err
}

// detachedVariable is set in the environment of the process that detach starts: it serves and does not detach again.
const detachedVariable = "FLIGHTSVC_DETACHED"

// keptVariables and keptPrefixes select the environment of a detached front. Other variables of the process that starts
// it may be wrong for a server: pyspark sets OMP_NUM_THREADS=1 in its workers.
var (
	keptVariables = []string{"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV",
		"LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
		"https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"}
	// the last three are for the credentials of stores
	keptPrefixes = []string{"LC_", "XDG_", "FLIGHTSVC_", "TF_", "CUDA_", "NVIDIA_", "AWS_", "GOOGLE_", "AZURE_"}
)

// keptLogs is how many log files are kept; logFile removes the oldest.
const keptLogs = 20

// detach starts this command again, marked by detachedVariable, in a process session of its own and without the files
// that this process has open. It waits for the handshake line and prints it. When this process has ended, the front has
// no living parent and is in no process group of the caller, so no signal to that group ends it.
func detach(settings config.Serve) error {
	log, err := logFile(settings.RunDir)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// Files that this process was given open must not stay open in the front.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark descriptors: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool {
		return strings.HasPrefix(arg, "--owner-fd=")
	})
	if i := slices.Index(args, "--owner-fd"); i >= 0 {
		args = slices.Delete(args, i, min(i+2, len(args)))
	}
	child := exec.Command(self, args...) //nolint:gosec // this program
	if settings.OwnerFD >= 0 {
		child.ExtraFiles = []*os.File{os.NewFile(uintptr(settings.OwnerFD), "pidfd")}
		child.Args = append(child.Args, "--owner-fd", "3")
	}
	child.Env = append(slices.DeleteFunc(os.Environ(), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return !slices.Contains(keptVariables, name) &&
			!slices.ContainsFunc(keptPrefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
	}), detachedVariable+"=1")
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	child.Stderr = log
	stdout, err := child.StdoutPipe()
	if err != nil {
		return err
	}
	if err := child.Start(); err != nil {
		return err
	}
	line, _ := bufio.NewReader(stdout).ReadBytes('\n') // empty if the front ends first
	var greeting hello
	if err := json.Unmarshal(line, &greeting); err != nil {
		return fmt.Errorf("the front ended before it was ready; its log is %s", log.Name())
	}
	if greeting.Error != "" {
		_ = os.Remove(log.Name()) // it holds nothing besides this error
		return errors.New(greeting.Error)
	}
	return greeting.print()
}

// logFile opens a new log file and removes the oldest.
func logFile(runDir string) (*os.File, error) {
	if runDir == "" {
		runDir = rundir.Default()
	}
	dir := rundir.LogDir(runDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	old, err := filepath.Glob(filepath.Join(dir, "front-*.log"))
	if err != nil {
		return nil, err
	}
	slices.Sort(old) // by time, since their names begin with it
	for _, path := range old[:max(0, len(old)-keptLogs+1)] {
		_ = os.Remove(path)
	}
	name := fmt.Sprintf("front-%s-%d.log", time.Now().UTC().Format("20060102T150405.000"), os.Getpid())
	const flags = os.O_CREATE | os.O_EXCL | os.O_APPEND | os.O_WRONLY
	return os.OpenFile(filepath.Join(dir, name), flags, 0o600) //nolint:gosec // our own folder
}
