package tensor

import (
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/savedmodel"
)

// number is an element type that Go can convert.
type number interface {
	~int8 | ~int16 | ~int32 | ~int64 | ~uint8 | ~uint16 | ~uint32 | ~float32 | ~float64
}

// sameBits maps an Arrow type to the element type with the same bits.
var sameBits = map[arrow.Type]savedmodel.DType{
	arrow.INT8: savedmodel.Int8, arrow.INT16: savedmodel.Int16, arrow.INT32: savedmodel.Int32, arrow.INT64: savedmodel.Int64,
	arrow.UINT8: savedmodel.Uint8, arrow.UINT16: savedmodel.Uint16, arrow.UINT32: savedmodel.Uint32, arrow.UINT64: savedmodel.Uint64,
	arrow.FLOAT16: savedmodel.Float16, arrow.FLOAT32: savedmodel.Float32, arrow.FLOAT64: savedmodel.Float64,
}

// casts holds the conversions that are made without being asked for: exact widening, and
// float64 to float32. Each appends src's elements, given as bytes, to dst.
var casts = map[arrow.Type]map[savedmodel.DType]func(dst, src []byte){
	arrow.INT8: {
		savedmodel.Int16: cast[int8, int16], savedmodel.Int32: cast[int8, int32], savedmodel.Int64: cast[int8, int64],
		savedmodel.Float32: cast[int8, float32], savedmodel.Float64: cast[int8, float64],
	},
	arrow.INT16: {
		savedmodel.Int32: cast[int16, int32], savedmodel.Int64: cast[int16, int64],
		savedmodel.Float32: cast[int16, float32], savedmodel.Float64: cast[int16, float64],
	},
	arrow.INT32: {savedmodel.Int64: cast[int32, int64], savedmodel.Float64: cast[int32, float64]},
	arrow.UINT8: {
		savedmodel.Int16: cast[uint8, int16], savedmodel.Int32: cast[uint8, int32], savedmodel.Int64: cast[uint8, int64],
		savedmodel.Float32: cast[uint8, float32], savedmodel.Float64: cast[uint8, float64],
	},
	arrow.UINT16: {
		savedmodel.Int32: cast[uint16, int32], savedmodel.Int64: cast[uint16, int64],
		savedmodel.Float32: cast[uint16, float32], savedmodel.Float64: cast[uint16, float64],
	},
	arrow.UINT32:  {savedmodel.Int64: cast[uint32, int64], savedmodel.Float64: cast[uint32, float64]},
	arrow.FLOAT32: {savedmodel.Float64: cast[float32, float64]},
	arrow.FLOAT64: {savedmodel.Float32: cast[float64, float32]},
}

// cast converts the elements of src into dst, which has room for exactly as many. Both
// must be aligned for their types, which Arrow buffers are.
func cast[S, D number](dst, src []byte) {
	from, to := view[S](src), view[D](dst)
	for i, x := range from {
		to[i] = D(x)
	}
}

// view reads bytes as elements of T without a copy.
func view[T any](b []byte) []T {
	var zero T
	if len(b) == 0 {
		return nil
	}
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/int(unsafe.Sizeof(zero)))
}

// accepts reports whether elements of an Arrow leaf type can feed a tensor of dtype.
func accepts(leaf arrow.DataType, dtype savedmodel.DType) bool {
	switch leaf.ID() {
	case arrow.STRING, arrow.BINARY, arrow.LARGE_STRING, arrow.LARGE_BINARY:
		return dtype == savedmodel.String
	case arrow.BOOL:
		return dtype == savedmodel.Bool
	}
	if sameBits[leaf.ID()] == dtype {
		return true
	}
	_, ok := casts[leaf.ID()][dtype]
	return ok
}

// leafValue makes a value of the given shape from ranges of a leaf array whose type
// accepts has approved. It shares the array's buffer when one range is all that is needed
// and no cast is; TensorFlow itself copies if that memory is not 64-byte aligned.
func leafValue(leaf arrow.Array, ranges []span, dtype savedmodel.DType, shape []int64, mem memory.Allocator) Value {
	switch typed := leaf.(type) {
	case *array.Boolean:
		value := Allocate(dtype, shape, mem)
		at := 0
		for _, r := range ranges {
			for i := r.lo; i < r.hi; i++ {
				value.Data[at] = 0
				if typed.Value(i) {
					value.Data[at] = 1
				}
				at++
			}
		}
		return value
	case *array.String, *array.LargeString, *array.Binary, *array.LargeBinary:
		value := Value{DType: dtype, Shape: shape, Strings: make([][]byte, 0, elements(shape))}
		at := bytesAt(leaf)
		for _, r := range ranges {
			for i := r.lo; i < r.hi; i++ {
				value.Strings = append(value.Strings, at(i))
			}
		}
		return value
	}

	width := leaf.DataType().(arrow.FixedWidthDataType).Bytes()
	buffer, offset := leaf.Data().Buffers()[1], leaf.Data().Offset()
	bytesOf := func(r span) []byte {
		whole := buffer.Bytes()
		return whole[:len(whole):len(whole)][(offset+r.lo)*width : (offset+r.hi)*width] // never the padding behind
	}

	convert, isCast := casts[leaf.DataType().ID()][dtype]
	if !isCast && len(ranges) == 1 && buffer != nil {
		buffer.Retain()
		return Value{DType: dtype, Shape: shape, Data: bytesOf(ranges[0]), buffer: buffer}
	}
	value := Allocate(dtype, shape, mem)
	rest := value.Data
	for _, r := range ranges {
		n := (r.hi - r.lo) * dtype.Size()
		switch {
		case n == 0:
		case isCast:
			convert(rest[:n], bytesOf(r))
		default:
			copy(rest, bytesOf(r))
		}
		rest = rest[n:]
	}
	return value
}

// bytesAt returns a reader of one string or binary element, viewed in the array's memory.
func bytesAt(leaf arrow.Array) func(int) []byte {
	view := func(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
	switch typed := leaf.(type) {
	case *array.String:
		return func(i int) []byte { return view(typed.Value(i)) }
	case *array.LargeString:
		return func(i int) []byte { return view(typed.Value(i)) }
	case *array.Binary:
		return typed.Value
	case *array.LargeBinary:
		return typed.Value
	}
	return nil
}
