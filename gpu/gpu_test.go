// Tests on simulated hosts: devices, placement, promises, recovery and errors.

package gpu

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

func TestMain(m *testing.M) {
	_ = os.Unsetenv("CUDA_VISIBLE_DEVICES") // of who runs the tests
	os.Exit(m.Run())
}

func TestNoDriver(t *testing.T) {
	if _, err := os.Stat("/proc/driver/nvidia"); err == nil {
		t.Skip("skipped: this host has NVIDIA's driver")
	}
	core, said := observer.New(zap.InfoLevel)
	i := Open(Options{LockDir: t.TempDir(), Log: zap.New(core)})
	defer i.Close()
	if want := "no NVIDIA driver: libnvidia-ml.so.1 was not found"; i.Why() != want || len(i.Devices()) != 0 {
		t.Errorf("why %q, devices %v", i.Why(), i.Devices())
	}
	if got := said.All(); len(got) != 1 || got[0].Message != "models run on the CPU" {
		t.Errorf("log %v", got)
	}
	for _, want := range []string{"", "auto", "cpu"} {
		if p := place(t, i, want, gib); p != nil {
			t.Errorf("%q is placed on %v", want, p.Device())
		}
	}
	for _, want := range []string{"gpu", "0", "GPU-1"} {
		choosesNone(t, i, want, fault.Precondition, want, "libnvidia-ml.so.1 was not found", `use "auto" or "cpu"`)
	}
	choosesNone(t, &Inventory{}, "gpu", fault.Precondition, "devices have not been looked up")
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	i.Watch(ctx, func(Device, string) { t.Error("drained") })
}

// choosesNone holds that no device is chosen, and why.
func choosesNone(t *testing.T, i *Inventory, want string, kind fault.Kind, texts ...string) {
	t.Helper()
	_, err := i.Choose(want)
	expect.Fault(t, err, kind, texts...)
}

// placesNone holds that nothing is placed, and why.
func placesNone(t *testing.T, i *Inventory, want string, kind fault.Kind, texts ...string) {
	t.Helper()
	_, err := i.Place(t.Context(), choose(t, i, want), gib)
	expect.Fault(t, err, kind, texts...)
}

// newFront returns a host with so many GPUs in MIG mode, and its only front.
func newFront(t *testing.T, mig int) (*host, *Inventory) {
	h := newHost(t, mig)
	return h, h.front(t.TempDir())
}

// noRoom holds that a device has no room for need bytes, since so many are free.
func noRoom(t *testing.T, i *Inventory, want string, need, free int64) *NoRoom {
	t.Helper()
	var full *NoRoom
	if _, err := i.Place(t.Context(), choose(t, i, want), need); !errors.As(err, &full) || full.Free != free {
		t.Fatalf("%s has room for %d, or not %d bytes free: %v", want, need, free, err)
	}
	return full
}

func TestNoDevices(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*host)
		why    string
	}{
		"driver not loaded": {func(h *host) { h.InitFunc = func() nvml.Return { return nvml.ERROR_DRIVER_NOT_LOADED } },
			"NVIDIA's driver does not work: ERROR_DRIVER_NOT_LOADED"},
		"no count": {func(h *host) {
			h.DeviceGetCountFunc = func() (int, nvml.Return) { return 0, nvml.ERROR_UNKNOWN }
		}, "does not say how many"},
		"none": {func(h *host) {
			h.DeviceGetCountFunc = func() (int, nvml.Return) { return 0, nvml.SUCCESS }
		}, "has no GPU"},
		"unreadable": {func(h *host) { h.ret.Store(int32(nvml.ERROR_UNKNOWN)) },
			"GPU 7: its memory cannot be read"},
		"MIG, no instance": {func(h *host) {
			for _, d := range h.Devices {
				d.(*dgxa100.Device).MigMode = nvml.DEVICE_MIG_ENABLE
				d.(*dgxa100.Device).GetMaxMigDeviceCountFunc = func() (int, nvml.Return) { return 0, nvml.SUCCESS }
			}
		}, "GPU 7 is in MIG mode and has no instance"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 0)
			c.change(h)
			i := h.front(t.TempDir())
			if len(i.Devices()) != 0 || !strings.Contains(i.Why(), c.why) {
				t.Errorf("why %q, devices %v", i.Why(), i.Devices())
			}
			if p := place(t, i, "auto", gib); p != nil {
				t.Errorf("placed on %v", p.Device())
			}
		})
	}
}

