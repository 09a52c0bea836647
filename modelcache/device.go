// Devices: where a model may run, and which runners are ended to make room there.

package modelcache

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"flightsvc/gpu"
	"flightsvc/internal/config"
	"flightsvc/internal/fault"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// bareContext is what a runner is assumed to need of a device, besides its model, before it was ever measured there:
// CUDA and its libraries take some 300 to 600 MiB in each process, depending on the device and the libraries loaded.
// The model's files are added twice, once as variables and once as what a run needs.
const bareContext = 640 << 20

// target is the devices that a request's device resolves to.
type target struct {
	word    string       // as the request, or else the model's settings, write it
	devices []gpu.Device // any of these will do; none means the CPU
}

// targetOf returns the devices that a request's device means for a model. Its faults are those of gpu.Inventory.Choose;
// with CPUFallback the CPU replaces devices that are missing or drained.
func (c *Cache) targetOf(model repository.Model, device string) (target, error) {
	if device == "" || device == deviceAuto {
		device = cmp.Or(model.Settings.Device, deviceAuto)
	}
	if model.Dir == "" {
		device = deviceCPU // the built-in model Image, which runs on the CPU only
	}
	t := target{word: device}
	var err error
	if t.devices, err = c.options.Devices.Choose(device); err != nil {
		if kind, _ := fault.KindOf(err); !c.options.CPUFallback || kind == fault.BadRequest {
			return t, fault.New(kind, "model %s: %w", model.Ref, err)
		}
		c.options.Log.Warn("a model runs on the CPU in place of a device (allow-cpu-fallback)",
			zap.String("model", model.Ref), zap.Error(err))
	}
	return t, nil
}

const (
	deviceAuto = "auto"
	deviceCPU  = "cpu"
)

// matches reports whether a slot runs, or will run, where a target allows.
func (t *target) matches(s *slot) bool {
	same := slices.EqualFunc(s.target.devices, t.devices, func(a, b gpu.Device) bool { return a.UUID == b.UUID })
	switch {
	case s.claim == nil: // not placed yet
		return same
	case s.uuid == "": // a slot that fell back to the CPU serves only requests for the CPU, or for the same devices
		return len(t.devices) == 0 || s.fellBack && same
	}
	return slices.ContainsFunc(t.devices, func(d gpu.Device) bool { return d.UUID == s.uuid })
}

// deviceNeed returns the bytes of a device that a model is placed with: what its settings say, else the most that was
// measured on devices of these names, else an estimate.
func deviceNeed(model repository.Model, known tuning.Profile, devices []gpu.Device) int64 {
	if fixed := int64(model.Settings.DeviceMemory); fixed > 0 {
		return fixed
	}
	need := int64(0)
	for _, d := range devices {
		need = max(need, known.DeviceBytes[d.Name])
	}
	if need > 0 {
		return need
	}
	return estimate(model) - bareRunner + bareContext
}

// placeLocked finds room on a device for a claim whose host memory is granted; if need be it ends unused runners there.
// It returns false if the claim has to wait, and an Exhausted fault if no device could ever hold it. With CPUFallback a
// claim for which no runner can be ended gets the CPU. It unlocks mu while it looks at the devices.
func (c *Cache) placeLocked(ctx context.Context, want *claim) (bool, error) {
	if len(want.target.devices) == 0 {
		return true, nil
	}
	c.mu.Unlock()
	placement, err := c.options.Devices.Place(ctx, want.target.devices, want.need)
	c.mu.Lock()
	want.noRoom = nil
	if err == nil {
		want.placement = placement
		return true, nil
	}
	if !errors.As(err, &want.noRoom) {
		return false, fault.New(fault.Unavailable, "model %s: %v", want.model.Ref, err) // also when ctx has ended
	}
	uuids := make([]string, len(want.target.devices))
	largest := int64(0)
	for i, d := range want.target.devices {
		uuids[i], largest = d.UUID, max(largest, d.Memory)
	}
	evicted := want.need <= largest && c.evictFromLocked(uuids, want.noRoom.Need-want.noRoom.Free)
	if !evicted && c.options.CPUFallback {
		c.options.Log.Warn("a model runs on the CPU in place of a device (allow-cpu-fallback)",
			zap.String("model", want.model.Ref), zap.Error(want.noRoom))
		want.fellBack = true
		return true, nil
	}
	if want.need > largest {
		return false, fault.New(fault.Exhausted, "model %s, version %s: it needs %s of device memory; %w; use "+
			"another device, or set allow-cpu-fallback",
			want.model.Ref, want.model.Version, config.Bytes(want.need), want.noRoom)
	}
	return false, nil
}

