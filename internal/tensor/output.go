// Outputs: output tensors become the columns of an answer, in record batches of bounded size.

package tensor

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/bitutil"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// MaxAnswerBytes is the size above which an answer comes in several parts, each a record batch; MaxRowBytes is the size
// above which a single row of it is a fault.
const (
	MaxAnswerBytes = 64 << 20
	MaxRowBytes    = 256 << 20
)

// output is an output of the signature that becomes a column.
type output struct {
	spec   savedmodel.Spec // with the shape that the mapping gives
	shaped bool            // the mapping has a shape for it
	column string
	text   bool                  // elements must be UTF-8
	flat   bool                  // each row is one fixed-size list with all its elements
	leaf   arrow.DataType        // type of the elements in the column
	widen  func(dst, src []byte) // nil: same bits
}

// leafOut turns the elements of an output into elements of a column.
type leafOut struct {
	column arrow.DataType
	widen  func(dst, src []byte) // nil: same bits
}

// leafOuts is the layout "list": only types that Spark reads, so unsigned integers and 16-bit floats widen.
var leafOuts = map[savedmodel.DType]leafOut{
	savedmodel.Float16:  {column: arrow.PrimitiveTypes.Float32, widen: expand[float32](FromHalf)},
	savedmodel.Bfloat16: {column: arrow.PrimitiveTypes.Float32, widen: expand[float32](FromBfloat)},
	savedmodel.Float32:  {column: arrow.PrimitiveTypes.Float32},
	savedmodel.Float64:  {column: arrow.PrimitiveTypes.Float64},
	savedmodel.Int8:     {column: arrow.PrimitiveTypes.Int8},
	savedmodel.Int16:    {column: arrow.PrimitiveTypes.Int16},
	savedmodel.Int32:    {column: arrow.PrimitiveTypes.Int32},
	savedmodel.Int64:    {column: arrow.PrimitiveTypes.Int64},
	savedmodel.Uint8:    {column: arrow.PrimitiveTypes.Int16, widen: cast[uint8, int16]},
	savedmodel.Uint16:   {column: arrow.PrimitiveTypes.Int32, widen: cast[uint16, int32]},
	savedmodel.Uint32:   {column: arrow.PrimitiveTypes.Int64, widen: cast[uint32, int64]},
	savedmodel.Uint64:   {column: &arrow.Decimal128Type{Precision: 20}, widen: toDecimal},
	savedmodel.Bool:     {column: arrow.FixedWidthTypes.Boolean},
	savedmodel.String:   {column: arrow.BinaryTypes.Binary},
}

// tensorLeafOuts is where the layout "tensor" differs: Arrow has all types but bfloat16.
var tensorLeafOuts = map[savedmodel.DType]leafOut{
	savedmodel.Float16: {column: arrow.FixedWidthTypes.Float16},
	savedmodel.Uint8:   {column: arrow.PrimitiveTypes.Uint8},
	savedmodel.Uint16:  {column: arrow.PrimitiveTypes.Uint16},
	savedmodel.Uint32:  {column: arrow.PrimitiveTypes.Uint32},
	savedmodel.Uint64:  {column: arrow.PrimitiveTypes.Uint64},
}

// toDecimal writes decimals of scale 0, whose low half comes first.
func toDecimal(dst, src []byte) {
	to := view[[2]uint64](dst)
	for i, x := range view[uint64](src) {
		to[i] = [2]uint64{x, 0}
	}
}