func TestDiscovery(t *testing.T) {
	h := newHost(t, 0)
	h.use(h.Devices[3].(*dgxa100.Device).UUID, 1, 10*gib)
	i := h.front(t.TempDir())
	devices := i.Devices()
	if len(devices) != 8 || i.Why() != "" {
		t.Fatalf("%d devices, why %q", len(devices), i.Why())
	}
	want := Device{
		UUID: "GPU-33330000-aaaa-bbbb-cccc-000000000000", Name: "Mock NVIDIA A100-SXM4-40GB", Index: "3",
		Memory: 40 * gib, Free: 30 * gib, Compute: "8.0", Utilisation: 30, Healthy: true,
	}
	if devices[3] != want {
		t.Errorf("got  %+v\nwant %+v", devices[3], want)
	}
	h.use(devices[3].UUID, 1, 20*gib)
	if got := i.Devices()[3].Free; got != 20*gib {
		t.Errorf("%d bytes free after a process grew", got)
	}
}

func TestIdentity(t *testing.T) {
	h := newHost(t, 0)
	gpu := h.Devices[1].(*dgxa100.Device)
	gpu.UUID = "GPU-00001111-aaaa-bbbb-cccc-000000000000"
	i := h.front(t.TempDir())
	for want, index := range map[string]string{
		gpu.UUID:                           "1 ",
		"GPU-00001":                        "1 ",
		"GPU-00000":                        "0 ",
		"GPU-7":                            "7 ",
		"auto":                             "0 1 2 3 4 5 6 7 ",
		"gpu":                              "0 1 2 3 4 5 6 7 ",
		"":                                 "0 1 2 3 4 5 6 7 ",
		"cpu":                              "",
		" GPU-7 , 2, GPU-7777, 2 ,GPU-22 ": "7 2 ",
	} {
		if got := indexes(choose(t, i, want)); got != index {
			t.Errorf("%q chooses %q, not %q", want, got, index)
		}
	}
	for want, part := range map[string]string{
		"GPU-0000": "is the beginning of the UUIDs of 2 devices",
		"GPU-":     "is the beginning of the UUIDs of 8 devices",
		"GPU-9":    `no device "GPU-9"; there is 0 GPU-00000000`,
		"8":        `no device "8"`,
		"0,":       `no device ""`,
		"tpu":      `no device "tpu"`,
	} {
		choosesNone(t, i, want, fault.BadRequest, part)
	}
	p := place(t, i, "GPU-7", gib)
	if got, want := p.Env(), []string{"CUDA_VISIBLE_DEVICES=GPU-77770000-aaaa-bbbb-cccc-000000000000",
		"CUDA_DEVICE_ORDER=PCI_BUS_ID"}; !slices.Equal(got, want) {
		t.Errorf("environment %q, not %q", got, want)
	}
}

func TestSparkAddresses(t *testing.T) {
	i := newHost(t, 1).front(t.TempDir()) // GPU 0 is in MIG mode
	for want, index := range map[string]string{"1": "1 ", "3,1": "3 1 ", "0:2": "0:2 ", "MIG-00000003": "0:3 ",
		"0": "0:0 0:1 0:2 0:3 0:4 0:5 0:6 ", "GPU-0000": "0:0 0:1 0:2 0:3 0:4 0:5 0:6 ", "0:1,7": "0:1 7 "} {
		if got := indexes(choose(t, i, want)); got != index {
			t.Errorf("%q chooses %q, not %q", want, got, index)
		}
	}
}

func TestVisibleDevices(t *testing.T) {
	for spec, index := range map[string]string{
		"3,1":                      "3 1 ",
		"GPU-5":                    "5 ",
		"2,9,3":                    "2 ", // as in CUDA, the first that is not there ends the list
		"":                         "",
		"-1":                       "",
		"0":                        "0:0 0:1 0:2 0:3 0:4 0:5 0:6 ",
		"MIG-00000001,MIG-0000000": "0:1 ", // the second begins several
		"7, 6,7":                   "7 6 ",
	} {
		t.Run(spec, func(t *testing.T) {
			t.Setenv("CUDA_VISIBLE_DEVICES", spec)
			i := newHost(t, 1).front(t.TempDir())
			if got := indexes(choose(t, i, "auto")); got != index {
				t.Errorf("there is %q, not %q", got, index)
			}
			if index == "" {
				choosesNone(t, i, "gpu", fault.Precondition, "hides all GPUs")
			} else {
				choosesNone(t, i, "4", fault.BadRequest, `no device "4"`)
			}
		})
	}
}

