// Tests on a library that NVML loads as it loads NVIDIA's.

package gpu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"flightsvc/gpu/fakenvml"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

// TestLibrary runs TestInLibrary in a process of its own, which finds a library in C in place of NVIDIA's.
func TestLibrary(t *testing.T) {
	h := fakenvml.New(t,
		"GPU-aaaa NVIDIA_A100-SXM4-40GB 42949672960 8.0 -",
		"GPU-bbbb NVIDIA_H100_80GB_HBM3 85899345920 9.0 -",
		"MIG-cccc NVIDIA_H100_80GB_HBM3_MIG_1g.10gb 10737418240 9.0 GPU-bbbb",
		"MIG-dddd NVIDIA_H100_80GB_HBM3_MIG_1g.10gb 10737418240 9.0 GPU-bbbb",
	)
	test := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInLibrary$", "-test.v")
	test.Env = append(os.Environ(), append(h.Env(), "FLIGHTSVC_TEST_LIBRARY="+h.Library)...)
	out, err := test.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "PASS: TestInLibrary") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestInLibrary(t *testing.T) {
	library := os.Getenv("FLIGHTSVC_TEST_LIBRARY")
	if library == "" {
		t.Skip("skipped: run by TestLibrary")
	}
	h := &fakenvml.Host{Library: library, State: os.Getenv("FAKENVML_STATE")}
	i := Open(Options{LockDir: t.TempDir()})
	defer i.Close()
	if got, want := fmt.Sprint(i.Devices()), "[GPU-aaaa (NVIDIA A100-SXM4-40GB, index 0) MIG-cccc (NVIDIA H100 80GB "+
		"HBM3 MIG 1g.10gb, index 1:0) MIG-dddd (NVIDIA H100 80GB HBM3 MIG 1g.10gb, index 1:1)]"; got != want {
		t.Fatalf("devices %s, why %q", got, i.Why())
	}
	if d := i.Devices()[2]; d.Compute != "9.0" || d.Memory != 10*gib || d.Free != 10*gib || d.Parent != "GPU-bbbb" ||
		d.Utilisation != -1 {
		t.Errorf("%+v", d)
	}

	start := func() *exec.Cmd {
		process := exec.Command("sleep", "100")
		if err := process.Start(); err != nil {
			t.Fatal(err)
		}
		return process
	}
	end := func(process *exec.Cmd) {
		_ = process.Process.Kill()
		_ = process.Wait()
	}
	p := place(t, i, "auto", 30*gib)
	if got := p.Env()[0]; got != "CUDA_VISIBLE_DEVICES=GPU-aaaa" {
		t.Errorf("environment %q", got)
	}
	first, other := start(), start()
	defer end(other)
	h.Use(t, "GPU-aaaa", first.Process.Pid, 20*gib)
	h.Use(t, "GPU-aaaa", other.Process.Pid, 5*gib)
	if got := p.Measure(first.Process.Pid); got != 20*gib {
		t.Errorf("process has %d bytes", got)
	}
	p.Settle(20 * gib)
	if d := i.Devices()[0]; d.Free != 15*gib || d.Utilisation != 1 {
		t.Errorf("%+v", d)
	}
	var full *NoRoom
	if _, err := i.Place(t.Context(), choose(t, i, "0"), 16*gib); !errors.As(err, &full) || full.Free != 15*gib {
		t.Errorf("no room: %v", err)
	}
	h.Delay(t, 600*time.Millisecond)
	end(first)
	began := time.Now()
	if err := p.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < 500*time.Millisecond || took > 3*time.Second {
		t.Errorf("released after %v, the memory was to come back after 600 ms", took)
	}

	// In a container.
	h.Hide(t, "MIG-dddd")
	hidden := place(t, i, "1:1", 8*gib)
	second := start()
	h.Use(t, "MIG-dddd", second.Process.Pid, 6*gib)
	if got := hidden.Measure(second.Process.Pid); got != 6*gib {
		t.Errorf("a process that is not listed has %d bytes", got)
	}
	hidden.Settle(0)
	end(second)
	if err := hidden.Release(t.Context()); err != nil {
		t.Error(err)
	}

	h.Fail(t, "MIG-dddd", int(nvml.ERROR_UNKNOWN))
	if d := i.Devices()[2]; !d.Healthy || d.Reason != "its numbers cannot be read: Unknown Error" {
		t.Errorf("%+v", d)
	}
	h.Fail(t, "MIG-dddd", 0)
	h.Hang(t, true)
	i.limit = 100 * time.Millisecond
	if d := i.Devices()[2]; !d.Healthy || !strings.Contains(d.Reason, "does not answer") {
		t.Errorf("%+v", d)
	}
	h.Hang(t, false)
	expect.Eventually(t, "the driver answers again", func() bool { return i.Devices()[2].Reason == "" })
	i.limit = callLimit

	drained := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() { i.Watch(ctx, func(d Device, reason string) { drained <- d.UUID + " " + reason }) })
	stop := func() { cancel(); group.Wait() }
	defer stop()
	drainedBy := func(xid int, uuid string) string { // again until the set of events is there
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
			h.XID(t, uuid, 31)
			h.XID(t, uuid, xid)
			select {
			case got := <-drained:
				return got
			case <-time.After(200 * time.Millisecond):
			}
		}
		return "nothing"
	}
	if got := drainedBy(48, "MIG-cccc"); got != "MIG-cccc XID 48, see NVIDIA's catalogue of XID errors" {
		t.Errorf("drained: %s", got)
	}

	h.Fail(t, "MIG-dddd", int(nvml.ERROR_GPU_IS_LOST))
	_, err := i.Place(t.Context(), choose(t, i, "1:1"), gib)
	expect.Fault(t, err, fault.Unavailable, "NVIDIA's driver lost it: GPU is lost")
	if got := <-drained; !strings.HasPrefix(got, "MIG-dddd NVIDIA's driver lost it") {
		t.Errorf("drained: %s", got)
	}
	if got := drainedBy(79, "GPU-aaaa"); !strings.HasPrefix(got, "GPU-aaaa XID 79") {
		t.Errorf("drained: %s", got)
	}
	_, err = i.Choose("auto")
	expect.Fault(t, err, fault.Unavailable, "all are drained", "GPU-aaaa", "XID 79", "MIG-cccc", "XID 48", "MIG-dddd")
}
