// Binding: which column of a stream feeds which input, and whether its type can.

package tensor

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// Binding is a plan fitted to the schema of one stream.
type Binding struct {
	plan   *Plan
	inputs []boundInput
}

type boundInput struct {
	input
	at   int    // position of the column
	name string // name of the column
	// What reads the column: one of both.
	source   source
	pictures *pictureColumn
}

// source makes the tensor of one input of the cells of a column; each kind of cell has its own.
type source interface {
	// nulls marks the rows that are null at any depth; nil for none.
	nulls(column arrow.Array) []bool
	// screen refuses the rows that cannot be part of the tensor for a reason of their own. It
	// reads rows that do not take part too, and may refuse them.
	screen(column arrow.Array, refuse func(row int, reason string))
	// value makes the tensor of the given rows, of which there is at least one and none would be
	// refused, and where the input has lengths the length of each row.
	value(column arrow.Array, rows []span, mem memory.Allocator) (value Value, lengths []int64, err error)
}

// Bind finds the column of each input in a stream's schema and checks its type. Its faults name input, column and both
// types.
func (p *Plan) Bind(schema *arrow.Schema) (*Binding, error) {
	binding := &Binding{plan: p}
	for _, in := range p.inputs {
		name := in.Column
		if p.options.Inputs == nil && len(p.inputs) == 1 && len(schema.Fields()) == 1 {
			name = schema.Field(0).Name
		}
		at := schema.FieldIndices(name)
		if len(at) != 1 {
			return nil, fault.New(fault.BadRequest, "input %q wants column %q, which the stream has %s; its columns "+
				"are %s",
				in.spec.Name, name, times(len(at)), columnNames(schema))
		}
		bound := boundInput{input: in, at: at[0], name: name}
		if err := bound.bind(schema.Field(at[0])); err != nil {
			return nil, err
		}
		binding.inputs = append(binding.inputs, bound)
	}
	return binding, nil
}

// bind compares a column with the input that it feeds and chooses the source.
func (in *boundInput) bind(field arrow.Field) error {
	switch {
	case in.picture:
		return in.bindPictures(field)
	case in.Encoding == protocol.EncodingRaw:
		return in.bindRaw(field.Type)
	case isVector(field.Type):
		return in.bindVectors()
	}
	return in.bindLists(field)
}

func (in *boundInput) bindRaw(column arrow.DataType) error {
	source := &raw{dtype: in.spec.DType, inner: in.spec.Shape[1:]}
	switch t := column.(type) {
	case *arrow.BinaryType, *arrow.LargeBinaryType, *arrow.BinaryViewType:
	case *arrow.FixedSizeBinaryType:
		if t.ByteWidth != source.size() || t.ByteWidth == 0 {
			return fault.New(fault.BadRequest, "input %s wants raw cells of %d bytes; column %q is %s",
				describe(in.spec), source.size(), in.name, typeText(column))
		}
	default:
		return fault.New(fault.BadRequest, "input %s has the encoding raw and wants a binary column; column %q is %s",
			describe(in.spec), in.name, typeText(column))
	}
	in.source = source
	return nil
}

func (in *boundInput) bindVectors() error {
	source := &vectors{dtype: in.spec.DType, want: -1}
	if !in.spec.UnknownRank && len(in.spec.Shape) == 2 {
		source.want = in.spec.Shape[1]
	}
	isFloat := in.spec.DType == savedmodel.Float64 || in.spec.DType == savedmodel.Float32
	switch {
	case !in.spec.UnknownRank && len(in.spec.Shape) != 2, !isFloat:
		return fault.New(fault.BadRequest, "input %s cannot take column %q of Spark vectors, which make float64 or "+
			"float32 of 2 dimensions; send lists", describe(in.spec), in.name)
	case in.Pad != nil || in.Lengths != "":
		return fault.New(fault.BadRequest, "input %s has pad or lengths, but column %q has Spark vectors, which have "+
			"one length; leave them out or send lists", describe(in.spec), in.name)
	}
	in.source = source
	return nil
}

func (in *boundInput) bindLists(field arrow.Field) error {
	column := field.Type
	element, sizes := unnest(column)
	how, ok := convertible(element, in.spec.DType)
	if !ok {
		return in.wrongElement(element, column)
	}
	source := &lists{
		spec: in.spec, leaf: leaf{dtype: in.spec.DType, conversion: how, filling: in.filling},
		pad: in.Pad != nil, counted: in.Lengths != "", maxLength: in.maxLength,
	}
	shape, err := tensorShape(field)
	if err != nil {
		return fault.New(fault.BadRequest, "input %s, column %q of %s: %w", describe(in.spec), in.name,
			typeText(column),
			err)
	}
	if shape != nil {
		source.shape, sizes = shape, append(slices.Clone(shape), sizes[1:]...)
	}
	rank := len(sizes) + 1
	if rank > MaxRank {
		return fault.New(fault.BadRequest, "input %q cannot take column %q of %d dimensions; a tensor has %d at most, "+
			"the rows included", in.spec.Name, in.name, rank, MaxRank)
	}
	allNull := element.ID() == arrow.NULL
	if !in.spec.UnknownRank && rank != len(in.spec.Shape) && !(allNull && rank < len(in.spec.Shape)) {
		return fault.New(fault.BadRequest, "input %s wants %s of list in each row; column %q is %s", describe(in.spec),
			levels(len(in.spec.Shape)-1), in.name, typeText(column))
	}
	if len(sizes) == 0 && source.counted && !allNull {
		return fault.New(fault.BadRequest, "input %s has lengths, but column %q is %s, which has none",
			describe(in.spec), in.name, typeText(column))
	}
	for i, size := range sizes {
		if size < 0 {
			continue // of any length
		}
		want := source.want(i + 1)
		misfits := want >= 0 && (size > want || size < want && (!source.pad || shape != nil))
		if misfits || i == 0 && source.counted && size > in.maxLength {
			return fault.New(fault.BadRequest, "input %s cannot take column %q, which is %s with %d elements at "+
				"dimension %d", describe(in.spec), in.name, typeText(column), size, i+1)
		}
	}
	in.source = source
	return nil
}

