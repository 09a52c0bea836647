// The devices of this host, and the questions to NVIDIA's library about them.

package gpu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"go.uber.org/zap"
)

// Device is a GPU, or an instance of one that is in MIG mode. Callers see it as protocol.Device, which has the same
// fields.
type Device struct {
	UUID        string // GPU-..., or MIG-... of an instance
	Name        string // as NVIDIA calls it; that of an instance ends with its profile
	Index       string // as nvidia-smi prints it; 0:1 is instance 1 of GPU 0
	Parent      string // UUID of the GPU of an instance
	Memory      int64  // bytes
	Free        int64  // bytes that no process had when they were last read
	Compute     string // compute capability, such as 8.0
	Utilisation int    // percent of the time in which a kernel ran; -1: not known
	Healthy     bool   // false: nothing is placed on it until the front starts again
	Reason      string // why it is not healthy, or why its numbers are old
}

func (d Device) String() string { return fmt.Sprintf("%s (%s, index %s)", d.UUID, d.Name, d.Index) }

// Options say how to look for devices.
type Options struct {
	Visible string         // indexes or UUIDs, separated by commas; "" is CUDA_VISIBLE_DEVICES
	LockDir string         // where the fronts of a host lock devices; "" is DefaultLockDir
	Log     *zap.Logger    // nil for none
	NVML    nvml.Interface // nil for NVIDIA's library
}

// DefaultLockDir returns the folder flightsvc-devices below TMPDIR, else below /tmp. Fronts with another TMPDIR, or in
// a container that does not share this folder, do not see each other's promises.
func DefaultLockDir() string { return filepath.Join(os.TempDir(), "flightsvc-devices") }

// NVML may take seconds to wake up a GPU, and a broken driver may never answer.
const (
	openLimit = 30 * time.Second // as Ollama's for its first look at the devices (discover/runner.go)
	callLimit = 5 * time.Second
)

// Inventory is the devices of this host that this process may use. Its methods are safe for concurrent use. The zero
// Inventory has none.
type Inventory struct {
	nvml    nvml.Interface
	log     *zap.Logger
	lockDir string
	visible string // see Options
	why     string
	devices []*device     // ordered by index, or as CUDA_VISIBLE_DEVICES says; fixed, like why, once found is closed
	found   chan struct{} // nil for the zero Inventory

	limit    time.Duration // of one question to NVML
	retry    time.Duration // between two tries of a lock that somebody holds
	poll     time.Duration // between two readings while Release waits for memory
	patience time.Duration // how long Release waits for memory

	asking chan struct{} // held while NVML is asked
	stuck  atomic.Bool   // a question has no answer yet, and its limit is over

	mu sync.Mutex // guards what changes in devices, memories and placements
}

// device is what an Inventory keeps of a Device.
type device struct {
	Device
	handle nvml.Device
	gpu    nvml.Device // sends the events: the parent's handle, or handle itself
	gi, ci uint32      // of an instance
	memory *memory
	told   bool // Watch has reported that it is drained
}

// none is the id of a GPU or compute instance in an event that concerns a whole GPU, see nvmlEventData_t.
const none = 0xFFFFFFFF

// Open looks for NVIDIA's library and its devices in the background, since a driver takes seconds to wake up. Methods
// that need the devices wait at most 30 s. Without devices, Why says why, and the log says so once.
// CUDA_VISIBLE_DEVICES limits and orders the devices, as it does for a program that uses CUDA. Close frees the library.
func Open(options Options) *Inventory {
	i := &Inventory{
		nvml: options.NVML, visible: options.Visible, log: options.Log, lockDir: options.LockDir,
		asking: make(chan struct{}, 1),
		limit:  callLimit, retry: 50 * time.Millisecond, poll: recoveryPoll, patience: recoveryLimit,
	}
	if i.nvml == nil {
		i.nvml = nvml.New()
	}
	if i.log == nil {
		i.log = zap.NewNop()
	}
	if i.lockDir == "" {
		i.lockDir = DefaultLockDir()
	}
	i.found = make(chan struct{})
	go i.look() // ends within openLimit
	return i
}

// look finds the devices and closes found.
func (i *Inventory) look() {
	defer close(i.found)
	found, err := ask(i, openLimit, i.discover)
	if err != nil {
		i.why = err.Error()
	}
	spec, limited := i.visible, i.visible != ""
	if !limited {
		spec, limited = os.LookupEnv("CUDA_VISIBLE_DEVICES")
	}
	if limited && len(found) > 0 {
		if found = visible(found, spec); len(found) == 0 {
			i.why = fmt.Sprintf("CUDA_VISIBLE_DEVICES=%q, or the executor's GPUs, hides all GPUs", spec)
		}
	}
	i.devices = found
	if len(found) == 0 {
		i.log.Info("models run on the CPU", zap.String("reason", i.why))
	}
	for _, d := range found {
		i.log.Info("device", zap.Stringer("device", d.Device), zap.Int64("memory", d.Memory),
			zap.String("compute", d.Compute))
	}
}

