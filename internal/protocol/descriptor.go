// Descriptors: what a caller asks of a model, as JSON.

package protocol

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Version is the value of the field v that this server understands.
const Version = 1

// MaxDescriptorBytes bounds a descriptor. A ticket is a descriptor with all defaults written out and may be longer;
// anything beyond maxTicketBytes is refused unread.
const (
	MaxDescriptorBytes = 64 << 10
	maxTicketBytes     = 8 * MaxDescriptorBytes
)

// MaxRunTimeout is the largest run_timeout_ms; 0 means no limit.
const MaxRunTimeout = 7 * 24 * time.Hour

// Error policies: what becomes of a refused row.
const (
	OnErrorFail   = "fail"   // the stream ends with an error that names the row
	OnErrorNull   = "null"   // the row's outputs are null
	OnErrorColumn = "column" // the row's outputs are null and the error column says why
)

// Layouts of output columns.
const (
	LayoutList   = "list"   // nested lists of types that Spark reads
	LayoutTensor = "tensor" // arrow.fixed_shape_tensor, and the tensor's own types
)

// Descriptor is the request of a stream: the CMD bytes of a Flight descriptor, and of a ticket.
type Descriptor struct {
	V         int    `json:"v"`
	Model     string `json:"model"`
	Version   string `json:"version,omitempty"`
	Signature string `json:"signature,omitempty"`

	Inputs     Inputs                `json:"inputs,omitempty"`
	Outputs    Outputs               `json:"outputs,omitempty"`
	Preprocess map[string]Preprocess `json:"preprocess,omitempty"`

	OnError     string `json:"on_error,omitempty"`
	ErrorColumn string `json:"error_column,omitempty"`
	Nulls       string `json:"nulls,omitempty"` // "null" or "fail"

	Device string `json:"device,omitempty"`
	Layout string `json:"layout,omitempty"`

	Plane    string   `json:"plane,omitempty"` // a hint that this server ignores
	Batching Batching `json:"batching,omitzero"`

	// RunTimeoutMS bounds each TensorFlow run; nil is DefaultRunTimeout, 0 is none.
	RunTimeoutMS *int64 `json:"run_timeout_ms,omitempty"`

	RequestID string `json:"request_id,omitempty"`
	Redirect  *bool  `json:"redirect,omitempty"` // false: relay through the front
	Lease     *Lease `json:"lease,omitempty"`
}

// Batching is what a stream asks of the batcher: "off", or an object with numbers, which are only hints.
type Batching struct {
	Off                bool
	MaxBatchSize       int   // rows of one run; 0 leaves the server's
	BatchTimeoutMicros int64 // how long to wait for other streams' rows
}

// batchingNumbers is the object in JSON.
type batchingNumbers struct {
	MaxBatchSize       int   `json:"max_batch_size,omitempty"`
	BatchTimeoutMicros int64 `json:"batch_timeout_micros,omitempty"`
}

const batchingOff = "off"

// UnmarshalJSON is part of json.Unmarshaler.
func (b *Batching) UnmarshalJSON(data []byte) error {
	var word string
	if json.Unmarshal(data, &word) == nil {
		if b.Off = word == batchingOff; !b.Off {
			return fmt.Errorf("batching is %q; want %q or an object", word, batchingOff)
		}
		return nil
	}
	var numbers batchingNumbers
	if err := Decode(data, &numbers); err != nil {
		return fmt.Errorf("batching: %w", err)
	}
	if numbers.MaxBatchSize < 0 || numbers.BatchTimeoutMicros < 0 {
		return fmt.Errorf("batching: max_batch_size and batch_timeout_micros cannot be negative")
	}
	b.MaxBatchSize, b.BatchTimeoutMicros = numbers.MaxBatchSize, numbers.BatchTimeoutMicros
	return nil
}

// MarshalJSON is part of json.Marshaler.
func (b Batching) MarshalJSON() ([]byte, error) {
	if b.Off {
		return json.Marshal(batchingOff)
	}
	return json.Marshal(batchingNumbers{b.MaxBatchSize, b.BatchTimeoutMicros})
}

// DefaultRunTimeout bounds a TensorFlow run when the descriptor does not.
const DefaultRunTimeout = 300 * time.Second

// UnmarshalJSON accepts version as a number too.
func (d *Descriptor) UnmarshalJSON(data []byte) error {
	type plain Descriptor
	aux := struct {
		Version VersionNumber `json:"version"`
		*plain
	}{plain: (*plain)(d)}
	if err := Decode(data, &aux); err != nil {
		return err
	}
	d.Version = string(aux.Version)
	return nil
}

// VersionNumber is a version as text. In JSON it is text or a number.
type VersionNumber string