// planOutput joins an output with its entry in the mapping and returns the field of its column: in the layout "tensor"
// a fixed-size list, else the element type inside one list for each dimension after the first.
func planOutput(spec savedmodel.Spec, entry protocol.Output, tensor bool) (output, arrow.Field, error) {
	refused := func(format string, args ...any) (output, arrow.Field, error) {
		return output{}, arrow.Field{}, fault.New(fault.BadRequest, "output "+format, args...)
	}
	leaf, ok := leafOuts[spec.DType]
	if own, differs := tensorLeafOuts[spec.DType]; tensor && differs {
		leaf = own
	}
	o := output{spec: spec, shaped: entry.Shape != nil, column: entry.Column, leaf: leaf.column, widen: leaf.widen}
	if !ok {
		return refused("%q is %s, which has no column type; cast it in the model or leave it out of outputs", spec.Name,
			spec.DType)
	}
	switch entry.Type {
	case "":
	case protocol.TypeUTF8:
		if spec.DType != savedmodel.String {
			return refused("%s cannot have the type %q, which is for strings", describe(spec), entry.Type)
		}
		o.leaf, o.text = arrow.BinaryTypes.String, true
	default:
		return refused("%q has the type %q; this server knows %q", spec.Name, entry.Type, protocol.TypeUTF8)
	}
	if o.shaped {
		if len(entry.Shape) == 0 || entry.Shape[0] != -1 || slices.Min(entry.Shape) < -1 {
			return refused("%q has the shape %d; want -1 for the rows, then a size or -1 for each dimension", spec.Name,
				entry.Shape)
		}
		shape, ok := merge(spec, entry.Shape)
		if !ok {
			return refused("%s cannot have the shape %s of the mapping", describe(spec), shapeText(entry.Shape))
		}
		o.spec.Shape, o.spec.UnknownRank = shape, false
	}
	if len(o.spec.Shape) > MaxRank {
		return refused("%q has %d dimensions; a tensor has %d at most, the rows included", spec.Name,
			len(o.spec.Shape), MaxRank)
	}
	mapped := func(shape string) string { // the line to write
		return fmt.Sprintf(`"outputs":{%q:{"column":%q,"shape":[%s]}}`, spec.Name, entry.Column, shape)
	}
	switch shape := o.spec.Shape; {
	case o.spec.UnknownRank:
		return refused("%q has an unknown rank, so its column has no type; say its shape, "+
			"for instance %s for one list in each row", spec.Name, mapped("-1,-1"))
	case len(shape) == 0:
		return refused("%q is a single %s, not one per row; its first dimension must be the batch", spec.Name,
			spec.DType)
	case shape[0] >= 0:
		return refused("%s has %d rows whatever the batch has; its first dimension must be the batch", describe(spec),
			shape[0])
	}
	field := arrow.Field{Name: entry.Column, Type: o.leaf, Nullable: true}
	if inner := o.spec.Shape[1:]; tensor && len(inner) > 0 {
		if slices.Contains(inner, -1) {
			known := strings.ReplaceAll(strings.Trim(shapeText(o.spec.Shape), "[]"), "?", "SIZE")
			return refused("%s has open dimensions, which the layout tensor does not take; give their sizes, %s, "+
				"or use the layout list", describe(o.spec), mapped("-1"+strings.TrimPrefix(known, "SIZE")))
		}
		size := int64(1)
		for _, d := range inner {
			if d == 0 || d > math.MaxInt32/size {
				return refused("%s cannot be in the layout tensor, whose rows have from 1 to %d elements; "+
					"use the layout list", describe(o.spec), math.MaxInt32)
			}
			size *= d
		}
		about, err := json.Marshal(map[string]any{"shape": inner})
		if err != nil {
			return output{}, arrow.Field{}, err
		}
		o.flat = true
		field.Type = arrow.FixedSizeListOf(int32(size), o.leaf)
		field.Metadata = arrow.NewMetadata([]string{extensionName, extensionMetadata},
			[]string{tensorExtension, string(about)})
	} else {
		for range inner {
			field.Type = arrow.ListOf(field.Type)
		}
	}
	return o, field, nil
}

// merge returns a signature's shape with its open dimensions taken from the mapping's shape; false if the two
// contradict each other.
func merge(spec savedmodel.Spec, given []int64) ([]int64, bool) {
	if spec.UnknownRank {
		return given, true
	}
	if len(spec.Shape) != len(given) {
		return nil, false
	}
	shape := slices.Clone(spec.Shape)
	for i, d := range given {
		if shape[i] < 0 {
			shape[i] = d
		} else if d >= 0 && d != shape[i] {
			return nil, false
		}
	}
	return shape, true
}

// CheckOutputs compares the outputs of a run, in the order of Fetches, with the plan before anything reads them: types,
// dimensions, and one entry for each of the rows that ran.
func (p *Plan) CheckOutputs(outputs []Value, rows int) error {
	if len(outputs) != len(p.outputs) {
		return fault.New(fault.Internal, "%d outputs came back, want %d", len(outputs), len(p.outputs))
	}
	for i := range outputs {
		if err := p.outputs[i].check(&outputs[i], rows); err != nil {
			return err
		}
	}
	return nil
}