// wrongElement is the fault of a column whose elements cannot become the input's.
func (in *boundInput) wrongElement(element, column arrow.DataType) error {
	wanted := fmt.Sprintf("it wants elements of %s", in.spec.DType)
	if in.spec.DType.Size() == 0 && in.spec.DType != savedmodel.String {
		wanted = "no column can feed this dtype"
	} else if isBinary(element) && element == column {
		wanted += `; if the column's cells hold the bytes of a row, map it with "encoding":"raw"`
	}
	return fault.New(fault.BadRequest, "input %s cannot take column %q of %s; %s", describe(in.spec), in.name,
		typeText(column), wanted)
}

func isBinary(t arrow.DataType) bool {
	switch t.ID() {
	case arrow.BINARY, arrow.LARGE_BINARY, arrow.BINARY_VIEW, arrow.FIXED_SIZE_BINARY:
		return true
	}
	return false
}

// The name of Arrow's extension type for tensors of one shape and the keys of a field's metadata that hold an
// extension.
const (
	tensorExtension   = "arrow.fixed_shape_tensor"
	extensionName     = "ARROW:extension:name"
	extensionMetadata = "ARROW:extension:metadata"
)

// tensorShape returns the dimensions of a column of arrow.fixed_shape_tensor, nil of any other.
func tensorShape(field arrow.Field) ([]int64, error) {
	if name, _ := field.Metadata.GetValue(extensionName); name != tensorExtension {
		return nil, nil
	}
	text, _ := field.Metadata.GetValue(extensionMetadata)
	var about struct {
		Shape       []int64 `json:"shape"`
		Permutation []int   `json:"permutation"`
	}
	list, ok := field.Type.(*arrow.FixedSizeListType)
	if !ok || json.Unmarshal([]byte(text), &about) != nil || len(about.Shape) == 0 {
		return nil, fmt.Errorf("the metadata of its %s cannot be read", tensorExtension)
	}
	wrong := fmt.Errorf("its %s has shape %d, but its lists have %d elements", tensorExtension, about.Shape, list.Len())
	size := int64(1)
	for _, d := range about.Shape {
		if d < 1 || d > int64(list.Len()) {
			return nil, wrong
		}
		if size *= d; size > int64(list.Len()) {
			break
		}
	}
	if size != int64(list.Len()) {
		return nil, wrong
	}
	for i, from := range about.Permutation {
		if from != i {
			return nil, fmt.Errorf("its %s has the permutation %d; write the tensors in the order of their dimensions "+
				"and leave it out", tensorExtension, about.Permutation)
		}
	}
	return about.Shape, nil
}

// typeText writes the type of a column, which may be long: it holds the names of all its fields.
func typeText(t arrow.DataType) string {
	const most = 500
	text := t.String()
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}

// describe writes specs as people read them: "x" float32 [?,4].
func describe(specs ...savedmodel.Spec) string {
	texts := make([]string, len(specs))
	for i, spec := range specs {
		shape := "of unknown rank"
		if !spec.UnknownRank {
			shape = shapeText(spec.Shape)
		}
		texts[i] = fmt.Sprintf("%q %s %s", spec.Name, spec.DType, shape)
	}
	return strings.Join(texts, ", ")
}

// shapeText writes a shape with ? for what is open.
func shapeText(shape []int64) string {
	dims := make([]string, len(shape))
	for i, d := range shape {
		dims[i] = "?"
		if d >= 0 {
			dims[i] = fmt.Sprint(d)
		}
	}
	return "[" + strings.Join(dims, ",") + "]"
}

func columnNames(schema *arrow.Schema) string {
	names := make([]string, len(schema.Fields()))
	for i, field := range schema.Fields() {
		names[i] = fmt.Sprintf("%q", field.Name)
	}
	return strings.Join(names, ", ")
}

func times(n int) string {
	if n == 0 {
		return "not"
	}
	return fmt.Sprintf("%d times", n)
}

func levels(n int) string {
	if n == 1 {
		return "1 level"
	}
	return fmt.Sprintf("%d levels", n)
}