// UnmarshalJSON is part of json.Unmarshaler.
func (v *VersionNumber) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, (*string)(v)) == nil {
		return nil
	}
	number, err := strconv.ParseUint(string(data), 10, 63)
	if err != nil {
		return fmt.Errorf("version must be a number, \"latest\" or a label")
	}
	*v = VersionNumber(strconv.FormatUint(number, 10))
	return nil
}

// ParseDescriptor reads the command of a Flight descriptor, checks it and sets the defaults. Its faults are BadRequest
// and say which field is wrong.
func ParseDescriptor(command []byte) (*Descriptor, error) {
	d := &Descriptor{}
	if len(command) <= maxTicketBytes {
		if err := d.UnmarshalJSON(command); err != nil {
			return nil, fault.New(fault.BadRequest, "descriptor: %w", err)
		}
	}
	if len(command) > MaxDescriptorBytes && d.Lease == nil {
		return nil, fault.New(fault.BadRequest, "the descriptor has %d bytes, more than %d",
			len(command), MaxDescriptorBytes)
	}
	if err := d.check(); err != nil {
		return nil, fault.New(fault.BadRequest, "descriptor: %w", err)
	}
	return d, nil
}

// check sets defaults and refuses what this server cannot do for any model.
func (d *Descriptor) check() error {
	if d.V != Version {
		return fmt.Errorf("v is %d; this server speaks %d", d.V, Version)
	}
	if d.Model == "" {
		return fmt.Errorf("model is missing")
	}
	if d.RunTimeoutMS != nil && (*d.RunTimeoutMS < 0 || *d.RunTimeoutMS > MaxRunTimeout.Milliseconds()) {
		return fmt.Errorf("run_timeout_ms is %d; want 0 for none, or up to %d",
			*d.RunTimeoutMS, MaxRunTimeout.Milliseconds())
	}
	if d.ErrorColumn == "" {
		d.ErrorColumn = "error"
	}
	for _, choice := range []struct {
		field string
		value *string
		known []string // the first is the default
	}{
		{"signature", &d.Signature, []string{savedmodel.DefaultSignature, d.Signature}},
		{"version", &d.Version, []string{"latest", d.Version}},
		{"on_error", &d.OnError, []string{OnErrorFail, OnErrorNull, OnErrorColumn}},
		{"nulls", &d.Nulls, []string{"null", "fail"}},
		{"layout", &d.Layout, []string{LayoutList, LayoutTensor}},
	} {
		if err := choose(choice.field, choice.value, choice.known...); err != nil {
			return err
		}
	}
	if d.Device == "" {
		d.Device = DeviceAuto
	}
	if err := CheckDevice(d.Device); err != nil {
		return err
	}
	return d.checkPictures()
}

// Devices that a request may name. It may also name UUIDs of NVIDIA's GPUs and the addresses that Spark gives a task,
// several separated by commas; only the host itself knows which devices these are.
const (
	DeviceAuto = "auto" // a GPU if there is any
	DeviceCPU  = "cpu"
	DeviceGPU  = "gpu"
)

// deviceForm is how a device may be written: a UUID as nvidia-smi -L prints it (of a MIG instance also in the form of
// drivers before 470, with slashes), or an index.
var deviceForm = regexp.MustCompile(
	`^(auto|cpu|gpu|((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+)(,((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+))*)$`)

// CheckDevice refuses a text that cannot be a device on any host.
func CheckDevice(device string) error {
	if !deviceForm.MatchString(device) {
		return fmt.Errorf("device is %q; this server knows %q, a UUID that begins with GPU- or MIG-, "+
			"or numbers such as \"0\" or \"0,1\"", device, []string{DeviceAuto, DeviceCPU, DeviceGPU})
	}
	return nil
}

// choose sets value to the first known one if it is empty, and refuses an unknown one.
func choose(field string, value *string, known ...string) error {
	if *value == "" {
		*value = known[0]
	}
	if !slices.Contains(known, *value) {
		return fmt.Errorf("%s is %q; this server knows %q", field, *value, known)
	}
	return nil
}

// Annotate prefixes an error with the names of model and signature; it keeps the error's kind.
func (d *Descriptor) Annotate(err error) error {
	kind, _ := fault.KindOf(err)
	return fault.New(kind, "model %s, signature %s: %w", d.Model, d.Signature, err)
}

// RunTimeout returns the bound of each TensorFlow run, 0 for none.
func (d *Descriptor) RunTimeout() time.Duration {
	if d.RunTimeoutMS == nil {
		return DefaultRunTimeout
	}
	return time.Duration(*d.RunTimeoutMS) * time.Millisecond
}

// TakesLocation reports whether the caller wants the address of a runner, rather than a relay through the front.
func (d *Descriptor) TakesLocation() bool { return d.Redirect == nil || *d.Redirect }

// Command returns the descriptor as CMD bytes.
func (d *Descriptor) Command() ([]byte, error) { return json.Marshal(d) }
