// A simulated host with GPUs, whose memory and errors a test sets.

package gpu

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"golang.org/x/sys/unix"
)

const gib = int64(1) << 30

// host is go-nvml's own simulation of a DGX A100, with memory that processes take and give back, with events, and,
// if asked, with MIG instances.
type host struct {
	*dgxa100.Server
	t         testing.TB
	memories  map[string]*simulated // by UUID
	instances map[string][]string   // UUIDs by that of the GPU
	events    chan nvml.EventData
	ret       atomic.Int32                // what questions about memory get, if not SUCCESS
	perDevice sync.Map                    // the same by UUID
	hidden    atomic.Bool                 // processes are not listed
	ask       atomic.Pointer[chan string] // questions about memory wait until it is closed
	shut      atomic.Int32
}

// simulated is the memory of a device.
type simulated struct {
	mu    sync.Mutex
	total int64
	used  map[int]int64 // by process; those below 0 have ended and their memory is on its way back
	most  int64
}

// newHost simulates 8 GPUs of 40 GiB, the first of which are in MIG mode, each with 7 instances of 5 GiB of which the
// last two are compute instances of one GPU instance.
func newHost(t testing.TB, inMIGMode int) *host {
	h := &host{Server: dgxa100.New(), t: t, memories: map[string]*simulated{}, instances: map[string][]string{},
		events: make(chan nvml.EventData, 16)}
	h.ShutdownFunc = func() nvml.Return { h.shut.Add(1); return nvml.SUCCESS }
	h.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) {
		return &mock.EventSet{
			WaitFunc: func(ms uint32) (nvml.EventData, nvml.Return) {
				select {
				case event := <-h.events:
					return event, nvml.SUCCESS
				case <-time.After(time.Duration(ms) * time.Millisecond / 50):
					return nvml.EventData{}, nvml.ERROR_TIMEOUT
				}
			},
			FreeFunc: func() nvml.Return { return nvml.SUCCESS },
		}, nvml.SUCCESS
	}
	for n := range h.Devices {
		gpu := h.Devices[n].(*dgxa100.Device)
		gpu.UUID = fmt.Sprintf("GPU-%d%d%d%d0000-aaaa-bbbb-cccc-000000000000", n, n, n, n)
		h.give(&gpu.Device, gpu.UUID, 40*gib, nil)
		gpu.GetUtilizationRatesFunc = func() (nvml.Utilization, nvml.Return) {
			return nvml.Utilization{Gpu: uint32(10 * n)}, nvml.SUCCESS
		}
		gpu.RegisterEventsFunc = func(types uint64, _ nvml.EventSet) nvml.Return {
			if types != nvml.EventTypeXidCriticalError {
				t.Errorf("registered for events %#x", types)
			}
			return nvml.SUCCESS
		}
		if n >= inMIGMode {
			continue
		}
		gpu.MigMode = nvml.DEVICE_MIG_ENABLE
		var instances []nvml.Device
		var shared *simulated
		for m := range 7 {
			instance := &mock.Device{}
			uuid := fmt.Sprintf("MIG-%d%d%d%d000%d-aaaa-bbbb-cccc-000000000000", n, n, n, n, m)
			h.give(instance, uuid, 5*gib, shared)
			if m == 5 {
				shared = h.memories[uuid]
			}
			instance.GetUUIDFunc = func() (string, nvml.Return) { return uuid, nvml.SUCCESS }
			instance.GetNameFunc = func() (string, nvml.Return) { return gpu.Name + " MIG 1g.5gb", nvml.SUCCESS }
			instance.GetCudaComputeCapabilityFunc = func() (int, int, nvml.Return) {
				return 0, 0,
					nvml.ERROR_NOT_SUPPORTED
			}
			instance.GetGpuInstanceIdFunc = func() (int, nvml.Return) { return min(m, 5) + 1, nvml.SUCCESS }
			instance.GetComputeInstanceIdFunc = func() (int, nvml.Return) { return max(m, 5) - 5, nvml.SUCCESS }
			instances = append(instances, instance)
			h.instances[gpu.UUID] = append(h.instances[gpu.UUID], uuid)
		}
		gpu.GetMaxMigDeviceCountFunc = func() (int, nvml.Return) { return 8, nvml.SUCCESS }
		gpu.GetMigDeviceHandleByIndexFunc = func(m int) (nvml.Device, nvml.Return) {
			if m >= len(instances) {
				return nil, nvml.ERROR_NOT_FOUND
			}
			return instances[m], nvml.SUCCESS
		}
	}
	return h
}

// give gives a device memory of its own, or that of another one.
func (h *host) give(d *mock.Device, uuid string, bytes int64, memory *simulated) {
	if memory == nil {
		memory = &simulated{total: bytes, used: map[int]int64{}}
	}
	h.memories[uuid] = memory
	broken := func() nvml.Return {
		if wait := h.ask.Load(); wait != nil {
			<-*wait
		}
		if ret, ok := h.perDevice.Load(uuid); ok {
			return ret.(nvml.Return)
		}
		return nvml.Return(h.ret.Load())
	}
	d.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) {
		memory.mu.Lock()
		defer memory.mu.Unlock()
		used := memory.sum()
		return nvml.Memory{Total: uint64(memory.total), Free: uint64(memory.total - used), Used: uint64(used)}, broken()
	}
	d.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) {
		memory.mu.Lock()
		defer memory.mu.Unlock()
		var list []nvml.ProcessInfo
		for pid, bytes := range memory.used {
			if pid > 0 && !h.hidden.Load() {
				list = append(list, nvml.ProcessInfo{Pid: uint32(pid), UsedGpuMemory: uint64(bytes)})
			}
		}
		return list, broken()
	}
}

func (m *simulated) sum() int64 {
	sum := int64(0)
	for _, bytes := range m.used {
		sum += bytes
	}
	return sum
}

// use lets a process have so many bytes, and fails the test if they are not there.
func (h *host) use(uuid string, pid int, bytes int64) {
	m := h.memories[uuid]
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used[pid] = bytes
	m.most = max(m.most, m.sum())
	if m.sum() > m.total {
		h.t.Errorf("%s is over-committed: %d of %d MiB", uuid, m.sum()>>20, m.total>>20)
	}
}

// end ends a process, whose memory comes back after a while.
func (h *host) end(uuid string, pid int, late time.Duration) {
	m := h.memories[uuid]
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used[-pid] = m.used[pid]
	delete(m.used, pid)
	if late == 0 {
		delete(m.used, -pid)
		return
	}
	time.AfterFunc(late, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.used, -pid)
	})
}

// front opens an Inventory of the host that is quicker than a real one.
func (h *host) front(lockDir string) *Inventory {
	h.t.Helper()
	i := Open(Options{NVML: h, LockDir: lockDir})
	i.wait()
	i.retry, i.poll, i.patience = time.Millisecond, time.Millisecond, 200*time.Millisecond
	h.t.Cleanup(i.Close)
	return i
}

// choose chooses or fails.
func choose(t testing.TB, i *Inventory, want string) []Device {
	t.Helper()
	chosen, err := i.Choose(want)
	if err != nil {
		t.Fatal(err)
	}
	return chosen
}

// place places or fails.
func place(t testing.TB, i *Inventory, want string, need int64) *Placement {
	t.Helper()
	p, err := i.Place(t.Context(), choose(t, i, want), need)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func indexes(devices []Device) string {
	text := ""
	for _, d := range devices {
		text += d.Index + " "
	}
	return text
}

// flock does to a file what a front does to its own.
func flock(file *os.File) error { return unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