func TestMIG(t *testing.T) {
	_, i := newFront(t, 2)
	devices := i.Devices()
	if got, want := indexes(devices),
		"0:0 0:1 0:2 0:3 0:4 0:5 0:6 1:0 1:1 1:2 1:3 1:4 1:5 1:6 2 3 4 5 6 7 "; got != want {
		t.Fatalf("devices %q, not %q", got, want)
	}
	first := devices[0]
	if first.Parent != devices[1].Parent || first.Parent != "GPU-00000000-aaaa-bbbb-cccc-000000000000" ||
		first.Memory != 5*gib || first.Compute != "8.0" || first.Utilisation != -1 ||
		!strings.HasSuffix(first.Name, "MIG 1g.5gb") {
		t.Errorf("instance %+v", first)
	}
	if got := indexes(choose(t, i, "1:5,1:6")); got != "1:5 1:6 " {
		t.Errorf("chosen %q", got)
	}
	p := place(t, i, "1:3", 3*gib)
	if got := p.Env()[0]; got != "CUDA_VISIBLE_DEVICES=MIG-11110003-aaaa-bbbb-cccc-000000000000" {
		t.Errorf("environment %q", got)
	}
	p.Settle(0)
	noRoom(t, i, "1:3", 3*gib, 2*gib) // second process
	place(t, i, "1:2", 5*gib)         // another instance has memory of its own
	place(t, i, "1:5", 4*gib).Settle(0)
	noRoom(t, i, "1:6", 2*gib, gib) // compute instances of one GPU instance share its memory
}

func TestPlacementPinned(t *testing.T) {
	h, i := newFront(t, 0)
	h.use(i.Devices()[2].UUID, 1, 30*gib)
	if got := place(t, i, "2", 10*gib).Device().Index; got != "2" {
		t.Errorf("placed on %s, not on the fullest, which was asked for", got)
	}
	if got := place(t, i, "4,5", gib).Device().Index; got != "4" {
		t.Errorf("placed on %s; both are empty, so the first", got)
	}
}

func TestPlacementMostFree(t *testing.T) {
	h, i := newFront(t, 0)
	for n, d := range i.Devices() {
		h.use(d.UUID, 1, int64(10-n)*gib) // 7 has most
	}
	var got []string
	for range 3 {
		p := place(t, i, "auto", 3*gib/2)
		p.Settle(0) // nothing has been taken, so this is a promise
		got = append(got, p.Device().Index)
	}
	if want := []string{"7", "6", "7"}; !slices.Equal(got, want) {
		t.Errorf("placed on %q, not %q", got, want)
	}
}

func TestAdmission(t *testing.T) {
	h, i := newFront(t, 0)
	device := i.Devices()[0].UUID
	p := place(t, i, "0", 30*gib)
	h.use(device, 7, 12*gib)
	if got := p.Measure(7); got != 12*gib {
		t.Errorf("process has %d bytes", got)
	}
	p.Settle(25 * gib)
	full := noRoom(t, i, "0", 16*gib, 15*gib) // 28 GiB are free and 13 of them promised
	if full.Need != 16*gib || full.Device.Index != "0" {
		t.Errorf("%+v", full)
	}
	for _, part := range []string{device, "index 0", "15360 MiB free of 40960 MiB", "16384 MiB are needed"} {
		if !strings.Contains(full.Error(), part) {
			t.Errorf("%q does not say %q", full, part)
		}
	}
	second := place(t, i, "0", 15*gib)
	second.Settle(0)
	if err := second.Release(t.Context()); err != nil {
		t.Errorf("a process that never took anything: %v", err)
	}
	p.Measure(7)
	h.end(device, 7, 0)
	if err := p.Release(t.Context()); err != nil {
		t.Error(err)
	}
	place(t, i, "0", 40*gib)
	noRoom(t, i, "1,2", 41*gib, 40*gib) // more than there is
}

