package modelcache

import (
	"cmp"
	"os"
	"slices"
	"time"

	"flightsvc/internal/control"
	"flightsvc/modelcache/tuning"
)

// ModelStatus says what is known of a model version that is in memory or on its way there, or that could not be
// loaded.
type ModelStatus struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	Dir     string `json:"dir"`
	Digest  string `json:"digest,omitempty"` // "" where it is not known
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"` // of a failure, or of the last crash
	PID     int    `json:"pid,omitempty"`
	Device  string `json:"device"` // UUID, "" for the processor

	Streams int `json:"streams"` // open
	Resting int `json:"resting"` // those of them on which nothing has moved for StreamRest
	Leases  int `json:"leases"`  // granted, not yet used nor expired

	Memory       int64 `json:"memory"`                  // bytes of the host that the process has for itself
	Reserved     int64 `json:"reserved"`                // bytes of the host that it is counted with
	DeviceMemory int64 `json:"device_memory,omitempty"` // bytes of the device that the process has

	control.Counts                // of its runner, a second ago at most
	Tuned          *tuning.Choice `json:"tuned,omitempty"`      // the configuration found by tuning, if there is one
	NotFrozen      string         `json:"not_frozen,omitempty"` // why tuning could not make constants of its variables
	Superseded     bool           `json:"superseded,omitempty"` // a newer version serves
}

// Status lists model versions by folder.
func (c *Cache) Status() []ModelStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	list := make([]ModelStatus, 0, len(c.slots))
	for _, s := range c.slots {
		list = append(list, c.statusLocked(s, now))
	}
	for dir, h := range c.healths {
		if !h.avoided(now) || slices.ContainsFunc(list, func(m ModelStatus) bool { return m.Dir == dir }) {
			continue
		}
		state := StateFailed
		if now.Before(h.bars) {
			state = StateQuarantined
		}
		list = append(list, ModelStatus{Model: h.ref, Version: h.version, Dir: dir, State: state, Reason: h.reason})
	}
	slices.SortFunc(list, func(a, b ModelStatus) int {
		return cmp.Or(cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Device, b.Device))
	})
	return list
}

// Totals are what the front and all its runners have done since the front's start, and what they have now. What only
// grows goes on growing when a runner ends; of one that was killed its last second may be missing.
type Totals struct {
	Rows         int64   `json:"rows"`          // answered, those that were refused included
	Batches      int64   `json:"batches"`       // runs of TensorFlow
	Errors       int64   `json:"errors"`        // rows that were refused, and streams that failed
	Queued       int64   `json:"queued"`        // rows that wait for a run now
	QueueSeconds float64 `json:"queue_seconds"` // that tasks have waited
	RunSeconds   float64 `json:"run_seconds"`   // that TensorFlow has run
	Streams      int     `json:"streams"`       // open now
	Models       int     `json:"models"`        // ready now
	Memory       int64   `json:"memory"`        // bytes of the host that the front and its runners have for themselves
	DeviceMemory int64   `json:"device_memory"` // bytes of devices that the runners have
}

// Totals sums up all runners, those that have ended included.
func (c *Cache) Totals() Totals {
	own, _ := ownMemory(os.Getpid()) // 0 where /proc cannot be read
	c.mu.Lock()
	defer c.mu.Unlock()
	t := Totals{
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

// counted adds what a runner has done since it last said so.
func (c *Cache) counted(more control.Counts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts = c.counts.Add(more)
}

func (c *Cache) statusLocked(s *slot, now time.Time) ModelStatus {
	status := ModelStatus{Model: s.model.Ref, Version: s.model.Version, Dir: s.model.Dir, Digest: s.digest, State: s.state, Device: s.uuid, Memory: s.bytes, DeviceMemory: s.deviceBytes, Superseded: s.superseded}
	if h, ok := c.healths[s.model.Dir]; ok {
		status.Reason = h.reason
	}
	if s.claim != nil {
		status.Reserved = s.claim.bytes
	}
	if choice, ok := s.profile.Tuned[tuning.Machine()]; ok {
		status.Tuned = &choice
	}
	status.NotFrozen = s.profile.NotFrozen
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