// wait waits until the devices are known.
func (i *Inventory) wait() {
	if i.found != nil {
		<-i.found
	}
}

// Why says why there is no device, "" where there is one.
func (i *Inventory) Why() string {
	i.wait()
	if i.why == "" && len(i.devices) == 0 {
		return "devices have not been looked up"
	}
	return i.why
}

// Close frees NVIDIA's library and removes this process's files in the lock folder. Placements must not be used
// afterwards, and Watch must have returned. Close does not wait for devices that have not been found yet.
func (i *Inventory) Close() {
	select {
	case <-i.found:
	default:
		return
	}
	i.mu.Lock()
	for _, d := range i.devices {
		d.memory.forget()
	}
	found := len(i.devices) > 0
	i.mu.Unlock()
	if found {
		_, _ = ask(i, i.limit, func() (struct{}, error) { return struct{}{}, failed(i.nvml.Shutdown()) })
	}
}

// ask calls question, which asks NVML, and waits at most limit for its answer. Questions are asked one after the other.
// While one is unanswered after its limit, all others fail at once.
func ask[T any](i *Inventory, limit time.Duration, question func() (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	var none T
	timer := time.NewTimer(limit)
	defer timer.Stop()
	silent := fmt.Errorf("NVIDIA's driver does not answer within %v", limit)
	select {
	case i.asking <- struct{}{}:
	default:
		if i.stuck.Load() {
			return none, silent
		}
		select {
		case i.asking <- struct{}{}:
		case <-timer.C:
			return none, silent
		}
	}
	answers := make(chan answer, 1)
	go func() { // ends with the question, since a call of the library cannot be cancelled
		value, err := question()
		answers <- answer{value, err}
		i.stuck.Store(false)
		<-i.asking
	}()
	select {
	case got := <-answers:
		return got.value, got.err
	case <-timer.C:
		i.stuck.Store(true)
		if len(answers) > 0 { // the answer came just now, and perhaps said so before
			i.stuck.Store(false)
		}
		return none, silent
	}
}

// failed returns an error for NVML's return code, or nil for success.
func failed(ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return ret
}

// lost reports whether NVML says that the device itself is gone. After any other failure only its numbers are unknown:
// after a change of the container's cgroup all calls fail with "Unknown Error" while processes on the device continue
// (NVIDIA/nvidia-container-toolkit#115).
func lost(err error) bool {
	return errors.Is(err, nvml.ERROR_GPU_IS_LOST) || errors.Is(err, nvml.ERROR_RESET_REQUIRED)
}

// discover initialises NVML and lists all devices.
func (i *Inventory) discover() ([]*device, error) {
	switch ret := i.nvml.Init(); ret {
	case nvml.SUCCESS:
	case nvml.ERROR_LIBRARY_NOT_FOUND:
		return nil, errors.New("no NVIDIA driver: libnvidia-ml.so.1 was not found")
	default:
		return nil, fmt.Errorf("NVIDIA's driver does not work: %w", ret)
	}
	found, err := i.list()
	if len(found) == 0 {
		_ = i.nvml.Shutdown()
	}
	return found, err
}

func (i *Inventory) list() ([]*device, error) {
	count, ret := i.nvml.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("NVIDIA's driver does not say how many GPUs there are: %w", ret)
	}
	// A driver older than MIG lacks these functions, and go-nvml ends the process if a missing one is called.
	mig := i.nvml.Extensions().LookupSymbol("nvmlDeviceGetMigDeviceHandleByIndex") == nil
	var found []*device
	why := errors.New("NVIDIA's driver is installed, but this host has no GPU")
	for index := range count {
		handle, ret := i.nvml.DeviceGetHandleByIndex(index)
		if ret != nvml.SUCCESS {
			why = fmt.Errorf("GPU %d: %w", index, ret)
			i.log.Warn("a GPU is not used", zap.Error(why))
			continue
		}
		gpu, err := describe(handle, strconv.Itoa(index))
		if err != nil {
			why = fmt.Errorf("GPU %d: %w", index, err)
			i.log.Warn("a GPU is not used", zap.Error(why))
			continue
		}
		if mig {
			if mode, _, ret := handle.GetMigMode(); ret == nvml.SUCCESS && mode == nvml.DEVICE_MIG_ENABLE {
				instances := i.instances(gpu)
				if len(instances) == 0 {
					why = fmt.Errorf("GPU %d is in MIG mode and has no instance", index)
					i.log.Warn("a GPU is not used", zap.Error(why))
				}
				found = append(found, instances...)
				continue
			}
		}
		found = append(found, gpu)
	}
	if len(found) > 0 {
		why = nil
	}
	return found, why
}

