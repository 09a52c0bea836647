package handlers

import (
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/batch"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// WireVersion is the value of the field v that this server speaks.
const WireVersion = 1

// MaxDescriptorBytes bounds a descriptor. A ticket, which is one in other words, may be longer; anything
// beyond maxTicketBytes is refused unread.
const (
	MaxDescriptorBytes = 64 << 10
	maxTicketBytes     = 8 * MaxDescriptorBytes
)

// MaxRunTimeout is the largest run_timeout_ms, but for 0.
const MaxRunTimeout = 7 * 24 * time.Hour

// Error policies: what becomes of a refused row.
const (
	OnErrorFail   = "fail"   // the stream ends with an error that names the row
	OnErrorNull   = "null"   // the row's outputs are null
	OnErrorColumn = "column" // the row's outputs are null and the error column says why
)

// Features are the fields that change answers and that a client may rely on.
var Features = []string{"on_error", "nulls", "preprocess", "pictures", "run_timeout_ms", "encoding", "pad", "type", "shape", "layout", "device"}

// Descriptor is the request of a stream: the CMD bytes of a Flight descriptor, and of a ticket.
type Descriptor struct {
	V         int    `json:"v"`
	Model     string `json:"model"`
	Version   string `json:"version,omitempty"`
	Signature string `json:"signature,omitempty"`

	Inputs     tensor.Inputs         `json:"inputs,omitempty"`
	Outputs    tensor.Outputs        `json:"outputs,omitempty"`
	Preprocess map[string]Preprocess `json:"preprocess,omitempty"`

	OnError     string `json:"on_error,omitempty"`
	ErrorColumn string `json:"error_column,omitempty"`
	Nulls       string `json:"nulls,omitempty"` // "null" or "fail"

	Device string `json:"device,omitempty"`
	Layout string `json:"layout,omitempty"`

	Plane    string   `json:"plane,omitempty"` // a hint, which this server does not follow
	Batching Batching `json:"batching,omitzero"`

	// RunTimeoutMS bounds each TensorFlow run; nil is DefaultRunTimeout, 0 is none.
	RunTimeoutMS *int64 `json:"run_timeout_ms,omitempty"`

	RequestID string `json:"request_id,omitempty"`
	Redirect  *bool  `json:"redirect,omitempty"` // false: relay through the front
	Lease     *Lease `json:"lease,omitempty"`
}

// Batching is what a stream asks of the batcher: "off" or an object. It is a hint, but for "off".
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
	if err := decodeStrictly(data, &numbers); err != nil {
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

// limits says the same to the batcher.
func (b Batching) limits() batch.Limits {
	const most = math.MaxInt64 / int64(time.Microsecond)
	return batch.Limits{Off: b.Off, MaxBatchSize: b.MaxBatchSize, BatchTimeout: time.Duration(min(b.BatchTimeoutMicros, most)) * time.Microsecond}
}

// DefaultRunTimeout bounds a TensorFlow run when the descriptor does not.
const DefaultRunTimeout = 300 * time.Second

// UnmarshalJSON accepts version as a number too.
func (d *Descriptor) UnmarshalJSON(data []byte) error {
	type plain Descriptor
	aux := struct {
		Version versionNumber `json:"version"`
		*plain
	}{plain: (*plain)(d)}
	if err := decodeStrictly(data, &aux); err != nil {
		return err
	}
	d.Version = string(aux.Version)
	return nil
}

// versionNumber is a version as text, and as JSON either text or a number.
type versionNumber string

// UnmarshalJSON is part of json.Unmarshaler.
func (v *versionNumber) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, (*string)(v)) == nil {
		return nil
	}
	number, err := strconv.ParseUint(string(data), 10, 63)
	if err != nil {
		return fmt.Errorf("version must be a number, \"latest\" or a label")
	}
	*v = versionNumber(strconv.FormatUint(number, 10))
	return nil
}

// ParseDescriptor reads the command of a Flight descriptor, checks it and sets the defaults.
// Its faults say which field is wrong.
func ParseDescriptor(fd *flight.FlightDescriptor) (*Descriptor, error) {
	if fd == nil || fd.GetType() != flight.DescriptorCMD {
		return nil, fault.New(fault.BadRequest, "the stream's first message must hold a CMD descriptor, JSON such as {\"v\":1,\"model\":\"name\"}")
	}
	d := &Descriptor{}
	if len(fd.GetCmd()) <= maxTicketBytes {
		if err := d.UnmarshalJSON(fd.GetCmd()); err != nil {
			return nil, fault.New(fault.BadRequest, "descriptor: %w", err)
		}
	}
	if len(fd.GetCmd()) > MaxDescriptorBytes && d.Lease == nil {
		return nil, fault.New(fault.BadRequest, "the descriptor has %d bytes, more than %d", len(fd.GetCmd()), MaxDescriptorBytes)
	}
	if err := d.check(); err != nil {
		return nil, fault.New(fault.BadRequest, "descriptor: %w", err)
	}
	return d, nil
}