// A failed load gives all back, though nobody measured or settled it.
func TestLoadThatFails(t *testing.T) {
	h, i := newFront(t, 0)
	p := place(t, i, "0", 30*gib)
	h.use(p.Device().UUID, 7, 20*gib)
	h.end(p.Device().UUID, 7, 20*time.Millisecond)
	if err := p.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if err := p.Release(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
	p.Settle(gib) // does nothing any more
	place(t, i, "0", 40*gib)
}

func TestMemoryComesBackLate(t *testing.T) {
	h, i := newFront(t, 0)
	i.patience = 5 * time.Second
	device := i.Devices()[0].UUID
	p := place(t, i, "0", 30*gib)
	h.use(device, 7, 30*gib)
	p.Measure(7)
	p.Settle(0)
	h.end(device, 7, 100*time.Millisecond)
	start := time.Now()
	released := make(chan error)
	go func() { released <- p.Release(context.Background()) }()
	expect.Eventually(t, "release locks the device", func() bool { return len(i.devices[0].memory.turn) > 0 })
	next := place(t, i, "0", 35*gib) // waits for it
	if took := time.Since(start); took < 90*time.Millisecond {
		t.Errorf("placed after %v, before the memory was back", took)
	}
	if err := <-released; err != nil {
		t.Error(err)
	}

	h.use(device, 8, 35*gib)
	next.Measure(8)
	next.Settle(0)
	i.patience = 20 * time.Millisecond
	h.end(device, 8, time.Hour)
	if err := next.Release(t.Context()); err == nil || !strings.Contains(err.Error(),
		"35840 of 35840 MiB are not free again") {
		t.Errorf("memory that never comes back: %v", err)
	}
	noRoom(t, i, "0", 10*gib, 5*gib) // it was counted as free
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	again := place(t, i, "1", gib)
	h.use(again.Device().UUID, 9, gib)
	again.Measure(9)
	h.end(again.Device().UUID, 9, time.Hour)
	if err := again.Release(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who left: %v", err)
	}
}

// overcommit runs random loads on a host, on several fronts at once: each takes part of its cost while it loads and
// the rest later, or less than that. The simulated host fails the test the moment that memory is missing.
func overcommit(t *testing.T, h *host, placements int, words []string, most int64) {
	var fronts []*Inventory
	dir := t.TempDir()
	for range 3 {
		i := h.front(dir)
		if i.patience = 5 * time.Second; h.hidden.Load() {
			i.patience = 5 * time.Millisecond // what others take looks like what has not come back
		}
		fronts = append(fronts, i)
	}
	var placed, refused, pids atomic.Int64
	var group sync.WaitGroup
	for worker := range 12 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 1))
			i := fronts[worker%len(fronts)]
			type running struct {
				*Placement
				uuid       string
				pid        int
				used, cost int64
			}
			var runs []*running
			end := func(n int) {
				r := runs[n]
				runs = slices.Delete(runs, n, n+1)
				r.Measure(r.pid)
				h.end(r.uuid, r.pid, time.Duration(random.IntN(3))*time.Millisecond)
				if err := r.Release(t.Context()); err != nil && !h.hidden.Load() {
					t.Error(err)
				}
			}
			for placed.Load() < int64(placements) && !t.Failed() {
				want := choose(t, i, words[random.IntN(len(words))])
				need := 1 + random.Int64N(most)
				p, err := i.Place(t.Context(), want, need)
				if full := (*NoRoom)(nil); errors.As(err, &full) {
					refused.Add(1)
					if len(runs) > 0 {
						end(random.IntN(len(runs)))
					}
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				placed.Add(1)
				r := &running{Placement: p, uuid: p.Device().UUID, pid: int(pids.Add(1)), cost: need}
				r.used = random.Int64N(need + 1)
				h.use(r.uuid, r.pid, r.used)
				p.Measure(r.pid)
				if random.IntN(4) == 0 && !h.hidden.Load() {
					r.cost = r.used // it takes less than was thought
				}
				p.Settle(max(1, r.cost))
				runs = append(runs, r)
				grow := runs[random.IntN(len(runs))]
				grow.used += random.Int64N(grow.cost - grow.used + 1)
				h.use(grow.uuid, grow.pid, grow.used)
				if random.IntN(2) == 0 {
					grow.Measure(grow.pid)
				}
				for len(runs) > 4 || len(runs) > 0 && random.IntN(4) == 0 {
					end(random.IntN(len(runs)))
				}
			}
			for len(runs) > 0 {
				end(0)
			}
		})
	}
	group.Wait()
	full := int64(0)
	for _, m := range h.memories {
		full = max(full, 100*m.most/m.total)
	}
	t.Logf("%d placed, %d refused; the fullest device had %d %% taken", placed.Load(), refused.Load(), full)
	if placed.Load() < int64(placements) || refused.Load() == 0 || full < 80 {
		t.Error("that is not a test of full devices")
	}
	for _, i := range fronts {
		for _, d := range i.devices {
			if left, err := i.promised(d.memory); left != 0 || err != nil {
				t.Errorf("%s: %d bytes are promised at the end, %v", d.UUID, left, err)
			}
		}
	}
}

