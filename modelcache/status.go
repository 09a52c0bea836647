package modelcache

import (
	"cmp"
	"slices"
	"time"
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

	Runs       int64   `json:"runs"`                 // TensorFlow runs of the streams that have closed
	JoinedRuns int64   `json:"joined_runs"`          // those of them that served more than one stream
	Tuned      *Choice `json:"tuned,omitempty"`      // the configuration found by tuning, if there is one
	NotFrozen  string  `json:"not_frozen,omitempty"` // why tuning could not make constants of its variables
	Superseded bool    `json:"superseded,omitempty"` // a newer version serves
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

func (c *Cache) statusLocked(s *slot, now time.Time) ModelStatus {
	status := ModelStatus{Model: s.model.Ref, Version: s.model.Version, Dir: s.model.Dir, Digest: s.digest, State: s.state, Device: s.uuid, Memory: s.bytes, DeviceMemory: s.deviceBytes, Superseded: s.superseded}
	if h, ok := c.healths[s.model.Dir]; ok {
		status.Reason = h.reason
	}
	if s.claim != nil {
		status.Reserved = s.claim.bytes
	}
	if choice, ok := s.profile.Tuned[Machine()]; ok {
		status.Tuned = &choice
	}
	status.NotFrozen = s.profile.NotFrozen
	if s.runner != nil {
		status.PID = s.runner.PID()
		_, status.Leases = s.runner.Pins(now)
		status.Streams, status.Resting, status.Runs, status.JoinedRuns = s.runner.counts()
		if s.superseded && s.state == StateReady {
			status.State = StateDraining
		}
	}
	return status
}
