// The lines that front and runner write to each other: the front a Setup, the runner Reports.

package control

import (
	"slices"
	"time"

	"flightsvc/internal/fault"
)

// Setup is the first line that a runner reads on its standard input, as JSON. The end of standard input ends the
// runner.
type Setup struct {
	Model    string `json:"model"` // reference, for messages
	Dir      string `json:"dir"`   // folder of the SavedModel that is loaded, "" for protocol.Image
	Socket   string `json:"socket"`
	Key      []byte `json:"key"` // checks leases
	Server   string `json:"server"`
	LogLevel string `json:"log_level"`

	Cores int `json:"cores"` // that all runs together may use
	// Threads is how many threads one run has; 0 is as many as there are cores for each of the runs at once. A run that
	// is alone may have one for each core, see RoomForTwo.
	Threads int `json:"threads,omitempty"`
	// RoomForTwo says that the host has memory for the model twice, which a second session with more threads needs.
	RoomForTwo  bool     `json:"room_for_two,omitempty"`
	Batching    Batching `json:"batching"`
	OpLibraries []string `json:"op_libraries,omitempty"` // absolute, and allowed
	WarmUp      bool     `json:"warm_up"`

	// Device is the UUID of the GPU or MIG instance that the runner's environment shows to TensorFlow, "" for none;
	// DeviceBytes bounds what TensorFlow takes of its memory, 0 is no bound.
	Device      string `json:"device,omitempty"`
	DeviceBytes int64  `json:"device_bytes,omitempty"`

	MaxImagePixels int64 `json:"max_image_pixels"` // of a picture
	MaxImageBytes  int64 `json:"max_image_bytes"`  // of a picture's file

	Form string `json:"form,omitempty"` // of the model in Dir, for the metadata of answers
	// Sample, if set, is the file for the first run of real rows. Replay, if set, is the file of a sample that is run
	// before the model counts as ready; its outputs are written to the file Replayed(Replay).
	Sample string `json:"sample,omitempty"`
	Replay string `json:"replay,omitempty"`

	Measure *Measurement `json:"measure,omitempty"` // if set, the runner measures and ends, and does not serve
}

// Report is a line that a runner writes on its standard output, as JSON. A load ends with Ready or Error; Warming may
// come before. Later reports are about streams.
type Report struct {
	Build      string     `json:"build,omitempty"`
	TensorFlow string     `json:"tensorflow,omitempty"` // version of the library
	Warming    bool       `json:"warming,omitempty"`    // the model is loaded and runs for the first time
	Ready      bool       `json:"ready,omitempty"`
	Error      string     `json:"error,omitempty"`
	Kind       fault.Kind `json:"kind,omitempty"`
	NoMemory   bool       `json:"no_memory,omitempty"` // with Error: the device had no memory for the model

	Opened   string `json:"opened,omitempty"`   // lease of a stream that opened
	Closed   string `json:"closed,omitempty"`   // lease of a stream that closed
	Resting  string `json:"resting,omitempty"`  // lease of a stream on which nothing has moved for StreamRest
	Stirring string `json:"stirring,omitempty"` // lease of a stream that rested and moves again
	Answered bool   `json:"answered,omitempty"` // once: the runner has answered its first record batch
	// DeviceBatch is the most rows of a run that fit into the device's memory, reported when that is fewer than a run
	// had. Pressed means that not even one row fits: the front may end other runners to make room.
	DeviceBatch int  `json:"device_batch,omitempty"`
	Pressed     bool `json:"pressed,omitempty"`
	// Counts are sent when they have changed: with any other report, and once a second.
	Counts *Counts `json:"counts,omitempty"`

	Measured []Measured `json:"measured,omitempty"` // the result of Setup.Measure, in place of Ready
}

// Counts are what a runner has done since its start, and what waits now.
type Counts struct {
	Rows         int64   `json:"rows"`          // answered, those that were refused included
	Errors       int64   `json:"errors"`        // rows that were refused, and streams that failed
	Runs         int64   `json:"runs"`          // of TensorFlow; each is one batch
	JoinedRuns   int64   `json:"joined_runs"`   // those that served more than one stream
	Queued       int64   `json:"queued"`        // rows that wait for a run now
	QueueSeconds float64 `json:"queue_seconds"` // sum of the waits of all tasks
	RunSeconds   float64 `json:"run_seconds"`   // sum of the durations of all runs
}

// Add returns the sum of two counts.
func (c Counts) Add(other Counts) Counts {
	return Counts{
		Rows: c.Rows + other.Rows, Errors: c.Errors + other.Errors, Runs: c.Runs + other.Runs,
		JoinedRuns: c.JoinedRuns + other.JoinedRuns, Queued: c.Queued + other.Queued,
		QueueSeconds: c.QueueSeconds + other.QueueSeconds, RunSeconds: c.RunSeconds + other.RunSeconds,
	}
}

// Sub returns what was counted since other.
func (c Counts) Sub(other Counts) Counts {
	return Counts{
		Rows: c.Rows - other.Rows, Errors: c.Errors - other.Errors, Runs: c.Runs - other.Runs,
		JoinedRuns: c.JoinedRuns - other.JoinedRuns, Queued: c.Queued - other.Queued,
		QueueSeconds: c.QueueSeconds - other.QueueSeconds, RunSeconds: c.RunSeconds - other.RunSeconds,
	}
}

// Batching is how a model is batched, in TF Serving's words. A field that is zero has its default.
type Batching struct {
	MaxBatchSize int `json:"max_batch_size,omitempty"` // rows of one run; default 1,024
	// the longest that a stream may ask to wait for other streams' rows; default 10,000
	BatchTimeoutMicros int64 `json:"batch_timeout_micros,omitempty"`
	// number of waiting record batches from which a runner refuses new streams; default 128
	MaxEnqueuedBatches int `json:"max_enqueued_batches,omitempty"`
	NumBatchThreads    int `json:"num_batch_threads,omitempty"` // runs at once; default: as many as cores
	// AllowedBatchSizes are the only numbers of rows of a run, ascending: a smaller batch is padded with copies of its
	// first row. The last one is MaxBatchSize. An empty list allows all.
	AllowedBatchSizes []int `json:"allowed_batch_sizes,omitempty"`
}

// UpTo limits the rows of a run to most, never below the smallest of the allowed batch sizes.
func (b Batching) UpTo(most int) Batching {
	if sizes := b.AllowedBatchSizes; len(sizes) > 0 {
		n, _ := slices.BinarySearch(sizes, most+1)
		b.AllowedBatchSizes = sizes[:max(n, 1)]
		b.MaxBatchSize = b.AllowedBatchSizes[len(b.AllowedBatchSizes)-1]
	} else if b.MaxBatchSize == 0 || b.MaxBatchSize > most {
		b.MaxBatchSize = most
	}
	return b
}

// SettingsFile is the name of the file with a model's settings. It lies beside the numbered folders of the model's
// versions or, if there are none, in the folder of the SavedModel.
const SettingsFile = "flightsvc.json"

// StreamRest is how long nothing may move on a stream (no run, no message in or out) until the stream no longer keeps
// its runner in memory.
const StreamRest = 5 * time.Second