// Settle refuses the rows whose outputs cannot be written, because their text is not UTF-8, and returns the outputs of
// the other rows for Records. outputs has passed CheckOutputs and remains the caller's. If no row is refused, settled
// is outputs. Else owned is true: the caller releases each value of settled, before the memory behind outputs is freed,
// which strings still view; settled is empty if no row is left.
func (p *Plan) Settle(outputs []Value, rows *Rows, mem memory.Allocator) (settled []Value, owned bool) {
	var before []int
	refused := false
	for i := range outputs {
		out, value := &p.outputs[i], &outputs[i]
		if !out.text || len(value.Strings) == 0 {
			continue
		}
		if before == nil {
			before = rows.Positions()
		}
		width := len(value.Strings) / len(before)
		for at, row := range before {
			if rows.state[row] == rowKept && slices.ContainsFunc(value.Strings[at*width:(at+1)*width],
				func(s []byte) bool { return !utf8.Valid(s) }) {
				rows.Refuse(row, fmt.Sprintf("output %q is not UTF-8; map it without the type utf8", out.spec.Name))
				refused = true
			}
		}
	}
	if !refused {
		return outputs, false
	}
	if rows.Kept() == 0 {
		return nil, true
	}
	left := remaining(before, rows)
	for i := range outputs {
		settled = append(settled, outputs[i].Take(left, mem))
	}
	return settled, true
}

// Records cuts the answer to one record batch into parts of at most MaxAnswerBytes and passes each to write, in row
// order, with whether it is the last. outputs have only the rows that take part, in the order of Fetches; nil if none
// does. A part views their memory and is released when write returns.
func (p *Plan) Records(outputs []Value, rows *Rows, mem memory.Allocator,
	write func(rec arrow.Record, last bool) error) error {
	if rows.Kept() > 0 {
		if err := p.CheckOutputs(outputs, rows.Kept()); err != nil {
			return err
		}
	}
	kept := 0 // rows of the outputs that are already written
	for lo := 0; ; {
		valid, next, err := p.part(outputs, rows, lo, kept)
		if err != nil {
			return err
		}
		last := lo+len(valid) == rows.Len()
		rec := p.record(outputs, span{kept, next}, valid, rows, lo, mem)
		err = write(rec, last)
		rec.Release()
		if err != nil || last {
			return err
		}
		lo, kept = lo+len(valid), next
	}
}

// part returns, for the rows from lo that fit into one part, at least one if there is any, which of them take part.
// Those are the rows [kept, next) of the outputs.
func (p *Plan) part(outputs []Value, rows *Rows, lo, kept int) (valid []bool, next int, err error) {
	empty := 0
	for i := range p.outputs {
		empty += p.outputs[i].emptySize()
	}
	next = kept
	bytes := 0
	for row := lo; row < rows.Len(); row++ {
		size, takesPart := empty, rows.state[row] == rowKept
		if takesPart {
			size = 0
			for i := range outputs {
				size += p.outputs[i].rowSize(&outputs[i], next)
			}
		}
		if reason, ok := rows.reason(row); ok && p.options.ErrorColumn != "" {
			size += len(reason) + 4
		}
		if size > MaxRowBytes {
			return nil, 0,
				fault.New(fault.Exhausted, "the answer to row %d of a batch has %d MiB, more than the limit of %d MiB",
					row, size>>20, MaxRowBytes>>20)
		}
		if bytes > 0 && bytes+size > MaxAnswerBytes {
			break
		}
		bytes += size
		valid = append(valid, takesPart)
		if takesPart {
			next++
		}
	}
	return valid, next, nil
}

// record makes the part with the rows [lo, lo+len(valid)); the valid ones are the rows kept of the outputs.
func (p *Plan) record(outputs []Value, kept span, valid []bool, rows *Rows, lo int, mem memory.Allocator) arrow.Record {
	columns := make([]arrow.Array, 0, len(p.schema.Fields()))
	for i, out := range p.outputs {
		var value Value
		if kept.lo < kept.hi {
			value = outputs[i]
		} else {
			value, kept = Value{DType: out.spec.DType, Shape: make([]int64, len(out.spec.Shape))}, span{}
		}
		columns = append(columns, out.array(p.schema.Field(i).Type, &value, kept, valid))
	}
	if p.options.ErrorColumn != "" {
		texts := array.NewStringBuilder(mem)
		for i := range valid {
			if reason, ok := rows.reason(lo + i); ok {
				texts.Append(reason)
			} else {
				texts.AppendNull()
			}
		}
		columns = append(columns, texts.NewArray())
		texts.Release()
	}
	rec := array.NewRecord(p.schema, columns, int64(len(valid)))
	for _, column := range columns {
		column.Release()
	}
	return rec
}

