// Which devices a word such as "gpu" or "0,1" allows.

package gpu

import (
	"fmt"
	"slices"
	"strings"

	"flightsvc/internal/fault"
)

// Choose returns the devices that a word allows:
//
//   - "auto", "": all healthy devices; none if this host has none
//   - "gpu": the same, but it is an error if this host has none
//   - "cpu": none
//   - addresses separated by commas, as in Spark's TaskContext.resources()["gpu"].addresses: indexes as nvidia-smi
//     prints them, or UUIDs, of which an unambiguous beginning is enough. A GPU in MIG mode stands for its instances.
//
// Faults are BadRequest for an unknown address, Precondition if this host has no device, and Unavailable if all the
// allowed devices are drained.
func (i *Inventory) Choose(want string) ([]Device, error) {
	var chosen []*device
	if want = strings.TrimSpace(want); want == "cpu" {
		return nil, nil
	}
	i.wait()
	switch want {
	case "", "auto":
		if len(i.devices) == 0 {
			return nil, nil
		}
		chosen = i.devices
	default:
		if len(i.devices) == 0 {
			return nil, fault.New(fault.Precondition, "device %q: %s; use \"auto\" or \"cpu\"", want, i.Why())
		}
		if chosen = i.devices; want != "gpu" {
			chosen = nil
			for address := range strings.SplitSeq(want, ",") {
				found, err := match(i.devices, strings.TrimSpace(address))
				if err != nil {
					return nil, fault.New(fault.BadRequest, "device %q: %w", want, err)
				}
				chosen = append(chosen, found...)
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	var healthy []Device
	var reasons []string
	for n, d := range chosen {
		switch {
		case slices.Contains(chosen[:n], d): // named twice
		case d.Healthy:
			healthy = append(healthy, d.Device)
		default:
			reasons = append(reasons, fmt.Sprintf("%s: %s", d.Device, d.Reason))
		}
	}
	if len(healthy) == 0 {
		return nil, fault.New(fault.Unavailable, "device %q: all are drained: %s; "+
			"reset the GPU and start the server again, or use another device", want, strings.Join(reasons, "; "))
	}
	return healthy, nil
}

// match returns the devices that an address names.
func match(devices []*device, address string) ([]*device, error) {
	var found []*device
	isUUID := strings.HasPrefix(address, "GPU-") || strings.HasPrefix(address, "MIG-")
	names := map[string]bool{} // UUIDs that begin with the address
	for _, d := range devices {
		parent, _, _ := strings.Cut(d.Index, ":")
		switch {
		case d.Index == address || d.UUID == address:
			return []*device{d}, nil
		case d.Parent != "" && (parent == address || isUUID && strings.HasPrefix(d.Parent, address)):
			found = append(found, d)
			names[d.Parent] = true
		case isUUID && strings.HasPrefix(d.UUID, address):
			found = append(found, d)
			names[d.UUID] = true
		}
	}
	if len(found) == 0 {
		here := make([]string, len(devices))
		for n, d := range devices {
			here[n] = d.Index + " " + d.UUID
		}
		return nil, fmt.Errorf("no device %q; there is %s", address, strings.Join(here, ", "))
	}
	if len(names) > 1 {
		return nil, fmt.Errorf("%q is the beginning of the UUIDs of %d devices; write more of it", address, len(names))
	}
	return found, nil
}

// visible returns the devices that spec names, in its order. spec has the form of CUDA_VISIBLE_DEVICES: as in CUDA, the
// first entry that is no device ends the list. Indexes are those of nvidia-smi, which are CUDA's with
// CUDA_DEVICE_ORDER=PCI_BUS_ID.
func visible(devices []*device, spec string) []*device {
	var left []*device
	for entry := range strings.SplitSeq(spec, ",") {
		found, err := match(devices, strings.TrimSpace(entry))
		if err != nil {
			break
		}
		for _, d := range found {
			if !slices.Contains(left, d) {
				left = append(left, d)
			}
		}
	}
	return left
}
