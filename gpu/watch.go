// The health of devices: XID errors drain the devices that they concern, and lost devices are drained.

package gpu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"go.uber.org/zap"
)

// applicationXIDs are the errors that a program causes on a GPU, after which the GPU continues to work. NVIDIA's
// Kubernetes device plugin ignores the same ones (k8s-device-plugin, internal/rm/health.go).
// https://docs.nvidia.com/deploy/xid-errors/ says what they mean.
var applicationXIDs = map[uint64]string{
	13:  "graphics engine exception",
	31:  "memory page fault",
	43:  "stopped processing",
	45:  "preemptive clean-up after an earlier error",
	68:  "video processor exception",
	109: "context switch timed out",
}

const (
	eventWait = 500 * time.Millisecond // of one wait for an event; ctx is checked after it
	healthGap = 5 * time.Second        // between two readings, for devices that send no event
)

// Watch watches the devices until ctx ends. It calls drained, from its own goroutine, once for each device that is out
// of service: after an XID error that no program causes, or when the driver has lost it. A drained device gets no
// further placement until the front starts again, since it has to be reset first. A device whose numbers cannot be read
// is not drained.
func (i *Inventory) Watch(ctx context.Context, drained func(device Device, reason string)) {
	if i.found != nil {
		select {
		case <-i.found:
		case <-ctx.Done():
			return
		}
	}
	if len(i.devices) == 0 {
		<-ctx.Done()
		return
	}
	events, err := ask(i, i.limit, i.register)
	if err != nil {
		i.log.Warn("XID errors of devices cannot be watched", zap.Error(err))
	}
	var looked time.Time
	for ctx.Err() == nil {
		i.tell(drained)
		if time.Since(looked) >= healthGap {
			looked = time.Now()
			i.refresh()
			continue
		}
		if events == nil || !i.handleEvent(&events) {
			select {
			case <-ctx.Done():
			case <-time.After(eventWait):
			}
		}
	}
	if events != nil {
		_, _ = ask(i, i.limit, func() (struct{}, error) { return struct{}{}, failed(events.Free()) })
	}
}

// register returns a set of events that receives the XID errors of all devices.
func (i *Inventory) register() (nvml.EventSet, error) {
	events, ret := i.nvml.EventSetCreate()
	if ret != nvml.SUCCESS {
		return nil, ret
	}
	registered := map[string]bool{}
	for _, d := range i.devices {
		gpu := d.UUID
		if d.Parent != "" {
			gpu = d.Parent
		}
		if registered[gpu] {
			continue
		}
		registered[gpu] = true
		if ret := d.gpu.RegisterEvents(nvml.EventTypeXidCriticalError, events); ret != nvml.SUCCESS {
			i.log.Warn("XID errors of a device cannot be watched", zap.String("device", gpu), zap.Error(ret))
		}
	}
	return events, nil
}

// handleEvent waits for one event and handles it; it returns false if it could not wait. If the driver does not return
// from the wait, it sets *set to nil, so that the driver is not asked again.
func (i *Inventory) handleEvent(set *nvml.EventSet) bool {
	type event struct {
		xid    uint64
		gpu    string
		gi, ci uint32
		ret    nvml.Return
	}
	received := make(chan event, 1)
	events := *set
	go func() { // without ask, which would keep others from asking for as long as this waits
		data, ret := events.Wait(uint32(eventWait.Milliseconds()))
		e := event{xid: data.EventData, gi: data.GpuInstanceId, ci: data.ComputeInstanceId, ret: ret}
		if ret == nvml.SUCCESS && data.EventType != nvml.EventTypeXidCriticalError {
			e.ret = nvml.ERROR_TIMEOUT // ignored
		} else if ret == nvml.SUCCESS {
			e.gpu, e.ret = data.Device.GetUUID()
		}
		received <- e
	}()
	timer := time.NewTimer(eventWait + i.limit)
	defer timer.Stop()
	var e event
	select {
	case e = <-received:
	case <-timer.C:
		*set = nil // not freed, since the call that has not returned uses it
		i.log.Warn("XID errors of devices are no longer watched: NVIDIA's driver does not answer")
		return false
	}
	switch {
	case errors.Is(e.ret, nvml.ERROR_TIMEOUT):
		return true
	case e.ret != nvml.SUCCESS:
		i.refresh() // logs the reason for each device, and drains those that are lost
		return false
	}
	if name, ok := applicationXIDs[e.xid]; ok {
		i.log.Warn("a program's error on a device", zap.String("device", e.gpu), zap.Uint64("xid", e.xid),
			zap.String("meaning", name))
		return true
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, d := range i.devices {
		whole := e.gi == none || d.gi == none || d.gi == e.gi && (e.ci == none || d.ci == none || d.ci == e.ci)
		if d.UUID == e.gpu || d.Parent == e.gpu && whole {
			i.drain(d, fmt.Sprintf("XID %d, see NVIDIA's catalogue of XID errors", e.xid))
		}
	}
	return true
}

// tell calls drained for each device that has been drained since the last call.
func (i *Inventory) tell(drained func(device Device, reason string)) {
	i.mu.Lock()
	var news []Device
	for _, d := range i.devices {
		if !d.Healthy && !d.told {
			d.told = true
			news = append(news, d.Device)
		}
	}
	i.mu.Unlock()
	for _, d := range news {
		drained(d, d.Reason)
	}
}