// placements is how many there are: all that are promised where FLIGHTSVC_PROVE is set, else some.
func placements() int {
	if os.Getenv("FLIGHTSVC_PROVE") == "1" {
		return 10_000
	}
	return 1_500
}

func TestNoOvercommit(t *testing.T) {
	overcommit(t, newHost(t, 0), placements(), []string{"auto", "auto", "3", "1,5", "GPU-7"}, 30*gib)
}

func TestNoOvercommitMIG(t *testing.T) {
	overcommit(t, newHost(t, 8), placements(), []string{"auto", "3", "3:5", "3:6", "3:5,3:6", "MIG-77770001"}, 4*gib)
}

// In a container NVML lists no process.
func TestNoOvercommitWithoutProcesses(t *testing.T) {
	h := newHost(t, 0)
	h.hidden.Store(true)
	overcommit(t, h, 1_000, []string{"auto", "3", "1,5"}, 30*gib)
}

func TestMeasureWithoutProcesses(t *testing.T) {
	h := newHost(t, 0)
	h.hidden.Store(true)
	i := h.front(t.TempDir())
	p := place(t, i, "0", 10*gib)
	h.use(p.Device().UUID, 7, 6*gib)
	if got := p.Measure(7); got != 6*gib {
		t.Errorf("%d bytes while loading", got)
	}
	p.Settle(0)
	h.use(p.Device().UUID, 7, 8*gib)
	if got := p.Measure(7); got != 6*gib {
		t.Errorf("%d bytes after loading, when nobody knows", got)
	}
	noRoom(t, i, "0", 40*gib, 28*gib) // 32 GiB are free, 4 may be promised still
}

func TestTwoFronts(t *testing.T) {
	h, dir := newHost(t, 0), filepath.Join(t.TempDir(), "new", "locks")
	one, two := h.front(dir), h.front(dir)
	p := place(t, one, "0", 30*gib)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := two.Place(ctx, choose(t, two, "0"), gib)
	expect.Fault(t, err, fault.Unavailable, "device GPU-0000", "another model is being loaded there", "ask again")
	if got := place(t, two, "0,1", gib).Device().Index; got != "1" {
		t.Errorf("placed on %s though 1 is not being loaded on", got)
	}
	waited := make(chan *Placement)
	go func() { waited <- place(t, two, "0", 10*gib) }()
	p.Settle(0)
	second := <-waited
	second.Settle(0)
	noRoom(t, one, "0", gib, 0) // the promises of both fill it

	// A front that dies leaves its file and no lock on it.
	m := two.devices[0].memory
	name := m.held.Name()
	text, err := os.ReadFile(name)
	if err != nil || len(text) != widest || strings.TrimSpace(string(text)) != "10737418240" {
		t.Errorf("%s holds %q, %v", name, text, err)
	}
	two.mu.Lock()
	_ = m.held.Close()
	m.held = nil
	two.mu.Unlock()
	place(t, one, "0", 10*gib)
	if _, err := os.Stat(name); err == nil {
		t.Error("the file of a dead front is still there")
	}
	for _, folder := range []string{dir, filepath.Join(dir, one.devices[0].UUID)} {
		if info, err := os.Stat(folder); err != nil || info.Mode() != os.ModeDir|os.ModeSticky|0o777 {
			t.Errorf("%s: %v, %v", folder, info, err)
		}
	}
}

