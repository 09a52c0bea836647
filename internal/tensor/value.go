// Value: a dense tensor on the host, and who holds the memory behind it.

package tensor

import (
	"slices"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/savedmodel"
)

// Value is a dense tensor on the host, row-major. Elements of fixed size are in Data, little endian; those of a string
// tensor are in Strings. An input value owns one reference to the Arrow memory behind Data or Strings and drops it in
// Release; an output value views memory of the runtime that made it and is valid until that is freed.
type Value struct {
	DType   savedmodel.DType
	Shape   []int64
	Data    []byte
	Strings [][]byte

	buffer *memory.Buffer    // behind Data
	held   []arrow.ArrayData // behind Strings
}

// Allocate returns a value of fixed-size elements in memory from mem that is not zeroed. The caller fills Data and
// calls Release.
func Allocate(dtype savedmodel.DType, shape []int64, mem memory.Allocator) Value {
	buffer := memory.NewResizableBuffer(mem)
	buffer.Resize(int(elements(shape)) * dtype.Size())
	return Value{DType: dtype, Shape: shape, Data: buffer.Bytes(), buffer: buffer}
}

// Release drops the references to the memory behind Data and Strings. It must be called once for each input value, when
// nothing reads it any more.
func (v *Value) Release() {
	if v.buffer != nil {
		v.buffer.Release()
		v.buffer = nil
	}
	for _, data := range v.held {
		data.Release()
	}
	v.held = nil
}

// Rows returns the first dimension, or -1 for a scalar.
func (v *Value) Rows() int64 {
	if len(v.Shape) == 0 {
		return -1
	}
	return v.Shape[0]
}

// Slice returns a value that views the rows [lo, hi) and has references of its own. The caller releases both values.
func (v *Value) Slice(lo, hi int) Value {
	out := Value{DType: v.DType, Shape: append([]int64{int64(hi - lo)}, v.Shape[1:]...), buffer: v.buffer,
		held: slices.Clone(v.held)}
	width := int(elements(v.Shape[1:]))
	if v.DType == savedmodel.String {
		out.Strings = v.Strings[lo*width : hi*width]
	} else {
		width *= v.DType.Size()
		out.Data = v.Data[lo*width : hi*width]
	}
	out.retain()
	return out
}

// retain adds a reference to the memory behind a value.
func (v *Value) retain() {
	if v.buffer != nil {
		v.buffer.Retain()
	}
	for _, data := range v.held {
		data.Retain()
	}
}

// Concat returns a value with the rows of all values, which agree in type and in all dimensions but the first, copied
// into memory from mem. Strings are shared, not copied: memory that they view and to which no value holds a reference
// must outlive the result. The caller releases all values and the result.
func Concat(values []Value, mem memory.Allocator) Value {
	shape := slices.Clone(values[0].Shape)
	shape[0] = 0
	for i := range values {
		shape[0] += values[i].Shape[0]
	}
	if values[0].DType == savedmodel.String {
		out := Value{DType: savedmodel.String, Shape: shape, Strings: make([][]byte, 0, elements(shape))}
		for i := range values {
			out.Strings = append(out.Strings, values[i].Strings...)
			out.held = append(out.held, values[i].held...)
		}
		out.retain()
		return out
	}
	out := Allocate(values[0].DType, shape, mem)
	rest := out.Data
	for i := range values {
		rest = rest[copy(rest, values[i].Data):]
	}
	return out
}

// ByteSize returns the size of the elements in memory.
func (v *Value) ByteSize() int64 {
	n := int64(len(v.Data))
	for _, s := range v.Strings {
		n += int64(len(s))
	}
	return n
}

// Take returns a value with the rows at the given positions, in that order, copied into memory from mem. Strings are
// shared, not copied. The caller releases both values.
func (v *Value) Take(rows []int, mem memory.Allocator) Value {
	shape := append([]int64{int64(len(rows))}, v.Shape[1:]...)
	width := int(elements(v.Shape[1:]))
	if v.DType == savedmodel.String {
		out := Value{DType: v.DType, Shape: shape, Strings: make([][]byte, 0, len(rows)*width),
			held: slices.Clone(v.held)}
		for _, row := range rows {
			out.Strings = append(out.Strings, v.Strings[row*width:(row+1)*width]...)
		}
		out.retain()
		return out
	}
	out := Allocate(v.DType, shape, mem)
	width *= v.DType.Size()
	for i, row := range rows {
		copy(out.Data[i*width:(i+1)*width], v.Data[row*width:])
	}
	return out
}

// elements returns the product of the dimensions, 1 for a scalar.
func elements(shape []int64) int64 {
	n := int64(1)
	for _, d := range shape {
		n *= d
	}
	return n
}
