// The answer of the action status, and the results of model.tune.

package protocol

import "flightsvc/internal/control"

// Status is the answer of the action status.
type Status struct {
	Flightsvc string        `json:"flightsvc"` // version
	Build     string        `json:"build"`
	V         int           `json:"v"` // of descriptors
	Server    string        `json:"server"`
	Executor  string        `json:"executor,omitempty"` // Spark's id of the executor that the front belongs to
	PID       int           `json:"pid"`
	Models    []ModelStatus `json:"models"`
	Memory    Memory        `json:"memory"` // of the host
	Devices   []Device      `json:"devices"`
	Totals    Totals        `json:"totals"`
}

// ModelStatus describes a model version that is in memory, is being loaded, or could not be loaded.
type ModelStatus struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	Dir     string `json:"dir"`
	Digest  string `json:"digest,omitempty"` // "" where it is not known
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"` // of a failure, or of the last crash
	PID     int    `json:"pid,omitempty"`
	Device  string `json:"device"` // UUID, "" for the CPU

	Streams int `json:"streams"` // open
	Resting int `json:"resting"` // those of them on which nothing has moved for control.StreamRest
	Leases  int `json:"leases"`  // granted, not yet used nor expired

	Memory       int64 `json:"memory"`                  // bytes of the host that the process has for itself
	Reserved     int64 `json:"reserved"`                // bytes of the host that are reserved for it
	DeviceMemory int64 `json:"device_memory,omitempty"` // bytes of the device that the process has

	control.Counts         // of its runner, at most a second old
	Tuned          *Choice `json:"tuned,omitempty"`      // the configuration found by tuning, if there is one
	Form           string  `json:"form,omitempty"`       // FormSaved or FormFolded; "" before it is being loaded
	NotFrozen      string  `json:"not_frozen,omitempty"` // why it stays in the saved form
	Superseded     bool    `json:"superseded,omitempty"` // a newer version serves, or the folded form
}

// Memory is how much of the host's memory models may have, and have.
type Memory struct {
	Budget   int64 `json:"budget"`   // bytes; 0 is no bound
	Reserved int64 `json:"reserved"` // bytes that runners have, or are loading with
}

// Totals are what the front and all its runners have done since the front's start, and what they have now. The sums
// include runners that have ended; of one that was killed the last second may be missing.
type Totals struct {
	Rows         int64   `json:"rows"`          // answered, those that were refused included
	Batches      int64   `json:"batches"`       // runs of TensorFlow
	Errors       int64   `json:"errors"`        // rows that were refused, and streams that failed
	Queued       int64   `json:"queued"`        // rows that wait for a run now
	QueueSeconds float64 `json:"queue_seconds"` // sum of the waits of all tasks
	RunSeconds   float64 `json:"run_seconds"`   // sum of the durations of all runs
	Streams      int     `json:"streams"`       // open now
	Models       int     `json:"models"`        // ready now
	Memory       int64   `json:"memory"`        // bytes of the host that the front and its runners have for themselves
	DeviceMemory int64   `json:"device_memory"` // bytes of devices that the runners have
}

// Device is a GPU, or an instance of one that is in MIG mode.
type Device struct {
	UUID    string `json:"uuid"`             // GPU-..., or MIG-... of an instance
	Name    string `json:"name"`             // as NVIDIA calls it; that of an instance ends with its profile
	Index   string `json:"index"`            // as nvidia-smi prints it; 0:1 is instance 1 of GPU 0
	Parent  string `json:"parent,omitempty"` // UUID of the GPU of an instance
	Memory  int64  `json:"memory"`           // bytes
	Free    int64  `json:"free"`             // bytes that no process had when they were last read
	Compute string `json:"compute"`          // compute capability, such as 8.0
	// percent of the time in which a kernel ran; -1 if unknown, as always for an instance
	Utilisation int    `json:"utilisation"`
	Healthy     bool   `json:"healthy"`          // if false, no model is loaded on it until the front starts again
	Reason      string `json:"reason,omitempty"` // why it is not healthy, or why its numbers are old
}

// TuneResult is one result of model.tune: a configuration that was measured or, as the last one, the outcome.
type TuneResult struct {
	Candidate *Candidate `json:"candidate,omitempty"`
	Tuning    *Tuning    `json:"tuning,omitempty"`
}

// Candidate is a configuration with its measurements, or with the reason why it has none.
type Candidate struct {
	Choice
	RowsPerSecond float64 `json:"rows_per_s"` // median of the windows
	Relative      float64 `json:"relative"`   // to the default; 0 until that is known
	Agrees        bool    `json:"agrees"`
	// Difference is the largest difference to the reference's answers, divided by the tolerance; above 1 Agrees is
	// false.
	Difference float64 `json:"difference"`
	Reason     string  `json:"reason,omitempty"` // why there is no speed
}

// Choice is a configuration of a runner that was found by measuring.
type Choice struct {
	// digest of the model with its variables made constants, "" for the model as it is
	Frozen       string `json:"frozen,omitempty"`
	OneDNN       bool   `json:"onednn"`            // TF_ENABLE_ONEDNN_OPTS
	Cores        int    `json:"cores"`             // threads of one run
	BatchThreads int    `json:"num_batch_threads"` // runs at once
	BatchSize    int    `json:"max_batch_size"`    // rows of one run
}

// Tuning is the outcome of a search.
type Tuning struct {
	Model     string `json:"model"`
	Version   string `json:"version"`
	Signature string `json:"signature"`
	Digest    string `json:"digest"`
	Machine   string `json:"machine"`
	// Busy is the share of the host's processors that other programs used before the search.
	Busy float64 `json:"busy"`
	// NotFrozen says why the graph was not frozen; "" if it was.
	NotFrozen  string      `json:"not_frozen,omitempty"`
	Candidates []Candidate `json:"candidates"` // the fastest first
	Default    Candidate   `json:"default"`    // the configuration without tuning
	Chosen     Candidate   `json:"chosen"`
	Stored     string      `json:"stored"` // the file of the profile
}
