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

// What a runner is counted with on a device before it was ever measured there: what CUDA and its libraries take
// in each process, some 300 to 600 MiB depending on the device and the libraries loaded, and the model's files
// twice, once as variables and once as what a run needs.
const bareContext = 640 << 20

// target is the devices that a request's device resolves to.
type target struct {
	word    string       // as the request says it, or the model's settings do
	devices []gpu.Device // any of these; none is the processor
}

// targetOf returns what a caller's device means for a model. Its faults are those of gpu.Inventory.Choose, but
// with CPUFallback the processor stands in for devices that are not there, or are drained.
func (c *Cache) targetOf(model repository.Model, device string) (target, error) {
	if device == "" || device == deviceAuto {
		device = cmp.Or(model.Settings.Device, deviceAuto)
	}
	if model.Dir == "" {
		device = deviceCPU // the model Image
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

// matches reports whether a slot runs where a target asks for.
func (t *target) matches(s *slot) bool {
	same := slices.EqualFunc(s.target.devices, t.devices, func(a, b gpu.Device) bool { return a.UUID == b.UUID })
	switch {
	case s.claim == nil: // it has no place yet
		return same
	case s.uuid == "": // a slot that fell back to the CPU serves only requests for the CPU, or for the same devices
		return len(t.devices) == 0 || s.fellBack && same
	}
	return slices.ContainsFunc(t.devices, func(d gpu.Device) bool { return d.UUID == s.uuid })
}

// deviceNeed is what a model is counted with on a device of a name.
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

// placeLocked finds room on a device for a claim, whose host memory is granted, and evicts others that nobody uses
// to make some. It reports false if the claim has to wait; for what no device can hold that is no use, an Exhausted.
// The mu is not held meanwhile.
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
		return false, fault.New(fault.Unavailable, "model %s: %v", want.model.Ref, err) // also when the time is over
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

// evictFromLocked ends runners that nobody uses on one of the devices, so that it has so much more free memory. It
// reports whether memory is on its way.
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

// pressed makes room for a runner that has no memory for one row: all runners that nobody uses on its device end.
func (c *Cache) pressed(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return // Close ends them, and waits for no more
	}
	for _, other := range c.idleLocked(time.Now()) {
		if other != s && other.uuid == s.uuid {
			c.retireLocked(other, "another model on its device is short of memory", time.Now())
		}
	}
}

// shrunk remembers the most rows of a run that fit into the device's memory.
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

// measureDevice notes what a runner's process has of its device.
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

// learn changes what is known of a slot's model.
func (c *Cache) learn(s *slot, change func(*tuning.Profile)) {
	if s.digest == "" {
		return
	}
	if err := c.options.Profiles.Change(s.digest, change); err != nil {
		c.options.Log.Warn("profile not kept", zap.String("model", s.model.Ref), zap.Error(err))
	}
}

// Devices returns the devices of this host; none is an empty list.
func (c *Cache) Devices() []gpu.Device {
	return append([]gpu.Device{}, c.options.Devices.Devices()...)
}

// drain ends the runners on a device that is out of service. Their streams break, and open again elsewhere. Those that
// load there end when they are ready; see load.
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

// deviceFullLocked says who has the memory of the devices that a claim has waited for.
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
