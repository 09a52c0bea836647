// Plan: a signature joined with a request, checked before any row is read.

package tensor

import (
	"slices"

	"github.com/apache/arrow/go/v15/arrow"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// MaxRank is the most dimensions of an input or output, that of the rows included: a column has one list for each but
// that, and Arrow's other libraries refuse a schema of deeper ones.
const MaxRank = 64

// Options are the fields of a request that shape a plan.
type Options struct {
	Inputs      protocol.Inputs          // nil: same names, or the only column to the only input
	Outputs     protocol.Outputs         // nil: all outputs, by tensor name
	Layout      string                   // protocol.LayoutList or protocol.LayoutTensor; "" is protocol.LayoutList
	Pictures    map[string]PictureTensor // inputs fed by pictures, and the tensors that these become
	ErrorColumn string                   // column for error texts; "" for none
	Metadata    arrow.Metadata           // of the answer's schema
}

// PictureTensor is the tensor that the pictures of an input become.
type PictureTensor struct {
	DType savedmodel.DType
	Shape []int64 // of the tensor, -1 for its rows
}

// Plan holds which inputs are fed, which outputs answer, and the schema of the answer. It is immutable and safe for
// concurrent use.
type Plan struct {
	options Options
	inputs  []input
	outputs []output
	schema  *arrow.Schema
}

// input is an input of the signature that a column feeds.
type input struct {
	protocol.Input
	spec      savedmodel.Spec
	picture   bool
	filling   []byte          // one element of padding, or nil
	lengths   savedmodel.Spec // input that receives the lengths, if Lengths names one
	maxLength int64           // largest length that its dtype holds
}

// NewPlan checks a request against a signature. Its faults name the input, output or column, and those of the
// signature.
func NewPlan(signature savedmodel.Signature, options Options) (*Plan, error) {
	plan := &Plan{options: options}
	if err := plan.planInputs(signature.Inputs); err != nil {
		return nil, err
	}
	outputs := options.Outputs
	if outputs == nil {
		for _, spec := range signature.Outputs {
			outputs = append(outputs, protocol.Output{Tensor: spec.Name, Column: spec.Name})
		}
	}
	if len(outputs) == 0 {
		return nil, fault.New(fault.BadRequest, "no output is requested; the signature has %s",
			describe(signature.Outputs...))
	}
	var columns []arrow.Field
	add := func(field arrow.Field) error {
		if slices.ContainsFunc(columns, func(f arrow.Field) bool { return f.Name == field.Name }) {
			return fault.New(fault.BadRequest,
				"two outputs have the column name %q; name another in outputs or error_column", field.Name)
		}
		columns = append(columns, field)
		return nil
	}
	for _, entry := range outputs {
		spec, ok := find(signature.Outputs, entry.Tensor)
		if !ok {
			return nil, fault.New(fault.BadRequest, "no output %q; the signature has %s", entry.Tensor,
				describe(signature.Outputs...))
		}
		out, field, err := planOutput(spec, entry, options.Layout == protocol.LayoutTensor)
		if err != nil {
			return nil, err
		}
		plan.outputs = append(plan.outputs, out)
		if err := add(field); err != nil {
			return nil, err
		}
	}
	if options.ErrorColumn != "" {
		if err := add(arrow.Field{Name: options.ErrorColumn, Type: arrow.BinaryTypes.String,
			Nullable: true}); err != nil {
			return nil, err
		}
	}
	plan.schema = arrow.NewSchema(columns, &options.Metadata)
	return plan, nil
}

// planInputs joins the mapping with the inputs of the signature, in the signature's order.
func (p *Plan) planInputs(specs []savedmodel.Spec) error {
	for _, entry := range p.options.Inputs {
		if _, ok := find(specs, entry.Tensor); !ok {
			return fault.New(fault.BadRequest, "no input %q; the signature has %s", entry.Tensor, describe(specs...))
		}
	}
	for name, made := range p.options.Pictures {
		spec, ok := find(specs, name)
		if !ok {
			return fault.New(fault.BadRequest, "preprocess names no input %q; the signature has %s", name,
				describe(specs...))
		}
		fits := spec.UnknownRank || slices.EqualFunc(spec.Shape, made.Shape,
			func(want, is int64) bool { return want < 0 || want == is })
		if spec.DType != made.DType || !fits {
			return fault.New(fault.BadRequest, "preprocess makes %s %s, but the input is %s", made.DType,
				shapeText(made.Shape), describe(spec))
		}
	}
	if len(specs) == 0 {
		return fault.New(fault.BadRequest, "the signature has no input, so it has no rows")
	}
	for _, spec := range specs {
		if len(spec.Shape) > MaxRank {
			return fault.New(fault.BadRequest, "input %q has %d dimensions; a tensor has %d at most, the rows included",
				spec.Name, len(spec.Shape), MaxRank)
		}
		if !spec.UnknownRank && (len(spec.Shape) == 0 || spec.Shape[0] >= 0) {
			return fault.New(fault.BadRequest,
				"input %s has no batch dimension: its first dimension must be unknown, export it as None",
				describe(spec))
		}
		_, isPicture := p.options.Pictures[spec.Name]
		in := input{Input: protocol.Input{Tensor: spec.Name, Column: spec.Name}, spec: spec, picture: isPicture}
		if p.options.Inputs != nil {
			var ok bool
			in.Input, ok = p.options.Inputs.Find(spec.Name)
			counts := lengthsInto(p.options.Inputs, spec.Name)
			switch {
			case ok && counts > 0, counts > 1:
				return fault.New(fault.BadRequest, "input %q is fed twice: name it once, in inputs or in lengths",
					spec.Name)
			case counts == 1 && in.picture:
				return fault.New(fault.BadRequest, "input %q receives lengths, so it cannot have preprocess", spec.Name)
			case counts == 1:
				continue // fed with the input that names it
			case !ok:
				return fault.New(fault.BadRequest, "input %q is not mapped to a column; the signature has %s",
					spec.Name, describe(specs...))
			}
		}
		if err := in.check(specs); err != nil {
			return err
		}
		p.inputs = append(p.inputs, in)
	}
	return nil
}

// lengthsInto returns how many inputs give the lengths of their rows to a tensor.
func lengthsInto(inputs protocol.Inputs, tensor string) (n int) {
	for _, entry := range inputs {
		if entry.Lengths == tensor {
			n++
		}
	}
	return n
}

// check validates encoding, pad and lengths, and encodes the padding.
func (in *input) check(specs []savedmodel.Spec) error {
	listless := !in.spec.UnknownRank && len(in.spec.Shape) < 2
	switch {
	case in.picture && (in.Encoding != "" || in.Pad != nil || in.Lengths != ""):
		return fault.New(fault.BadRequest, "input %q has preprocess, so it cannot have encoding, pad or lengths",
			in.spec.Name)
	case in.Encoding != "" && in.Encoding != protocol.EncodingRaw:
		return fault.New(fault.BadRequest, "input %q has the encoding %q; this server knows %q", in.spec.Name,
			in.Encoding, protocol.EncodingRaw)
	case in.Encoding != "" && (in.Pad != nil || in.Lengths != ""):
		return fault.New(fault.BadRequest,
			"input %q has the encoding raw, whose rows all have one length; leave pad and lengths out", in.spec.Name)
	case in.Encoding != "" && in.spec.DType.Size() == 0:
		return fault.New(fault.BadRequest,
			"input %s cannot have the encoding raw: its elements have no fixed size; map a column of strings",
			describe(in.spec))
	case in.Encoding != "" && (in.spec.UnknownRank || slices.ContainsFunc(in.spec.Shape[1:],
		func(d int64) bool { return d < 0 })):
		return fault.New(fault.BadRequest, "input %s cannot have the encoding raw: "+
			"all its dimensions after the first must be known; map a column of lists, "+
			"or export the model with its shape", describe(in.spec))
	case in.Encoding != "" && !fits(in.spec.DType, in.spec.Shape[1:]):
		return fault.New(fault.BadRequest, "input %s cannot have the encoding raw: a row has more than %d MiB",
			describe(in.spec), MaxTensorBytes>>20)
	case (in.Pad != nil || in.Lengths != "") && listless:
		return fault.New(fault.BadRequest,
			"input %s has no dimension after the first, so it cannot have pad or lengths", describe(in.spec))
	}
	if in.Pad != nil {
		filling, err := padding(in.Pad, in.spec.DType)
		if err != nil {
			return fault.New(fault.BadRequest, "input %s: %w", describe(in.spec), err)
		}
		in.filling = filling
	}
	if in.Lengths != "" {
		var ok bool
		if in.lengths, ok = find(specs, in.Lengths); !ok {
			return fault.New(fault.BadRequest, "lengths of input %q names no input %q; the signature has %s",
				in.spec.Name, in.Lengths, describe(specs...))
		}
		in.maxLength, ok = maxLengthOf(in.lengths.DType)
		if !ok || !in.lengths.UnknownRank && len(in.lengths.Shape) != 1 {
			return fault.New(fault.BadRequest,
				"lengths of input %q wants an input of whole numbers of rank 1, but names %s", in.spec.Name,
				describe(in.lengths))
		}
	}
	return nil
}

// Schema returns the schema of the answer: the output columns, then the error column.
func (p *Plan) Schema() *arrow.Schema { return p.schema }

// Fetches returns the graph tensors to fetch, in the order that Settle and Records expect.
func (p *Plan) Fetches() []string {
	names := make([]string, len(p.outputs))
	for i, out := range p.outputs {
		names[i] = out.spec.Tensor
	}
	return names
}

// Open reports whether an output has an open dimension after the first, whose size may depend on all rows of a run.
func (p *Plan) Open() bool {
	return slices.ContainsFunc(p.outputs, func(out output) bool { return slices.Contains(out.spec.Shape[1:], -1) })
}

func find(specs []savedmodel.Spec, name string) (savedmodel.Spec, bool) {
	for _, spec := range specs {
		if spec.Name == name {
			return spec, true
		}
	}
	return savedmodel.Spec{}, false
}
