// Placement: a load gets the device with the most free memory, and Release waits until the driver has freed it again.

package gpu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"flightsvc/internal/fault"
)

// The driver frees the memory of a process some time after the process has ended. The limits are those of Ollama's
// scheduler (server/sched.go, waitForVRAMRecovery), which reports 0.5 to 1.5 s.
const (
	recoveryPoll  = 250 * time.Millisecond
	recoveryLimit = 5 * time.Second
	recoveryShare = 4 // a fourth of the memory may still be missing
)

// NoRoom means that a load does not fit on any device that it may use until another process has ended.
type NoRoom struct {
	Device Device // the one with the most room
	Need   int64  // bytes
	Free   int64  // bytes of it that are neither in use nor promised
}

func (e *NoRoom) Error() string {
	return fmt.Sprintf("device %s has %d MiB free of %d MiB, and %d MiB are needed", e.Device, e.Free>>20,
		e.Device.Memory>>20, e.Need>>20)
}

// Placement is one process on one device. All methods may be called on nil, which stands for the CPU. Release must be
// called when the process has ended.
type Placement struct {
	inventory *Inventory
	device    *device
	before    int64  // bytes that were free when it was placed
	promises  int64  // bytes that others had been promised then
	unlock    func() // of the device's lock, nil once the load has settled
	// The inventory's mu guards the fields below.
	cost     int64 // bytes that the process takes, or will take
	used     int64 // bytes that it certainly has
	said     int64 // bytes that it has by the last Measure
	rest     int64 // reading.rest of the last Measure, without what the process had
	measured bool
	released bool
}

// outstanding returns the bytes that the process may still take: its promise.
func (p *Placement) outstanding() int64 { return max(0, p.cost-p.used) }

// Place reserves need bytes on one of the devices of want, trying those with the most room first. It returns nil, for
// the CPU, if want is empty. The device stays locked for all fronts of the host until Settle or Release. While another
// load holds the lock of a device, Place waits, unless there is room on another one. Errors are *NoRoom, and the faults
// Unavailable when ctx ends or no device can be read, and Precondition for a lock folder that cannot be used.
func (i *Inventory) Place(ctx context.Context, want []Device, need int64) (*Placement, error) {
	if len(want) == 0 {
		return nil, nil
	}
	i.wait()
	candidates, err := i.candidates(want)
	if err != nil {
		return nil, err
	}
	var best *NoRoom
	for {
		var busy []*device
		for _, d := range candidates {
			p, full, err := i.tryPlace(d, need)
			switch {
			case errors.Is(err, errBusy):
				busy = append(busy, d)
			case err != nil:
				return nil, err
			case p != nil:
				return p, nil
			case best == nil || full.Free > best.Free:
				best = full
			}
		}
		if len(busy) == 0 {
			return nil, best
		}
		candidates = busy
		select {
		case <-ctx.Done():
			return nil, fault.New(fault.Unavailable, "device %s: another model is being loaded there, "+
				"here or by another front of this host; ask again: %w", busy[0].UUID, ctx.Err())
		case <-time.After(i.retry):
		}
	}
}

// errBusy means that somebody else has the lock of a device.
var errBusy = errors.New("busy")

// candidates returns the wanted devices that are healthy and have answered, those with the most room first.
func (i *Inventory) candidates(want []Device) ([]*device, error) {
	errs := i.refresh()
	i.mu.Lock()
	defer i.mu.Unlock()
	var found []*device
	room := map[*device]int64{}
	var reason error
	for n, d := range i.devices {
		if !slices.ContainsFunc(want, func(w Device) bool { return w.UUID == d.UUID }) {
			continue
		}
		if d.Healthy && errs[n] == nil {
			found = append(found, d)
			room[d] = d.Free - d.memory.ours()
		} else {
			reason = fmt.Errorf("%s: %s", d.Device, d.Reason)
		}
	}
	if len(found) == 0 {
		if reason == nil {
			reason = fmt.Errorf("%s is not a device of this host", want[0])
		}
		return nil, fault.New(fault.Unavailable, "no device can take a model: %w", reason)
	}
	slices.SortStableFunc(found, func(a, b *device) int { return cmp.Compare(room[b], room[a]) })
	return found, nil
}