func TestLockFolder(t *testing.T) {
	h := newHost(t, 0)
	file := filepath.Join(t.TempDir(), "file")
	expect.Write(t, file, "")
	i := h.front(filepath.Join(file, "locks"))
	placesNone(t, i, "0", fault.Precondition, "lock of device", "not a directory")

	dir := t.TempDir()
	i = h.front(dir)
	if err := os.Symlink(file, filepath.Join(dir, i.devices[0].UUID)); err != nil {
		t.Fatal(err)
	}
	placesNone(t, i, "0", fault.Precondition, "lock of device", "not a directory")

	place(t, i, "1", gib).Settle(0)
	other, err := os.Create(filepath.Join(dir, i.devices[1].UUID, "front-x"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if _, err := other.WriteString("much"); err != nil {
		t.Fatal(err)
	}
	if err := flock(other); err != nil {
		t.Fatal(err)
	}
	placesNone(t, i, "1", fault.Precondition, `holds "much"`, "remove the file")
}

// TestLockFolderOfOthers has what other users may put into a folder of all users.
func TestLockFolderOfOthers(t *testing.T) {
	h := newHost(t, 0)
	home := t.TempDir()
	link := filepath.Join(t.TempDir(), "locks")
	if err := os.Symlink(home, link); err != nil {
		t.Fatal(err)
	}
	i := h.front(link)
	placesNone(t, i, "0", fault.Precondition, "lock of device", "locks")
	if made, err := os.ReadDir(home); err != nil || len(made) > 0 {
		t.Errorf("behind a link, %v were made: %v", made, err)
	}

	dir := t.TempDir()
	i = h.front(dir)
	place(t, i, "0", gib).Settle(0)
	pipe := filepath.Join(dir, i.devices[0].UUID, "front-pipe")
	if err := unix.Mkfifo(pipe, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(pipe, pipe+"-link"); err != nil {
		t.Fatal(err)
	}
	placed := make(chan error, 1)
	go func() {
		p, err := i.Place(t.Context(), choose(t, i, "0"), gib)
		p.Settle(0)
		placed <- err
	}()
	select {
	case err := <-placed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("a pipe keeps the device locked")
		if writer, err := os.OpenFile(pipe, os.O_WRONLY, 0); err == nil {
			_ = writer.Close()
		}
		<-placed
	}
}

// isNext holds that the next device that is drained, with the reason, begins like this.
func isNext(t *testing.T, drained chan string, want string) {
	t.Helper()
	if got := <-drained; !strings.HasPrefix(got, want) {
		t.Errorf("drained %q, not %q", got, want)
	}
}

// watch starts Watch and returns the devices that it drains.
func watch(t *testing.T, i *Inventory) chan string {
	drained := make(chan string, 100)
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { i.Watch(ctx, func(d Device, reason string) { drained <- d.Index + ": " + reason }) })
	t.Cleanup(func() { cancel(); group.Wait() })
	return drained
}

func TestXIDDrains(t *testing.T) {
	h, i := newFront(t, 1)
	drained := watch(t, i)
	send := func(gpu int, xid uint64, gi, ci uint32) {
		h.events <- nvml.EventData{Device: h.Devices[gpu], EventType: nvml.EventTypeXidCriticalError, EventData: xid,
			GpuInstanceId: gi, ComputeInstanceId: ci}
	}
	for xid := range applicationXIDs {
		send(2, xid, none, none)
	}
	h.events <- nvml.EventData{Device: h.Devices[2], EventType: nvml.EventTypeSingleBitEccError}
	send(3, 79, none, none)
	if got, want := <-drained, "3: XID 79, see NVIDIA's catalogue of XID errors"; got != want {
		t.Errorf("drained %q, not %q", got, want)
	}
	choosesNone(t, i, "3", fault.Unavailable, "all are drained", "XID 79", "reset the GPU")
	if got := indexes(choose(t, i, "2,3,4")); got != "2 4 " {
		t.Errorf("chosen %q", got)
	}
	if d := i.Devices()[9]; d.Index != "3" || d.Healthy || !strings.Contains(d.Reason, "XID 79") {
		t.Errorf("%+v", d)
	}
	send(0, 48, 4, 0) // one instance
	isNext(t, drained, "0:3: XID 48")
	send(0, 48, 6, 1) // one of two compute instances
	isNext(t, drained, "0:6: XID 48")
	send(0, 95, none, none) // all that are left
	for _, index := range []string{"0:0", "0:1", "0:2", "0:4", "0:5"} {
		isNext(t, drained, index+": XID 95")
	}
	if got := indexes(choose(t, i, "auto")); got != "1 2 4 5 6 7 " {
		t.Errorf("chosen %q", got)
	}
}

func TestMetricsGone(t *testing.T) {
	h, i := newFront(t, 0)
	drained := watch(t, i)
	p := place(t, i, "0", 10*gib)
	p.Settle(0)
	h.ret.Store(int32(nvml.ERROR_UNKNOWN))
	for _, d := range i.Devices() {
		if !d.Healthy || d.Free != 40*gib || !strings.Contains(d.Reason, "cannot be read: ERROR_UNKNOWN") {
			t.Errorf("%+v", d)
		}
	}
	placesNone(t, i, "auto", fault.Unavailable, "no device can take a model", "ERROR_UNKNOWN")
	p.Measure(7)
	if err := p.Release(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be read") {
		t.Errorf("release: %v", err)
	}
	h.ret.Store(int32(nvml.SUCCESS))
	if d := i.Devices()[0]; !d.Healthy || d.Reason != "" {
		t.Errorf("%+v", d)
	}
	place(t, i, "0", 40*gib)
	select {
	case got := <-drained:
		t.Errorf("drained %s", got)
	default:
	}
}

func TestLostDevice(t *testing.T) {
	h, i := newFront(t, 0)
	drained := watch(t, i)
	h.perDevice.Store(i.Devices()[5].UUID, nvml.ERROR_GPU_IS_LOST)
	if got := len(choose(t, i, "auto")); got != 8 {
		t.Errorf("%d devices before anybody looked", got)
	}
	if p := place(t, i, "4,5", gib); p.Device().Index != "4" {
		t.Errorf("placed on %v", p.Device())
	}
	isNext(t, drained, "5: NVIDIA's driver lost it")
}

func TestSilentDriver(t *testing.T) {
	h, i := newFront(t, 0)
	p := place(t, i, "1", gib)
	wait := make(chan string)
	h.ask.Store(&wait)
	i.limit = 20 * time.Millisecond
	for range 3 {
		if d := i.Devices()[0]; !d.Healthy || !strings.Contains(d.Reason, "does not answer within 20ms") {
			t.Errorf("%+v", d)
		}
	}
	if got := p.Measure(1); got != 0 {
		t.Errorf("%d bytes", got)
	}
	placesNone(t, i, "0", fault.Unavailable, "does not answer")
	h.ask.Store(nil)
	close(wait)
	expect.Eventually(t, "the driver answers again", func() bool { return i.Devices()[0].Reason == "" })
	place(t, i, "0", gib)
}

// TestDriverThatWakesUp has a front that starts, offers the processor and ends while the driver is silent.
func TestDriverThatWakesUp(t *testing.T) {
	awake := make(chan struct{})
	h := newHost(t, 0)
	h.InitFunc = func() nvml.Return { <-awake; return nvml.SUCCESS }
	i := Open(Options{NVML: h, LockDir: t.TempDir()})
	defer i.Close()
	if p := place(t, i, "cpu", gib); p != nil {
		t.Errorf("placed on %v", p.Device())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	i.Watch(ctx, func(Device, string) { t.Error("drained") })
	i.Close()
	close(awake)
	if got := indexes(choose(t, i, "auto")); got != "0 1 2 3 4 5 6 7 " {
		t.Errorf("there is %q", got)
	}
}

func TestProcessor(t *testing.T) {
	i := newHost(t, 0).front(t.TempDir())
	p := place(t, i, "cpu", gib)
	if p != nil || p.Measure(1) != 0 || p.Device() != (Device{}) || p.Release(t.Context()) != nil ||
		!slices.Equal(p.Env(), []string{"CUDA_VISIBLE_DEVICES=-1"}) {
		t.Errorf("%+v", p)
	}
	p.Settle(1)
}
