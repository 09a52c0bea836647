package tensor

import (
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/savedmodel"
)

// Value is a dense tensor on the host, row-major. Elements of fixed size lie in Data,
// little endian; elements of a string tensor lie in Strings. An input value owns one
// reference to the Arrow buffer behind Data and gives it back in Release; an output value
// views memory of the runtime that produced it and is valid until its owner frees that.
type Value struct {
	DType   savedmodel.DType
	Shape   []int64
	Data    []byte
	Strings [][]byte

	buffer *memory.Buffer
}

// Allocate returns a value of fixed-size elements with memory from mem, not zeroed. The
// caller fills Data and calls Release.
func Allocate(dtype savedmodel.DType, shape []int64, mem memory.Allocator) Value {
	buffer := memory.NewResizableBuffer(mem)
	buffer.Resize(int(elements(shape)) * dtype.Size())
	return Value{DType: dtype, Shape: shape, Data: buffer.Bytes(), buffer: buffer}
}

// Release gives back the buffer behind Data. It must be called once for each input
// value, when nothing reads Data any more.
func (v *Value) Release() {
	if v.buffer != nil {
		v.buffer.Release()
		v.buffer = nil
	}
}

// Rows returns the first dimension, or -1 for a scalar.
func (v *Value) Rows() int64 {
	if len(v.Shape) == 0 {
		return -1
	}
	return v.Shape[0]
}

// Take returns a value that holds the rows at the given positions, in that order, copied
// into memory from mem. Strings are shared, not copied. The caller releases both values.
func (v *Value) Take(rows []int, mem memory.Allocator) Value {
	shape := append([]int64{int64(len(rows))}, v.Shape[1:]...)
	width := int(elements(v.Shape[1:]))
	if v.DType == savedmodel.String {
		out := Value{DType: v.DType, Shape: shape, Strings: make([][]byte, 0, len(rows)*width)}
		for _, row := range rows {
			out.Strings = append(out.Strings, v.Strings[row*width:(row+1)*width]...)
		}
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
