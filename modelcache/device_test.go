// Tests of placing models on simulated GPUs, with runners that are no processes.

package modelcache

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"

	"flightsvc/gpu"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/modelcache/repository"
)

// devicesOf returns the 8 GPUs that go-nvml simulates, empty and of 40 GiB, in which no process is ever seen.
func devicesOf(t *testing.T) *gpu.Inventory { return losing(t, new(atomic.Bool)) }

// losing returns the same devices; the driver loses them all once lost is set.
func losing(t *testing.T, lost *atomic.Bool) *gpu.Inventory {
	t.Helper()
	host := dgxa100.New()
	for _, d := range host.Devices {
		device := d.(*dgxa100.Device)
		device.MemoryInfo.Free = device.MemoryInfo.Total
		device.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) {
			if lost.Load() {
				return nvml.Memory{}, nvml.ERROR_GPU_IS_LOST
			}
			return device.MemoryInfo, nvml.SUCCESS
		}
		device.GetUtilizationRatesFunc = func() (nvml.Utilization, nvml.Return) {
			return nvml.Utilization{}, nvml.SUCCESS
		}
		device.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) { return nil, nvml.SUCCESS }
	}
	host.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return nil, nvml.ERROR_NOT_SUPPORTED }
	devices := gpu.Open(gpu.Options{NVML: host, LockDir: t.TempDir()})
	t.Cleanup(devices.Close)
	return devices
}

// deviceOf returns the device of the only runner.
func deviceOf(t *testing.T, cache *Cache) string {
	t.Helper()
	for _, m := range cache.Status() {
		if m.PID != 0 {
			return m.Device
		}
	}
	t.Fatal("no runner")
	return ""
}

func TestCPUFallback(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// Devices that are not there.
		for _, fallback := range []bool{false, true} {
			cache, models := poolOf(t, 1, 1, func(o *Options) { o.CPUFallback = fallback })
			_, err := cache.Ready(t.Context(), models[0], "gpu")
			if !fallback {
				expect.Fault(t, err, fault.Precondition, "model a", `device "gpu"`)
			} else if err != nil || deviceOf(t, cache) != "" {
				t.Errorf("device %q, %v", deviceOf(t, cache), err)
			}
		}
		// A device that is too small.
		for _, fallback := range []bool{false, true} {
			devices := devicesOf(t)
			cache, _ := poolOf(t, 2, 0, func(o *Options) {
				o.CPUFallback, o.Devices, o.LoadTimeout = fallback, devices, 2*time.Second
			})
			large := add(t, cache, "large", `{"memory":"1GiB","device_memory":"41GiB"}`)
			_, err := cache.Ready(t.Context(), large, "")
			if !fallback {
				expect.Fault(t, err, fault.Exhausted, "model large", "40960 MiB free", "allow-cpu-fallback")
			} else if err != nil || deviceOf(t, cache) != "" {
				t.Errorf("device %q, %v", deviceOf(t, cache), err)
			}
			// Never for a device that is no device.
			_, err = cache.Ready(t.Context(), large, "9")
			expect.Fault(t, err, fault.BadRequest, `no device "9"`)
		}
	})
}

func TestBatchSizeIsRemembered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		devices := devicesOf(t)
		cache, models := poolOf(t, 1, 1, func(o *Options) { o.Devices = devices })
		runner, err := cache.Ready(t.Context(), models[0], "3")
		if err != nil {
			t.Fatal(err)
		}
		device := devices.Devices()[3]
		if got := deviceOf(t, cache); got != device.UUID {
			t.Fatalf("device %q", got)
		}
		const digest = "sha256:feed"
		cache.mu.Lock()
		cache.slots[0].digest = digest
		cache.mu.Unlock()
		tell(t, runner, "fits 24")
		expect.Eventually(t, "the size is in the profile",
			func() bool { return cache.options.Profiles.Read(digest).DeviceBatch[device.Name] == 24 })
		placement, err := devices.Place(t.Context(), []gpu.Device{device}, 1)
		if err != nil {
			t.Fatal(err)
		}
		setup, tuned, err := cache.setupOf(models[0], cache.options.Profiles.Read(digest), placement)
		if env := strings.Join(placement.Env(), " "); err != nil || setup.Batching.MaxBatchSize != 24 ||
			setup.Device != device.UUID || tuned != nil || !strings.Contains(env, "CUDA_VISIBLE_DEVICES="+device.UUID) {
			t.Errorf("the next runner gets %+v, %q, %v", setup, env, err)
		}
		if err := placement.Release(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestASecondTryIsInThePool lets a device turn out to have no memory for a model at first.
func TestASecondTryIsInThePool(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		devices := devicesOf(t)
		cache, models := poolOf(t, 1, 1, func(o *Options) { o.Devices = devices })
		behave(cache, "no memory")
		runner, err := cache.Ready(t.Context(), models[0], "3")
		if err != nil {
			t.Fatal(err)
		}
		if n := len(started(cache)); n != 2 {
			t.Fatalf("%d runners were started", n)
		}
		if got, ok := cache.Loaded(models[0], "3"); !ok || got != runner || inMemory(cache) != "a" {
			t.Errorf("the pool does not know the runner: %+v", cache.Status())
		}
		if _, err := cache.Unload(t.Context(), "a", ""); err != nil || runner.Alive() || cache.Memory().Reserved != 0 {
			t.Errorf("unloaded: %v; alive %t, %d bytes reserved", err, runner.Alive(), cache.Memory().Reserved)
		}
	})
}

