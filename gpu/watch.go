// The health of devices: XID errors and lost devices drain what they concern.

package gpu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"go.uber.org/zap"
)

// applicationXIDs are the errors that a program on the GPU makes, after which the GPU goes on working. NVIDIA's own
// Kubernetes device plugin passes over the same (k8s-device-plugin, internal/rm/health.go); what they mean is in
// NVIDIA's catalogue, https://docs.nvidia.com/deploy/xid-errors/.
var applicationXIDs = map[uint64]string{
	13:  "graphics engine exception",
	31:  "memory page fault",
	43:  "stopped processing",
	45:  "preemptive clean-up after an earlier error",
	68:  "video processor exception",
	109: "context switch timed out",
}

const (
	eventWait = 500 * time.Millisecond // of one wait for an event; the end of ctx may go unseen so long
	healthGap = 5 * time.Second        // between two looks at devices that send no event
)

// Watch looks after the devices until ctx ends, and calls drained, from its own goroutine, once for each device that
// is out of service: after an XID error that is not the program's own doing, or when the driver has
// lost it. A drained device gets no further placement; it stays so until the front starts again, since it has to
// be reset first. Numbers that cannot be read drain nothing.
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

// register makes a set of the errors of all devices.
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

// handleEvent waits for one event and handles it. It returns false if it could not wait. A driver that does not return
// from the wait is not asked again.
func (i *Inventory) handleEvent(set *nvml.EventSet) bool {
	type event struct {
		xid    uint64
		gpu    string
		gi, ci uint32
		ret    nvml.Return
	}
	received := make(chan event, 1)
	events := *set
	go func() { // not through ask, which others need meanwhile
		data, ret := events.Wait(uint32(eventWait.Milliseconds()))
		e := event{xid: data.EventData, gi: data.GpuInstanceId, ci: data.ComputeInstanceId, ret: ret}
		if ret == nvml.SUCCESS && data.EventType != nvml.EventTypeXidCriticalError {
			e.ret = nvml.ERROR_TIMEOUT // of no interest
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
		*set = nil // its owner is the call that is still there
		i.log.Warn("XID errors of devices are no longer watched: NVIDIA's driver does not answer")
		return false
	}
	switch {
	case errors.Is(e.ret, nvml.ERROR_TIMEOUT):
		return true
	case e.ret != nvml.SUCCESS:
		i.refresh() // says so of each device, and finds those that are lost
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

// tell calls drained for devices of which it has not been called.
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
