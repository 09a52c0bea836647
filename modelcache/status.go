package modelcache

import (
	"cmp"
	"os"
	"slices"
	"time"

	"flightsvc/internal/control"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/tuning"
)

// Status lists the model versions that are in memory, being loaded, failed or quarantined, sorted by folder and device.
func (c *Cache) Status() []protocol.ModelStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	list := make([]protocol.ModelStatus, 0, len(c.slots))
	for _, s := range c.slots {
		list = append(list, c.statusLocked(s, now))
	}
	for dir, h := range c.healths {
		if !h.avoided(now) || slices.ContainsFunc(list, func(m protocol.ModelStatus) bool { return m.Dir == dir }) {
			continue
		}
		state := StateFailed
		if now.Before(h.quarantinedUntil) {
			state = StateQuarantined
		}
		list = append(list, protocol.ModelStatus{
			Model: h.ref, Version: h.version, Dir: dir, State: state, Reason: h.reason,
		})
	}
	slices.SortFunc(list, func(a, b protocol.ModelStatus) int {
		return cmp.Or(cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Device, b.Device))
	})
	return list
}

// Totals returns the counts of all runners together, ended ones included, and the memory of the front and its runners.
func (c *Cache) Totals() protocol.Totals {
	own, _ := OwnMemory(os.Getpid()) // 0 where /proc cannot be read
	c.mu.Lock()
	defer c.mu.Unlock()
	t := protocol.Totals{
		Rows: c.counts.Rows, Batches: c.counts.Runs, Errors: c.counts.Errors, Queued: c.counts.Queued,
		QueueSeconds: c.counts.QueueSeconds, RunSeconds: c.counts.RunSeconds, Memory: own,
	}
	for _, s := range c.slots {
		t.Memory += s.bytes
		t.DeviceMemory += s.deviceBytes
		if s.state == StateReady {
			t.Models++
			streams, _, _ := s.runner.tally()
			t.Streams += streams
		}
	}
	return t
}

// counted adds what a runner has done since its last report.
func (c *Cache) counted(more control.Counts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts = c.counts.Add(more)
}

func (c *Cache) statusLocked(s *slot, now time.Time) protocol.ModelStatus {
	status := protocol.ModelStatus{Model: s.model.Ref, Version: s.model.Version, Dir: s.model.Dir, Digest: s.digest,
		State: s.state, Device: s.uuid, Memory: s.bytes, DeviceMemory: s.deviceBytes, Superseded: s.superseded}
	if h, ok := c.healths[s.model.Dir]; ok {
		status.Reason = h.reason
	}
	if s.claim != nil {
		status.Reserved = s.claim.bytes
	}
	if choice, ok := s.profile.Tuned[tuning.Machine()]; ok {
		status.Tuned = &choice
	}
	status.Form, status.NotFrozen = s.form, s.profile.NotFrozen
	if s.runner != nil {
		status.PID = s.runner.PID()
		_, status.Leases = s.runner.Pins(now)
		status.Streams, status.Resting, status.Counts = s.runner.tally()
		if s.superseded && s.state == StateReady {
			status.State = StateDraining
		}
	}
	return status
}
