// Plans: what a descriptor means for one model.

package handlers

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/batch"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// ParseDescriptor is protocol.ParseDescriptor for a Flight descriptor, which must be of the type CMD.
func ParseDescriptor(fd *flight.FlightDescriptor) (*protocol.Descriptor, error) {
	if fd == nil || fd.GetType() != flight.DescriptorCMD {
		return nil, fault.New(fault.BadRequest,
			"the stream's first message must hold a CMD descriptor, JSON such as {\"v\":1,\"model\":\"name\"}")
	}
	return protocol.ParseDescriptor(fd.GetCmd())
}

// Plan joins a descriptor with the signature that it names of a model. Its faults name the model and the signature.
func Plan(d *protocol.Descriptor, model *savedmodel.Model) (*tensor.Plan, error) {
	signature, err := model.Signature(d.Signature)
	if err != nil {
		return nil, fault.New(kindOf(err), "model %s: %w", d.Model, err)
	}
	if signature.Assigns != "" {
		return nil, d.Annotate(fault.New(fault.BadRequest, "it writes to a variable (%s), so a batch that is sent "+
			"again after a fault would be answered differently; export a signature that only reads", signature.Assigns))
	}
	options := tensor.Options{
		Inputs: d.Inputs, Outputs: d.Outputs, Layout: d.Layout, Metadata: schemaMetadata(d, signature),
	}
	if options.Pictures, err = pictureTensors(d, signature); err != nil {
		return nil, d.Annotate(err)
	}
	if d.OnError == protocol.OnErrorColumn {
		options.ErrorColumn = d.ErrorColumn
	}
	plan, err := tensor.NewPlan(signature, options)
	if err != nil {
		return nil, d.Annotate(err)
	}
	return plan, nil
}

// pictureTensors returns the tensors that the pictures of each input become. It sets the types that the descriptor
// leaves open.
func pictureTensors(d *protocol.Descriptor, signature savedmodel.Signature) (map[string]tensor.PictureTensor, error) {
	all := make(map[string]tensor.PictureTensor, len(d.Preprocess))
	for name, p := range d.Preprocess {
		if d.Model == protocol.Image {
			all[name] = tensor.PictureTensor{DType: savedmodel.String, Shape: []int64{-1}}
			continue
		}
		at := slices.IndexFunc(signature.Inputs, func(spec savedmodel.Spec) bool { return spec.Name == name })
		if p.DType == "" && at >= 0 { // tensor.NewPlan refuses a name that the signature lacks
			p.DType = signature.Inputs[at].DType.String()
			if p.Type() == 0 {
				return nil, fault.New(fault.BadRequest, "preprocess of input %q, which is %s: pictures become %s",
					name, p.DType, protocol.PictureTypes)
			}
			d.Preprocess[name] = p
		}
		all[name] = tensor.PictureTensor{DType: p.Type(), Shape: []int64{-1, int64(p.Size[0]), int64(p.Size[1]),
			int64(p.ChannelCount())}}
	}
	return all, nil
}

// schemaMetadata returns the metadata of the answer's schema: the version of the protocol, and the model's inputs.
func schemaMetadata(d *protocol.Descriptor, signature savedmodel.Signature) arrow.Metadata {
	type input struct {
		protocol.TensorMetadata
		Column string `json:"column,omitempty"`
	}
	inputs := make([]input, 0, len(signature.Inputs))
	for _, about := range protocol.Tensors(signature.Inputs) {
		entry, _ := d.Inputs.Find(about.Name)
		inputs = append(inputs, input{about, entry.Column})
	}
	text, err := json.Marshal(inputs)
	if err != nil {
		panic(fmt.Sprintf("numbers and strings always encode: %v", err))
	}
	return arrow.NewMetadata(
		[]string{"flightsvc.v", "flightsvc.inputs"},
		[]string{strconv.Itoa(protocol.Version), string(text)})
}

// batchLimits returns the batcher's limits for what a descriptor asks.
func batchLimits(b protocol.Batching) batch.Limits {
	const most = math.MaxInt64 / int64(time.Microsecond)
	return batch.Limits{
		Off: b.Off, MaxBatchSize: b.MaxBatchSize,
		BatchTimeout: time.Duration(min(b.BatchTimeoutMicros, most)) * time.Microsecond,
	}
}