// instances lists the MIG instances of a GPU. Compute instances of one GPU instance share its memory, so they share
// its place in the ledger too.
func (i *Inventory) instances(gpu *device) []*device {
	most, ret := gpu.handle.GetMaxMigDeviceCount()
	if ret != nvml.SUCCESS {
		return nil
	}
	var found []*device
	memories := map[int]*memory{}
	for n := range most {
		handle, ret := gpu.handle.GetMigDeviceHandleByIndex(n)
		if ret != nvml.SUCCESS {
			continue // the GPU has fewer instances than it could have
		}
		instance, err := describe(handle, gpu.Index+":"+strconv.Itoa(n))
		if err != nil {
			i.log.Warn("a MIG instance is not used", zap.String("index", gpu.Index+":"+strconv.Itoa(n)), zap.Error(err))
			continue
		}
		instance.Parent, instance.gpu = gpu.UUID, gpu.handle
		if instance.Compute == "" {
			instance.Compute = gpu.Compute
		}
		instance.gi, instance.ci = none, none
		if gi, ret := handle.GetGpuInstanceId(); ret == nvml.SUCCESS {
			instance.gi = uint32(gi)
			if memories[gi] == nil {
				memories[gi] = newMemory(fmt.Sprintf("%s-gi%d", gpu.UUID, gi))
			}
			instance.memory = memories[gi]
		}
		if ci, ret := handle.GetComputeInstanceId(); ret == nvml.SUCCESS {
			instance.ci = uint32(ci)
		}
		found = append(found, instance)
	}
	return found
}

// describe makes a device: it reads what never changes, and the memory.
func describe(handle nvml.Device, index string) (*device, error) {
	uuid, ret := handle.GetUUID()
	if ret != nvml.SUCCESS || uuid == "" || strings.ContainsAny(uuid, "/\x00") {
		return nil, fmt.Errorf("its UUID cannot be read: %w", ret)
	}
	d := &device{Device: Device{UUID: uuid, Index: index, Healthy: true, Utilisation: -1}, handle: handle, gpu: handle,
		gi: none, ci: none, memory: newMemory(uuid)}
	if d.Name, ret = handle.GetName(); ret != nvml.SUCCESS {
		d.Name = "unknown"
	}
	if major, minor, ret := handle.GetCudaComputeCapability(); ret == nvml.SUCCESS {
		d.Compute = fmt.Sprintf("%d.%d", major, minor)
	}
	info, ret := handle.GetMemoryInfo()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("its memory cannot be read: %w", ret)
	}
	d.Memory, d.Free = int64(info.Total), int64(info.Free)
	return d, nil
}

// Devices reads all devices and returns them. If numbers of a device cannot be read it keeps the last ones, and Reason
// says so.
func (i *Inventory) Devices() []Device {
	i.wait()
	i.refresh()
	i.mu.Lock()
	defer i.mu.Unlock()
	list := make([]Device, len(i.devices))
	for n, d := range i.devices {
		list[n] = d.Device
	}
	return list
}

// refresh reads the numbers of all devices. It returns one error, or nil, for each device, in their order.
func (i *Inventory) refresh() []error {
	type reading struct {
		free        int64
		utilisation int
		err         error
	}
	if len(i.devices) == 0 {
		return nil
	}
	readings, err := ask(i, i.limit, func() ([]reading, error) {
		all := make([]reading, len(i.devices))
		for n, d := range i.devices {
			info, ret := d.handle.GetMemoryInfo()
			all[n] = reading{free: int64(info.Free), utilisation: -1, err: failed(ret)}
			if d.Parent == "" && ret == nvml.SUCCESS {
				if busy, ret := d.handle.GetUtilizationRates(); ret == nvml.SUCCESS {
					all[n].utilisation = int(busy.Gpu)
				}
			}
		}
		return all, nil
	})
	errs := make([]error, len(i.devices))
	i.mu.Lock()
	defer i.mu.Unlock()
	for n, d := range i.devices {
		errs[n] = err
		if err == nil {
			errs[n] = readings[n].err
		}
		if errs[n] == nil {
			d.Free, d.Utilisation = readings[n].free, readings[n].utilisation
		}
		i.noteError(d, errs[n])
	}
	return errs
}

// noteError sets d.Reason to why the device could not be read, nil for read, and drains a lost device; i.mu is held.
func (i *Inventory) noteError(d *device, err error) {
	switch {
	case !d.Healthy:
	case err == nil:
		d.Reason = ""
	case lost(err):
		i.drain(d, fmt.Sprintf("NVIDIA's driver lost it: %v", err))
	default:
		reason := fmt.Sprintf("its numbers cannot be read: %v", err)
		if d.Reason != reason {
			i.log.Warn("device", zap.Stringer("device", d.Device), zap.String("reason", reason))
		}
		d.Reason = reason
	}
}

// drain takes a device out of service; i.mu is held. Watch then reports the device to its caller.
func (i *Inventory) drain(d *device, reason string) {
	if d.Healthy {
		d.Healthy, d.Reason = false, reason
		i.log.Error("device is drained", zap.Stringer("device", d.Device), zap.String("reason", reason))
	}
}
