package tensor

import (
	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/bitutil"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// MaxAnswerBytes is the size above which an answer is cut into several record batches, and
// MaxRowBytes the size above which a single row is refused.
const (
	MaxAnswerBytes = 64 << 20
	MaxRowBytes    = 256 << 20
)

// leafOut says how the elements of an output become elements of a column.
type leafOut struct {
	column arrow.DataType
	widen  func(dst, src []byte) // nil: same bits
}

// leafOuts is the layout "list": only types that Spark reads, so small unsigned integers widen.
var leafOuts = map[savedmodel.DType]leafOut{
	savedmodel.Float32: {column: arrow.PrimitiveTypes.Float32},
	savedmodel.Float64: {column: arrow.PrimitiveTypes.Float64},
	savedmodel.Int8:    {column: arrow.PrimitiveTypes.Int8},
	savedmodel.Int16:   {column: arrow.PrimitiveTypes.Int16},
	savedmodel.Int32:   {column: arrow.PrimitiveTypes.Int32},
	savedmodel.Int64:   {column: arrow.PrimitiveTypes.Int64},
	savedmodel.Uint8:   {column: arrow.PrimitiveTypes.Int16, widen: cast[uint8, int16]},
	savedmodel.Uint16:  {column: arrow.PrimitiveTypes.Int32, widen: cast[uint16, int32]},
	savedmodel.Uint32:  {column: arrow.PrimitiveTypes.Int64, widen: cast[uint32, int64]},
	savedmodel.Bool:    {column: arrow.FixedWidthTypes.Boolean},
	savedmodel.String:  {column: arrow.BinaryTypes.Binary},
}

// outputType returns how an output's elements are written and the type of its column: the
// leaf inside one list for each dimension after the first.
func outputType(spec savedmodel.Spec) (leafOut, arrow.DataType, error) {
	leaf, ok := leafOuts[spec.DType]
	switch {
	case !ok:
		return leaf, nil, fault.New(fault.BadRequest, "output %q is %s, which has no column type; cast it in the model or leave it out of outputs", spec.Name, spec.DType)
	case spec.UnknownRank:
		return leaf, nil, fault.New(fault.BadRequest, "output %q has an unknown rank, so its column has no type; set its shape in the model", spec.Name)
	case len(spec.Shape) == 0:
		return leaf, nil, fault.New(fault.BadRequest, "output %q is a single %s, not one per row; its first dimension must be the batch", spec.Name, spec.DType)
	}
	dtype := leaf.column
	for range spec.Shape[1:] {
		dtype = arrow.ListOf(dtype)
	}
	return leaf, dtype, nil
}

// Records cuts the answer to one input batch into record batches of at most MaxAnswerBytes and
// gives each to write, in row order, with whether it is the last. outputs hold only
// the rows that take part, in the order of Fetches; nil when no row does. A record batch
// views their memory and is released when write returns.
func (p *Plan) Records(outputs []Value, rows *Rows, mem memory.Allocator, write func(rec arrow.Record, last bool) error) error {
	if rows.Kept() > 0 {
		for i := range outputs {
			if err := p.outputs[i].check(&outputs[i], rows.Kept()); err != nil {
				return err
			}
		}
	}
	kept := 0 // rows of the outputs that are already written
	for lo := 0; ; {
		valid, next, err := part(outputs, rows, lo, kept)
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

// part says for the rows from lo on that fit into one record batch, at least one if there is any,
// which of them take part. These are the rows [kept, next) of the outputs.
func part(outputs []Value, rows *Rows, lo, kept int) (valid []bool, next int, err error) {
	next = kept
	bytes := 0
	for row := lo; row < rows.Len(); row++ {
		if rows.state[row] != rowKept {
			valid = append(valid, false)
			continue
		}
		size := 0
		for i := range outputs {
			size += rowSize(&outputs[i], next)
		}
		if size > MaxRowBytes {
			return nil, 0, fault.New(fault.Exhausted, "the answer to row %d of a batch has %d MiB, more than the limit of %d MiB", row, size>>20, MaxRowBytes>>20)
		}
		if bytes += size; bytes > MaxAnswerBytes && next > kept {
			break
		}
		valid = append(valid, true)
		next++
	}
	return valid, next, nil
}

// record makes one record batch of the rows [lo, lo+len(valid)): those that are valid take
// the rows kept of the outputs.
func (p *Plan) record(outputs []Value, kept span, valid []bool, rows *Rows, lo int, mem memory.Allocator) arrow.Record {
	columns := make([]arrow.Array, 0, len(p.schema.Fields()))
	for i, out := range p.outputs {
		var value Value
		if kept.lo < kept.hi {
			value = outputs[i]
		} else {
			value, kept = Value{DType: out.spec.DType, Shape: make([]int64, len(out.spec.Shape))}, span{}
		}
		columns = append(columns, out.array(p.schema.Field(i).Type, &value, kept, valid, mem))
	}
	if p.options.ErrorColumn != "" {
		texts := array.NewStringBuilder(mem)
		for i := range valid {
			if reason, ok := rows.texts[lo+i]; ok {
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

// check compares an output with its plan before anything reads it.
func (o *output) check(value *Value, rows int) error {
	if value.DType != o.spec.DType || len(value.Shape) != len(o.spec.Shape) {
		return fault.New(fault.Internal, "output %s came back as %s with %d dimensions", describe([]savedmodel.Spec{o.spec}), value.DType, len(value.Shape))
	}
	if value.Rows() != int64(rows) {
		return fault.New(fault.BadRequest, "output %q has first dimension %d for a batch of %d rows; an output must have one entry for each row", o.spec.Name, value.Rows(), rows)
	}
	return nil
}

// rowSize returns the bytes that one row of a value takes in an answer.
func rowSize(value *Value, row int) int {
	rows := int(value.Rows())
	if value.DType != savedmodel.String {
		return len(value.Data) / rows
	}
	n, width := 0, len(value.Strings)/rows
	for _, s := range value.Strings[row*width : (row+1)*width] {
		n += len(s) + 4
	}
	return n
}

// array builds a column of len(valid) rows from the rows kept of an output.
func (o *output) array(dtype arrow.DataType, value *Value, kept span, valid []bool, mem memory.Allocator) arrow.Array {
	nulls := len(valid) - (kept.hi - kept.lo)
	if len(value.Shape) > 1 {
		// A list level of its own at the top lets null rows have no elements: nothing is moved.
		width := int(value.Shape[1])
		offsets := make([]int32, 1, len(valid)+1)
		for _, ok := range valid {
			step := 0
			if ok {
				step = width
			}
			offsets = append(offsets, offsets[len(offsets)-1]+int32(step))
		}
		child := o.dense(dtype.(*arrow.ListType).Elem(), value, value.Shape[2:], span{kept.lo * width, kept.hi * width}, mem)
		return listArray(dtype, offsets, child, bitmap(valid, nulls), nulls)
	}
	if nulls == 0 {
		return o.dense(dtype, value, nil, kept, mem)
	}
	return o.scattered(dtype, value, kept.lo, valid, mem)
}

// dense builds an array of the elements [r.lo, r.hi), each of the given inner dimensions, with
// no nulls. The offsets of an answer fit int32: it has at most MaxAnswerBytes, or one row.
func (o *output) dense(dtype arrow.DataType, value *Value, inner []int64, r span, mem memory.Allocator) arrow.Array {
	if len(inner) > 0 {
		width := int(inner[0])
		offsets := make([]int32, r.hi-r.lo+1)
		for i := range offsets {
			offsets[i] = int32(i * width)
		}
		child := o.dense(dtype.(*arrow.ListType).Elem(), value, inner[1:], span{r.lo * width, r.hi * width}, mem)
		return listArray(dtype, offsets, child, nil, 0)
	}
	switch o.spec.DType {
	case savedmodel.String:
		return stringArray(value.Strings[r.lo:r.hi], nil, mem)
	case savedmodel.Bool:
		bits := make([]byte, bitutil.BytesForBits(int64(r.hi-r.lo)))
		for i, b := range value.Data[r.lo:r.hi] {
			bitutil.SetBitTo(bits, i, b != 0)
		}
		return fixedArray(dtype, r.hi-r.lo, nil, bits, 0)
	}
	width := o.spec.DType.Size()
	data := value.Data[r.lo*width : r.hi*width]
	if o.leaf.widen != nil {
		wide := make([]byte, (r.hi-r.lo)*dtype.(arrow.FixedWidthDataType).Bytes())
		o.leaf.widen(wide, data)
		data = wide
	}
	return fixedArray(dtype, r.hi-r.lo, nil, data, 0)
}

// scattered builds a column of one element per row in which the rows that are not valid
// are null; the others come from the elements of value from position at on.
func (o *output) scattered(dtype arrow.DataType, value *Value, at int, valid []bool, mem memory.Allocator) arrow.Array {
	if o.spec.DType == savedmodel.String {
		return stringArray(value.Strings[min(at, len(value.Strings)):], valid, mem)
	}
	count := 0
	for _, ok := range valid {
		if ok {
			count++
		}
	}
	elements := o.dense(dtype, value, nil, span{at, at + count}, mem)
	defer elements.Release()
	bits := bitmap(valid, len(valid)-count)
	if o.spec.DType == savedmodel.Bool {
		spread := make([]byte, bitutil.BytesForBits(int64(len(valid))))
		next := 0
		for row, ok := range valid {
			if ok {
				bitutil.SetBitTo(spread, row, elements.(*array.Boolean).Value(next))
				next++
			}
		}
		return fixedArray(dtype, len(valid), bits, spread, len(valid)-count)
	}
	width := dtype.(arrow.FixedWidthDataType).Bytes()
	source := elements.Data().Buffers()[1].Bytes()
	spread := make([]byte, len(valid)*width)
	for row, ok := range valid {
		if ok {
			copy(spread[row*width:(row+1)*width], source)
			source = source[width:]
		}
	}
	return fixedArray(dtype, len(valid), bits, spread, len(valid)-count)
}

// stringArray copies elements into a binary array; with valid set, only rows that are
// valid take one.
func stringArray(elements [][]byte, valid []bool, mem memory.Allocator) arrow.Array {
	builder := array.NewBinaryBuilder(mem, arrow.BinaryTypes.Binary)
	defer builder.Release()
	if valid == nil {
		builder.Reserve(len(elements))
		for _, e := range elements {
			builder.Append(e)
		}
		return builder.NewArray()
	}
	for _, ok := range valid {
		if !ok {
			builder.AppendNull()
			continue
		}
		builder.Append(elements[0])
		elements = elements[1:]
	}
	return builder.NewArray()
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

func fromBuffers(dtype arrow.DataType, n int, buffers []*memory.Buffer, children []arrow.ArrayData, nulls int) arrow.Array {
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