// check compares an output with its plan.
func (o *output) check(value *Value, rows int) error {
	agrees := len(value.Shape) == len(o.spec.Shape)
	for i := 1; agrees && i < len(value.Shape); i++ {
		agrees = o.spec.Shape[i] < 0 || o.spec.Shape[i] == value.Shape[i]
	}
	switch {
	case !agrees && o.shaped:
		return fault.New(fault.BadRequest, "output %q came back with the shape %s, but its shape in outputs is %s",
			o.spec.Name, shapeText(value.Shape), shapeText(o.spec.Shape))
	case value.DType != o.spec.DType || !agrees:
		return fault.New(fault.Internal, "output %s came back as %s with %d dimensions, %s", describe(o.spec),
			value.DType, len(value.Shape), shapeText(value.Shape))
	case value.Rows() != int64(rows):
		return fault.New(fault.BadRequest, "output %q has first dimension %d for a batch of %d rows; "+
			"an output must have one entry for each row", o.spec.Name, value.Rows(), rows)
	}
	return nil
}

// rowSize returns how many bytes one row of a value has in an answer.
func (o *output) rowSize(value *Value, row int) int {
	if value.DType != savedmodel.String {
		return (int(elements(value.Shape[1:]))*o.leaf.(arrow.FixedWidthDataType).BitWidth() + 7) / 8
	}
	n, width := 0, int(elements(value.Shape[1:]))
	for _, s := range value.Strings[row*width : (row+1)*width] {
		n += len(s) + 4
	}
	return n
}

// emptySize returns how many bytes a row without an answer has.
func (o *output) emptySize() int {
	switch {
	case !o.flat:
		return 0
	case o.spec.DType == savedmodel.String:
		return int(elements(o.spec.Shape[1:])) * 4
	}
	return (int(elements(o.spec.Shape[1:]))*o.leaf.(arrow.FixedWidthDataType).BitWidth() + 7) / 8
}

// array builds a column of len(valid) rows from the rows kept of an output.
func (o *output) array(dtype arrow.DataType, value *Value, kept span, valid []bool) arrow.Array {
	nulls := len(valid) - (kept.hi - kept.lo)
	switch {
	case o.flat:
		width := int(dtype.(*arrow.FixedSizeListType).Len())
		var child arrow.Array
		if nulls == 0 {
			child = o.dense(o.leaf, value, nil, span{kept.lo * width, kept.hi * width})
		} else {
			child = o.scattered(value, kept.lo, valid, width)
		}
		defer child.Release()
		return fromBuffers(dtype, len(valid), []*memory.Buffer{optional(bitmap(valid, nulls))},
			[]arrow.ArrayData{child.Data()}, nulls)
	case len(value.Shape) > 1:
		// Null rows are empty lists of the outermost level, so the elements need not be moved.
		width := int(value.Shape[1])
		offsets := make([]int32, 1, len(valid)+1)
		for _, ok := range valid {
			step := 0
			if ok {
				step = width
			}
			offsets = append(offsets, offsets[len(offsets)-1]+int32(step))
		}
		child := o.dense(dtype.(*arrow.ListType).Elem(), value, value.Shape[2:], span{kept.lo * width, kept.hi * width})
		return listArray(dtype, offsets, child, bitmap(valid, nulls), nulls)
	case nulls == 0:
		return o.dense(dtype, value, nil, kept)
	}
	return o.scattered(value, kept.lo, valid, 1)
}

// dense builds an array without nulls of the elements [r.lo, r.hi), each with the given inner dimensions. Offsets fit
// int32, because a part has at most MaxAnswerBytes, or one row.
func (o *output) dense(dtype arrow.DataType, value *Value, inner []int64, r span) arrow.Array {
	if len(inner) > 0 {
		width := int(inner[0])
		offsets := make([]int32, r.hi-r.lo+1)
		for i := range offsets {
			offsets[i] = int32(i * width)
		}
		child := o.dense(dtype.(*arrow.ListType).Elem(), value, inner[1:], span{r.lo * width, r.hi * width})
		return listArray(dtype, offsets, child, nil, 0)
	}
	switch o.spec.DType {
	case savedmodel.String:
		return stringArray(dtype, value.Strings[r.lo:r.hi], nil, 0)
	case savedmodel.Bool:
		bits := make([]byte, bitutil.BytesForBits(int64(r.hi-r.lo)))
		for i, b := range value.Data[r.lo:r.hi] {
			bitutil.SetBitTo(bits, i, b != 0)
		}
		return fixedArray(dtype, r.hi-r.lo, nil, bits, 0)
	}
	width := o.spec.DType.Size()
	data := value.Data[r.lo*width : r.hi*width]
	if o.widen != nil {
		wide := make([]byte, (r.hi-r.lo)*dtype.(arrow.FixedWidthDataType).Bytes())
		o.widen(wide, data)
		data = wide
	}
	return fixedArray(dtype, r.hi-r.lo, nil, data, 0)
}