// tryPlace places a load on one device. If it does not fit, NoRoom says how much room there is; if the device is
// locked, the error is errBusy.
func (i *Inventory) tryPlace(d *device, need int64) (*Placement, *NoRoom, error) {
	unlock, ok, err := i.tryLock(d.memory)
	if err != nil {
		return nil, nil, err
	}
	if !ok {
		return nil, nil, errBusy
	}
	defer func() {
		if unlock != nil {
			unlock()
		}
	}()
	// Promises are read before free memory: what a process takes in between counts twice for a moment. The other way
	// round it would not count at all.
	promises, err := i.promised(d.memory)
	if err != nil {
		return nil, nil, err
	}
	now, err := i.measure(d, -1)
	if err != nil {
		return nil, nil, fault.New(fault.Unavailable, "device %s: its free memory cannot be read: %w", d.UUID, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if !d.Healthy {
		return nil, nil, fault.New(fault.Unavailable, "device %s: %s", d.Device, d.Reason)
	}
	if room := now.free - promises; room < need {
		return nil, &NoRoom{Device: d.Device, Need: need, Free: max(0, room)}, nil
	}
	p := &Placement{inventory: i, device: d, before: now.free, promises: promises, unlock: unlock, cost: need,
		rest: now.rest}
	d.memory.placed[p] = struct{}{}
	if err := i.publish(d.memory); err != nil {
		delete(d.memory.placed, p)
		return nil, nil, err
	}
	unlock = nil
	return p, nil, nil
}

// reading is what NVML says about a device's memory. NVML lists processes by their ids on the host, which are other ids
// in a container.
type reading struct {
	free int64 // bytes that nobody has
	used int64 // bytes that the process asked about has, -1 if it is not listed
	rest int64 // bytes in use, but not by a listed process: the driver's, those of processes that end
}

// measure reads the memory of a device, and what the process pid has of it.
func (i *Inventory) measure(d *device, pid int) (reading, error) {
	now, err := ask(i, i.limit, func() (reading, error) {
		now := reading{used: -1}
		list := func() (sum int64) {
			processes, ret := d.handle.GetComputeRunningProcesses()
			for _, process := range processes {
				if ret != nvml.SUCCESS || process.UsedGpuMemory == nvmlNotAvailable {
					continue
				}
				sum += int64(process.UsedGpuMemory)
				if int(process.Pid) == pid && now.used < 0 {
					now.used = int64(process.UsedGpuMemory)
				}
			}
			return sum
		}
		// The list and the memory are read at different moments. With the smaller of two lists, one before and one
		// after, rest is never too low.
		listed := list()
		info, ret := d.handle.GetMemoryInfo()
		listed = min(listed, list())
		now.free = int64(info.Free)
		now.rest = int64(info.Total-info.Free) - listed
		return now, failed(ret)
	})
	i.mu.Lock()
	defer i.mu.Unlock()
	if err == nil {
		d.Free = now.free
	}
	i.noteError(d, err)
	return now, err
}

// nvmlNotAvailable is NVML_VALUE_NOT_AVAILABLE.
const nvmlNotAvailable = ^uint64(0)

// Device returns the device, the zero Device for the CPU.
func (p *Placement) Device() Device {
	if p == nil {
		return Device{}
	}
	p.inventory.mu.Lock()
	defer p.inventory.mu.Unlock()
	return p.device.Device
}

// Env returns the variables with which the process sees this device and no other.
func (p *Placement) Env() []string {
	if p == nil {
		return []string{"CUDA_VISIBLE_DEVICES=-1"}
	}
	return []string{"CUDA_VISIBLE_DEVICES=" + p.device.UUID, "CUDA_DEVICE_ORDER=PCI_BUS_ID"}
}

// Measure returns the bytes of the device that the process has, and lowers its promise by them. NVML does not list the
// process in most containers. There Measure returns, until Settle, by how much free memory has shrunk since Place,
// which includes what others took meanwhile; afterwards it returns its last answer. A call just before the process ends
// tells Release how much memory must become free.
func (p *Placement) Measure(pid int) int64 {
	if p == nil {
		return 0
	}
	i := p.inventory
	now, err := i.measure(p.device, pid)
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case err != nil || p.released:
	case now.used >= 0:
		p.used, p.said, p.rest, p.measured = now.used, now.used, now.rest, true
		_ = i.publish(p.device.memory) // after an error the promise stays too high, which is safe
	case p.unlock != nil: // others may have taken what they were promised, and no more
		p.said = max(0, p.before-now.free)
		p.used, p.rest, p.measured = max(0, p.said-p.promises), now.rest-p.said, true
		_ = i.publish(p.device.memory)
	default:
		p.rest = now.rest - p.said
	}
	return p.said
}

// Settle ends the load and unlocks the device. cost is how many bytes the process will take in all: at least what
// Measure returned, more if an earlier process of the same model took more; 0 keeps the need given to Place.
func (p *Placement) Settle(cost int64) {
	if p == nil {
		return
	}
	i := p.inventory
	i.mu.Lock()
	measured := p.measured
	i.mu.Unlock()
	if !measured {
		p.Measure(-1)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if p.unlock == nil || p.released {
		return
	}
	if cost > 0 {
		p.cost = cost
		_ = i.publish(p.device.memory) // after an error the promise of Place stands
	}
	p.unlock()
	p.unlock = nil
}

// Release takes back the promise after the process has ended. It waits until at least 75 % of the memory is free again,
// at most five seconds, and keeps the device locked meanwhile, so that no load is measured by memory that is still
// being freed. An error says that the memory was not freed in time, or that ctx ended. The placement is released in any
// case; memory that is still missing does not count as free.
func (p *Placement) Release(ctx context.Context) error {
	if p == nil {
		return nil
	}
	i, m := p.inventory, p.device.memory
	i.mu.Lock()
	if p.released {
		i.mu.Unlock()
		return nil
	}
	p.released = true
	delete(m.placed, p)
	_ = i.publish(m)
	unlock := p.unlock
	p.unlock = nil
	had, rest := p.said, p.rest
	if !p.measured {
		had = p.cost
	}
	i.mu.Unlock()
	deadline := time.Now().Add(i.patience)
	defer func() {
		if unlock != nil {
			unlock()
		}
	}()
	for {
		if unlock == nil {
			unlock, _, _ = i.tryLock(m)
		}
		now, err := i.measure(p.device, -1)
		if err != nil {
			return fmt.Errorf("device %s: whether its memory is free again cannot be read: %w", p.device.UUID, err)
		}
		missing := now.rest - rest
		if missing <= had/recoveryShare {
			return nil
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("device %s: after %v, %d of %d MiB are not free again", p.device.UUID, i.patience,
				missing>>20, had>>20)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("device %s: waiting for its memory: %w", p.device.UUID, ctx.Err())
		case <-time.After(min(i.poll, time.Until(deadline)+time.Millisecond)):
		}
	}
}
