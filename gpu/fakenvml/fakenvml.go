// Package fakenvml simulates a host with GPUs, for tests: a C library that a program loads in place of NVIDIA's
// libnvidia-ml.so.1, and the folder that the library reads. Only tests import it. The head of library/fakenvml.c
// describes the folder.
package fakenvml

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

//go:embed library/fakenvml.c
var source []byte

// Host is the library and its folder. Both are removed at the end of the test.
type Host struct {
	Library string // folder of libnvidia-ml.so.1
	State   string // folder that the library reads
}

// New builds the library. Each device is a line as in the file devices: UUID NAME BYTES COMPUTE PARENT.
// The test is skipped where there is no C compiler.
func New(t testing.TB, devices ...string) *Host {
	t.Helper()
	compiler, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("skipped: needs a C compiler")
	}
	h := &Host{Library: t.TempDir(), State: t.TempDir()}
	file := filepath.Join(t.TempDir(), "fakenvml.c")
	if err := os.WriteFile(file, source, 0o600); err != nil {
		t.Fatal(err)
	}
	library := filepath.Join(h.Library, "libnvidia-ml.so.1")
	out, err := exec.Command(compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", library, file).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	text := ""
	for _, device := range devices {
		text += device + "\n"
	}
	h.write(t, text, "devices")
	return h
}

// Env is what a program needs in its environment to see this host.
func (h *Host) Env() []string {
	path := h.Library
	if old := os.Getenv("LD_LIBRARY_PATH"); old != "" {
		path += ":" + old
	}
	return []string{"LD_LIBRARY_PATH=" + path, "FAKENVML_STATE=" + h.State}
}

// Use sets how many bytes of a device a process has, from now until it has ended.
func (h *Host) Use(t testing.TB, uuid string, pid int, bytes int64) {
	t.Helper()
	h.write(t, strconv.FormatInt(bytes, 10), uuid, strconv.Itoa(pid))
}

// Delay sets how long memory stays in use after its process has ended.
func (h *Host) Delay(t testing.TB, delay time.Duration) {
	t.Helper()
	h.write(t, strconv.FormatInt(delay.Milliseconds(), 10), "delay")
}

// Hide hides the processes of a device, as in a container.
func (h *Host) Hide(t testing.TB, uuid string) {
	t.Helper()
	h.write(t, "", uuid, "hidden")
}

// Fail makes all questions about a device fail with a number of nvmlReturn_t; 0 ends that.
func (h *Host) Fail(t testing.TB, uuid string, code int) {
	t.Helper()
	h.write(t, strconv.Itoa(code), uuid, "error")
}

// Hang(true) makes questions about memory wait until Hang(false).
func (h *Host) Hang(t testing.TB, hang bool) {
	t.Helper()
	if hang {
		h.write(t, "", "hang")
	} else if err := os.Remove(filepath.Join(h.State, "hang")); err != nil {
		t.Fatal(err)
	}
}

// XID makes a device, or a MIG instance, report an error.
func (h *Host) XID(t testing.TB, uuid string, xid int) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(h.State, "xid"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintf(file, "%s %d\n", uuid, xid)
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// write puts a file into the state folder in one step.
func (h *Host) write(t testing.TB, text string, path ...string) {
	t.Helper()
	name := filepath.Join(append([]string{h.State}, path...)...)
	err := os.MkdirAll(filepath.Dir(name), 0o700)
	if err == nil {
		err = os.WriteFile(name+".new", []byte(text), 0o600)
	}
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		t.Fatal(err)
	}
}