// scattered builds an array of width elements per row. Its valid rows are the rows of value from at; the elements of
// the others are zero, and null unless the column is flat.
func (o *output) scattered(value *Value, at int, valid []bool, width int) arrow.Array {
	count := 0
	for _, ok := range valid {
		if ok {
			count++
		}
	}
	var bits []byte
	nulls := 0
	if !o.flat {
		nulls = len(valid) - count
		bits = bitmap(valid, nulls)
	}
	if o.spec.DType == savedmodel.String {
		texts := value.Strings[at*width : (at+count)*width]
		spread := make([][]byte, len(valid)*width)
		for row, ok := range valid {
			if ok {
				texts = texts[copy(spread[row*width:(row+1)*width], texts):]
			}
		}
		return stringArray(o.leaf, spread, bits, nulls)
	}
	elements := o.dense(o.leaf, value, nil, span{at * width, (at + count) * width})
	defer elements.Release()
	n := len(valid) * width
	if o.spec.DType == savedmodel.Bool {
		spread := make([]byte, bitutil.BytesForBits(int64(n)))
		next := 0
		for row, ok := range valid {
			for i := row * width; ok && i < (row+1)*width; i++ {
				bitutil.SetBitTo(spread, i, elements.(*array.Boolean).Value(next))
				next++
			}
		}
		return fixedArray(o.leaf, n, bits, spread, nulls)
	}
	width *= o.leaf.(arrow.FixedWidthDataType).Bytes()
	source := elements.Data().Buffers()[1].Bytes()
	spread := make([]byte, len(valid)*width)
	for row, ok := range valid {
		if ok {
			copy(spread[row*width:(row+1)*width], source)
			source = source[width:]
		}
	}
	return fixedArray(o.leaf, n, bits, spread, nulls)
}

// stringArray copies elements into an array of binary or utf8.
func stringArray(dtype arrow.DataType, elements [][]byte, validity []byte, nulls int) arrow.Array {
	size := 0
	for _, e := range elements {
		size += len(e)
	}
	data, offsets := make([]byte, 0, size), make([]int32, 1, len(elements)+1)
	for _, e := range elements {
		data = append(data, e...)
		offsets = append(offsets, int32(len(data)))
	}
	buffers := []*memory.Buffer{optional(validity), memory.NewBufferBytes(arrow.Int32Traits.CastToBytes(offsets)),
		memory.NewBufferBytes(data)}
	return fromBuffers(dtype, len(elements), buffers, nil, nulls)
}

// bitmap returns the validity bits of rows, or nil if none is null.
func bitmap(valid []bool, nulls int) []byte {
	if nulls == 0 {
		return nil
	}
	bits := make([]byte, bitutil.BytesForBits(int64(len(valid))))
	for i, ok := range valid {
		bitutil.SetBitTo(bits, i, ok)
	}
	return bits
}

func fixedArray(dtype arrow.DataType, n int, validity, data []byte, nulls int) arrow.Array {
	return fromBuffers(dtype, n, []*memory.Buffer{optional(validity), memory.NewBufferBytes(data)}, nil, nulls)
}

// listArray takes over child.
func listArray(dtype arrow.DataType, offsets []int32, child arrow.Array, validity []byte, nulls int) arrow.Array {
	defer child.Release()
	buffers := []*memory.Buffer{optional(validity), memory.NewBufferBytes(arrow.Int32Traits.CastToBytes(offsets))}
	return fromBuffers(dtype, len(offsets)-1, buffers, []arrow.ArrayData{child.Data()}, nulls)
}

func fromBuffers(dtype arrow.DataType, n int, buffers []*memory.Buffer, children []arrow.ArrayData,
	nulls int) arrow.Array {
	data := array.NewData(dtype, n, buffers, children, nulls, 0)
	defer data.Release()
	return array.MakeFromData(data)
}

func optional(data []byte) *memory.Buffer {
	if data == nil {
		return nil
	}
	return memory.NewBufferBytes(data)
}