// check sets defaults and refuses what this server cannot do.
func (d *Descriptor) check() error {
	if d.V != WireVersion {
		return fmt.Errorf("v is %d; this server speaks %d", d.V, WireVersion)
	}
	if d.Model == "" {
		return fmt.Errorf("model is missing")
	}
	if d.RunTimeoutMS != nil && (*d.RunTimeoutMS < 0 || *d.RunTimeoutMS > MaxRunTimeout.Milliseconds()) {
		return fmt.Errorf("run_timeout_ms is %d; want 0 for none, or up to %d", *d.RunTimeoutMS, MaxRunTimeout.Milliseconds())
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
		{"layout", &d.Layout, []string{tensor.LayoutList, tensor.LayoutTensor}},
	} {
		if err := choose(choice.field, choice.value, choice.known...); err != nil {
			return err
		}
	}
	if d.Device == "" {
		d.Device = DeviceAuto
	}
	if err := checkDevice(d.Device); err != nil {
		return err
	}
	return d.checkPictures()
}

// Devices that a request may name, besides the UUIDs of NVIDIA's GPUs and the addresses that Spark gives a task, one or
// several with commas between them. Which device that is only the host that has it can tell.
const (
	DeviceAuto = "auto" // a GPU if there is any
	DeviceCPU  = "cpu"
	DeviceGPU  = "gpu"
)

// deviceForm is how a device may be written: a UUID as nvidia-smi -L prints it (of a MIG instance also in the form of
// drivers before 470, with slashes), or an index.
var deviceForm = regexp.MustCompile(`^(auto|cpu|gpu|((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+)(,((GPU|MIG)-[0-9A-Za-z/-]+|[0-9]+))*)$`)

// checkDevice refuses what cannot be a device on any host.
func checkDevice(device string) error {
	if !deviceForm.MatchString(device) {
		return fmt.Errorf("device is %q; this server knows %q, a UUID that begins with GPU- or MIG-, or numbers such as \"0\" or \"0,1\"", device, []string{DeviceAuto, DeviceCPU, DeviceGPU})
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

// Plan joins the descriptor with the signature that it names.
func (d *Descriptor) Plan(model *savedmodel.Model) (*tensor.Plan, error) {
	signature, err := model.Signature(d.Signature)
	if err != nil {
		return nil, fault.New(kindOf(err), "model %s: %w", d.Model, err)
	}
	if signature.Assigns != "" {
		return nil, d.say(fault.New(fault.BadRequest, "it writes to a variable (%s), so a batch that is sent again after a fault would be answered differently; export a signature that only reads", signature.Assigns))
	}
	options := tensor.Options{Inputs: d.Inputs, Outputs: d.Outputs, Layout: d.Layout, Metadata: d.schemaMetadata(signature)}
	if options.Pictures, err = d.made(signature); err != nil {
		return nil, d.say(err)
	}
	if d.OnError == OnErrorColumn {
		options.ErrorColumn = d.ErrorColumn
	}
	plan, err := tensor.NewPlan(signature, options)
	if err != nil {
		return nil, d.say(err)
	}
	return plan, nil
}

// schemaMetadata is what the schema of the answer says about the request.
func (d *Descriptor) schemaMetadata(signature savedmodel.Signature) arrow.Metadata {
	type input struct {
		TensorMetadata
		Column string `json:"column,omitempty"`
	}
	inputs := make([]input, 0, len(signature.Inputs))
	for _, about := range tensorMetadata(signature.Inputs) {
		inputs = append(inputs, input{about, d.Inputs.Column(about.Name)})
	}
	text := func(v any) string {
		data, err := json.Marshal(v)
		if err != nil {
			panic(fmt.Sprintf("numbers and strings always encode: %v", err))
		}
		return string(data)
	}
	return arrow.NewMetadata(
		[]string{"flightsvc.v", "flightsvc.features", "flightsvc.inputs"},
		[]string{strconv.Itoa(WireVersion), text(Features), text(inputs)})
}

// say puts model and signature in front of an error and keeps its kind.
func (d *Descriptor) say(err error) error {
	return fault.New(kindOf(err), "model %s, signature %s: %w", d.Model, d.Signature, err)
}

// runTimeout returns the bound of each TensorFlow run, 0 for none.
func (d *Descriptor) runTimeout() time.Duration {
	if d.RunTimeoutMS == nil {
		return DefaultRunTimeout
	}
	return time.Duration(*d.RunTimeoutMS) * time.Millisecond
}

// redirect reports whether the caller takes a location.
func (d *Descriptor) redirect() bool { return d.Redirect == nil || *d.Redirect }

// Command returns the descriptor as CMD bytes.
func (d *Descriptor) Command() ([]byte, error) { return json.Marshal(d) }
