// Detaching: a front in a session of its own, and the line by which it says that it serves.

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

// hello is the handshake: one line of JSON on standard output when the front serves.
type hello struct {
	Flightsvc string `json:"flightsvc,omitempty"` // version
	Build     string `json:"build,omitempty"`
	Endpoint  string `json:"endpoint,omitempty"`
	PID       int    `json:"pid,omitempty"`
	Error     string `json:"error,omitempty"` // between a detached front and its starter only
}

func (h hello) print() error {
	line, err := json.Marshal(h)
	if err != nil {
		return err
	}
	_, err = fmt.Println(string(line))
	return err
}

// detachedVariable marks the process that detach starts.
const detachedVariable = "FLIGHTSVC_DETACHED"

// keptVariables and keptPrefixes are the environment of a detached front. Whoever starts it may have
// settings that are wrong for a server: pyspark sets OMP_NUM_THREADS=1 in its workers.
var (
	keptVariables = []string{"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV",
		"LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
		"https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"}
	// the last three are credentials for models in stores
	keptPrefixes = []string{"LC_", "XDG_", "FLIGHTSVC_", "TF_", "CUDA_", "NVIDIA_", "AWS_", "GOOGLE_", "AZURE_"}
)

// keptLogs is how many log files stay; the oldest go first.
const keptLogs = 20

// detach starts this command again, marked by detachedVariable, in a new session with no descriptors
// but its own, waits for its handshake, and passes that on. The started front has no parent that
// lives, so nobody's process group takes it down.
func detach(settings config.Serve) error {
	log, err := logFile(settings.RunDir)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// Nothing that was left open in this process may stay open in the front.
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
	child := exec.Command(self, args...) //nolint:gosec // ourselves
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
	line, _ := bufio.NewReader(stdout).ReadBytes('\n') // a front that ends first leaves it empty
	var greeting hello
	if err := json.Unmarshal(line, &greeting); err != nil {
		return fmt.Errorf("the front ended before it was ready; its log is %s", log.Name())
	}
	if greeting.Error != "" {
		_ = os.Remove(log.Name()) // it says no more than the error
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
	slices.Sort(old) // by time, as in their names
	for _, path := range old[:max(0, len(old)-keptLogs+1)] {
		_ = os.Remove(path)
	}
	name := fmt.Sprintf("front-%s-%d.log", time.Now().UTC().Format("20060102T150405.000"), os.Getpid())
	const flags = os.O_CREATE | os.O_EXCL | os.O_APPEND | os.O_WRONLY
	return os.OpenFile(filepath.Join(dir, name), flags, 0o600) //nolint:gosec // our own folder
}