// evictFromLocked ends unused runners on the first of the devices where that frees at least short bytes, counting those
// of runners that are ending already. It reports whether there is such a device.
func (c *Cache) evictFromLocked(uuids []string, short int64) bool {
	for _, uuid := range uuids {
		var idle []*slot
		coming := int64(0)
		for _, claim := range c.memory.granted {
			if claim.ending && claim.placement.Device().UUID == uuid {
				coming += claim.ofDevice()
			}
		}
		for _, s := range c.idleLocked(time.Now()) {
			if s.uuid == uuid {
				idle = append(idle, s)
			}
		}
		free := coming
		for _, s := range idle {
			free += s.claim.ofDevice()
		}
		if free < short {
			continue
		}
		for _, s := range idle {
			if coming >= short {
				break
			}
			coming += s.claim.ofDevice()
			c.retireLocked(s, "others need its device's memory", time.Now())
		}
		return true
	}
	return false
}

// pressed makes room on the device of a runner that has no memory for even one row: it ends all unused runners there.
func (c *Cache) pressed(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return // Close ends all runners, and working must not grow any more
	}
	for _, other := range c.idleLocked(time.Now()) {
		if other != s && other.uuid == s.uuid {
			c.retireLocked(other, "another model on its device is short of memory", time.Now())
		}
	}
}

// shrunk stores in the model's profile the most rows of a run that fit into the device's memory.
func (c *Cache) shrunk(s *slot, rows int) {
	name := s.claim.placement.Device().Name
	c.options.Log.Warn("the device's memory bounds the batch", zap.String("model", s.model.Ref),
		zap.String("device", s.uuid), zap.Int("max_batch_size", rows))
	c.learn(s, func(p *tuning.Profile) {
		if p.DeviceBatch == nil {
			p.DeviceBatch = map[string]int{}
		}
		p.DeviceBatch[name] = rows
	})
}

// measureDevice records how much of its device's memory a runner's process uses.
func (c *Cache) measureDevice(s *slot, pid int) {
	device := s.claim.placement.Device()
	if device.UUID == "" {
		return
	}
	bytes := s.claim.placement.Measure(pid)
	c.mu.Lock()
	s.deviceBytes = bytes
	grown := bytes > s.claim.deviceBytes
	if grown {
		s.claim.deviceBytes = bytes
	}
	c.mu.Unlock()
	if grown && bytes > s.profile.DeviceBytes[device.Name] {
		c.learn(s, func(p *tuning.Profile) {
			if p.DeviceBytes == nil {
				p.DeviceBytes = map[string]int64{}
			}
			p.DeviceBytes[device.Name] = max(p.DeviceBytes[device.Name], bytes)
		})
	}
}

// learn changes the stored profile of a slot's model, if the model has a digest.
func (c *Cache) learn(s *slot, change func(*tuning.Profile)) {
	if s.digest == "" {
		return
	}
	if err := c.options.Profiles.Change(s.digest, change); err != nil {
		c.options.Log.Warn("the model's profile cannot be stored", zap.String("model", s.model.Ref), zap.Error(err))
	}
}

// Devices returns the devices of this host; none is an empty list.
func (c *Cache) Devices() []gpu.Device {
	return append([]gpu.Device{}, c.options.Devices.Devices()...)
}

// drain ends the runners on a device that is out of service. Their streams break, and open again elsewhere. A runner
// that is still loading there ends when it is ready (see load).
func (c *Cache) drain(device gpu.Device, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range slices.Clone(c.slots) {
		if s.uuid == device.UUID && s.runner != nil && c.ctx.Err() == nil {
			c.endLocked(s, outOfService+reason, &c.working)
		}
	}
}

const outOfService = "its device is out of service: "

// deviceFullLocked returns the fault of a claim that has waited too long for a device. It lists what uses the devices'
// memory.
func (c *Cache) deviceFullLocked(want *claim) error {
	var holders []string
	for _, s := range c.slots {
		if s.claim != nil && s.claim != want && want.target.matches(&slot{claim: s.claim, uuid: s.uuid}) {
			holders = append(holders, c.holderLocked(s, s.claim.ofDevice()))
		}
	}
	slices.Sort(holders)
	return fault.New(fault.Exhausted, "model %s, version %s: it needs %s of device memory and has waited %s for it; "+
		"%w; used by %s; end some of their streams, use another device, or set allow-cpu-fallback",
		want.model.Ref, want.model.Version, config.Bytes(want.need), c.options.LoadTimeout, want.noRoom,
		cmp.Or(strings.Join(holders, ", "), "other programs"))
}