func TestADeviceThatIsLostWhileAModelLoads(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		lost := new(atomic.Bool)
		devices := losing(t, lost)
		cache, models := poolOf(t, 1, 1, func(o *Options) { o.Devices = devices })
		behave(cache, "gated")
		loaded := make(chan *Runner, 1)
		go func() {
			runner, err := cache.Ready(context.Background(), models[0], "3")
			if err != nil {
				t.Error(err)
			}
			loaded <- runner
		}()
		expect.Eventually(t, "the load has begun", func() bool { return len(started(cache)) == 1 })
		lost.Store(true)
		cache.drain(devices.Devices()[3], "it is lost") // as Watch does; nothing runs there yet
		started(cache)[0].ready()
		if runner := <-loaded; runner != nil {
			if runner.Leased("l", "l", time.Now().Add(time.Hour)) {
				t.Error("a runner on a lost device takes a lease")
			}
			expect.Eventually(t, "it has ended", func() bool { return !runner.Alive() })
		}
		if got := inMemory(cache); got != "" {
			t.Errorf("in memory are %s", got)
		}
		_, err := cache.Ready(t.Context(), models[0], "3")
		expect.Fault(t, err, fault.Unavailable, "model a", "drained")
	})
}

// TestTwoWordsForOnePlace asks for one model with words that come to the same while it waits.
func TestTwoWordsForOnePlace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 2, nil)
		leaseOf(t, cache, models[1], "l")
		ctx, leave := context.WithCancel(t.Context())
		var asking sync.WaitGroup
		for n, word := range []string{"auto", "cpu"} {
			asking.Go(func() { _, _ = cache.Ready(ctx, models[0], word) })
			expect.Eventually(t, word+" waits", func() bool {
				cache.mu.Lock()
				defer cache.mu.Unlock()
				callers := 0
				for _, s := range cache.slots {
					callers += s.callers
				}
				return callers == n+1
			})
		}
		if list := cache.Status(); len(list) != 2 {
			t.Errorf("one model is loaded twice on the processor: %+v", list)
		}
		leave()
		asking.Wait()
	})
}

// TestARunnerIsEvictedForWhatItMayTake has a runner that has taken nothing yet of the memory that it may take.
func TestARunnerIsEvictedForWhatItMayTake(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, _ := poolOf(t, 3, 0, func(o *Options) { o.Devices, o.LoadTimeout = devicesOf(t), 2*time.Second })
		one := add(t, cache, "one", `{"memory":"1GiB","device_memory":"30GiB"}`)
		two := add(t, cache, "two", `{"memory":"1GiB","device_memory":"20GiB"}`)
		for _, model := range []repository.Model{one, two} {
			if _, err := cache.Ready(t.Context(), model, "3"); err != nil {
				t.Fatal(err)
			}
		}
		if got := inMemory(cache); got != "two" {
			t.Errorf("in memory are %s", got)
		}
	})
}

// TestWhatFitsOnNoDeviceHoldsNobodyUp refuses at once what waiting does not help.
func TestWhatFitsOnNoDeviceHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, _ := poolOf(t, 3, 0, func(o *Options) { o.Devices = devicesOf(t) })
		large := add(t, cache, "large", `{"memory":"1GiB","device_memory":"41GiB"}`)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // load-timeout is a minute
		defer cancel()
		_, err := cache.Ready(ctx, large, "3")
		expect.Fault(t, err, fault.Exhausted, "model large, version 1: it needs 41 GiB of device memory", "40960 MiB",
			"use another device, or set allow-cpu-fallback")
	})
}

// TestADeviceThatOthersLoadOn waits for a device that another front has locked: the error is about that.
func TestADeviceThatOthersLoadOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		devices := devicesOf(t)
		cache, models := poolOf(t, 3, 1, func(o *Options) { o.Devices, o.LoadTimeout = devices, 300*time.Millisecond })
		other, err := devices.Place(t.Context(), devices.Devices()[3:4], 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		_, err = cache.Ready(t.Context(), models[0], "3")
		expect.Fault(t, err, fault.Unavailable, "model a", "another model is being loaded there")
		if err := other.Release(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestPressedWhileClosing has a runner short of memory when the pool has closed: nobody waits for what it ends any
// more.
func TestPressedWhileClosing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 3, 2, func(o *Options) { o.Devices = devicesOf(t) })
		for _, model := range models {
			if _, err := cache.Ready(t.Context(), model, "3"); err != nil {
				t.Fatal(err)
			}
		}
		cache.mu.Lock()
		cache.stop()
		first, known := cache.slots[0], len(cache.slots)
		cache.mu.Unlock()
		cache.pressed(first)
		cache.mu.Lock()
		defer cache.mu.Unlock()
		if len(cache.slots) != known {
			t.Error("a runner is ended that Close does not wait for")
		}
	})
}
