// Elements: conversions from Arrow types to dtypes, and the tensor made of the elements of an array.

package tensor

import (
	"math"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/savedmodel"
)

// integer holds the element types of whole numbers, number all that Go can convert.
type integer interface {
	~int8 | ~int16 | ~int32 | ~int64 | ~uint8 | ~uint16 | ~uint32 | ~uint64
}

type number interface {
	integer | ~float32 | ~float64
}

// conversion turns the elements of a column into those of a tensor.
type conversion struct {
	convert func(dst, src []byte)   // nil: the bits are the same
	outside func(src []byte) []bool // marks the elements out of range, nil for none; nil: all are in range
}

// conversions holds the implicit conversions by type of the column: the same bits; exact widening; float64 to float32;
// and, with a check of each value, from the types that Spark has in place of unsigned and 16-bit ones. Booleans,
// strings and nulls are not here.
var conversions = map[arrow.Type]map[savedmodel.DType]conversion{
	arrow.INT8: {
		savedmodel.Int8: {}, savedmodel.Int16: widened[int8, int16](), savedmodel.Int32: widened[int8, int32](),
		savedmodel.Int64: widened[int8, int64](),
		savedmodel.Uint8: checked[int8, uint8](), savedmodel.Uint16: checked[int8, uint16](),
		savedmodel.Uint32: checked[int8, uint32](), savedmodel.Uint64: checked[int8, uint64](),
		savedmodel.Float32: widened[int8, float32](), savedmodel.Float64: widened[int8, float64](),
		savedmodel.Float16: {convert: round[int8](toHalf)}, savedmodel.Bfloat16: {convert: round[int8](toBfloat)},
	},
	arrow.INT16: {
		savedmodel.Int16: {}, savedmodel.Int32: widened[int16, int32](), savedmodel.Int64: widened[int16, int64](),
		savedmodel.Uint8: checked[int16, uint8](), savedmodel.Uint16: checked[int16, uint16](),
		savedmodel.Uint32: checked[int16, uint32](), savedmodel.Uint64: checked[int16, uint64](),
		savedmodel.Float32: widened[int16, float32](), savedmodel.Float64: widened[int16, float64](),
	},
	arrow.INT32: {
		savedmodel.Int32: {}, savedmodel.Int64: widened[int32, int64](),
		savedmodel.Uint8: checked[int32, uint8](), savedmodel.Uint16: checked[int32, uint16](),
		savedmodel.Uint32: checked[int32, uint32](), savedmodel.Uint64: checked[int32, uint64](),
		savedmodel.Float64: widened[int32, float64](),
	},
	arrow.INT64: {
		savedmodel.Int64: {},
		savedmodel.Uint8: checked[int64, uint8](), savedmodel.Uint16: checked[int64, uint16](),
		savedmodel.Uint32: checked[int64, uint32](), savedmodel.Uint64: checked[int64, uint64](),
	},
	arrow.UINT8: {
		savedmodel.Uint8: {}, savedmodel.Uint16: widened[uint8, uint16](), savedmodel.Uint32: widened[uint8, uint32](),
		savedmodel.Uint64: widened[uint8, uint64](),
		savedmodel.Int16:  widened[uint8, int16](), savedmodel.Int32: widened[uint8, int32](),
		savedmodel.Int64:   widened[uint8, int64](),
		savedmodel.Float32: widened[uint8, float32](), savedmodel.Float64: widened[uint8, float64](),
		savedmodel.Float16: {convert: round[uint8](toHalf)}, savedmodel.Bfloat16: {convert: round[uint8](toBfloat)},
	},
	arrow.UINT16: {
		savedmodel.Uint8: checked[uint16, uint8](), savedmodel.Uint16: {}, savedmodel.Uint32: widened[uint16, uint32](),
		savedmodel.Uint64: widened[uint16, uint64](),
		savedmodel.Int32:  widened[uint16, int32](), savedmodel.Int64: widened[uint16, int64](),
		savedmodel.Float32: widened[uint16, float32](), savedmodel.Float64: widened[uint16, float64](),
	},
	arrow.UINT32: {
		savedmodel.Uint8: checked[uint32, uint8](), savedmodel.Uint16: checked[uint32, uint16](), savedmodel.Uint32: {},
		savedmodel.Uint64: widened[uint32, uint64](),
		savedmodel.Int64:  widened[uint32, int64](), savedmodel.Float64: widened[uint32, float64](),
	},
	arrow.UINT64: {
		savedmodel.Uint8: checked[uint64, uint8](), savedmodel.Uint16: checked[uint64, uint16](),
		savedmodel.Uint32: checked[uint64, uint32](), savedmodel.Uint64: {},
	},
	arrow.DECIMAL128: { // of scale 0
		savedmodel.Uint8: fromDecimal[uint8](), savedmodel.Uint16: fromDecimal[uint16](),
		savedmodel.Uint32: fromDecimal[uint32](), savedmodel.Uint64: fromDecimal[uint64](),
	},
	arrow.FLOAT16: {
		savedmodel.Float16: {}, savedmodel.Float32: {convert: expand[float32](FromHalf)},
		savedmodel.Float64: {convert: expand[float64](FromHalf)},
	},
	arrow.FLOAT32: {
		savedmodel.Float32: {}, savedmodel.Float64: widened[float32, float64](),
		savedmodel.Float16: rounded(toHalf, infHalf), savedmodel.Bfloat16: rounded(toBfloat, infBfloat),
	},
	arrow.FLOAT64: {savedmodel.Float64: {}, savedmodel.Float32: {convert: cast[float64, float32]}},
}

func widened[S, D number]() conversion { return conversion{convert: cast[S, D]} }

// cast converts the elements of src into dst, which has room for exactly as many. Both must be aligned for their types,
// as Arrow buffers are.
func cast[S, D number](dst, src []byte) {
	from, to := view[S](src), view[D](dst)
	for i, x := range from {
		to[i] = D(x)
	}
}

// checked converts to an unsigned type and marks what is out of its range.
func checked[S, D integer]() conversion {
	return conversion{convert: cast[S, D], outside: func(src []byte) (marks []bool) {
		for i, x := range view[S](src) {
			if x < 0 || S(D(x)) != x {
				marks = marked(marks, i, len(src)/int(unsafe.Sizeof(x)))
			}
		}
		return marks
	}}
}

// marked marks element i of n, and allocates the marks with the first.
func marked(marks []bool, i, n int) []bool {
	if marks == nil {
		marks = make([]bool, n)
	}
	marks[i] = true
	return marks
}

// fromDecimal reads decimals of scale 0, whose low half comes first.
func fromDecimal[D integer]() conversion {
	return conversion{
		convert: func(dst, src []byte) {
			to := view[D](dst)
			for i, x := range view[[2]uint64](src) {
				to[i] = D(x[0])
			}
		},
		outside: marking(func(x [2]uint64) bool { return x[1] != 0 || uint64(D(x[0])) != x[0] }),
	}
}

// expand widens 16-bit floats.
func expand[D float32 | float64](from func(uint16) float32) func(dst, src []byte) {
	return func(dst, src []byte) {
		to := view[D](dst)
		for i, h := range view[uint16](src) {
			to[i] = D(from(h))
		}
	}
}

// rounded narrows to a 16-bit float, inf being its infinity. A finite number that would become infinite is out of
// range.
func rounded(to func(float32) uint16, inf uint16) conversion {
	return conversion{
		convert: round[float32](to),
		outside: marking(func(x float32) bool { return to(x)&0x7fff == inf && !math.IsInf(float64(x), 0) }),
	}
}

// round narrows to 16-bit floats.
func round[S int8 | uint8 | float32](to func(float32) uint16) func(dst, src []byte) {
	return func(dst, src []byte) {
		out := view[uint16](dst)
		for i, x := range view[S](src) {
			out[i] = to(float32(x))
		}
	}
}

// marking marks the elements for which bad holds.
func marking[S any](bad func(S) bool) func(src []byte) []bool {
	return func(src []byte) (marks []bool) {
		for i, x := range view[S](src) {
			if bad(x) {
				marks = marked(marks, i, len(src)/int(unsafe.Sizeof(x)))
			}
		}
		return marks
	}
}

// ranges holds the range of each dtype whose values are checked, as errors name it.
var ranges = map[savedmodel.DType]string{
	savedmodel.Uint8: "0 to 255", savedmodel.Uint16: "0 to 65535", savedmodel.Uint32: "0 to 4294967295",
	savedmodel.Uint64:  "0 to 18446744073709551615",
	savedmodel.Float16: "-65504 to 65504", savedmodel.Bfloat16: "-3.39e38 to 3.39e38",
}

// view reads bytes as elements of T without a copy.
func view[T any](b []byte) []T {
	var zero T
	if len(b) == 0 {
		return nil
	}
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/int(unsafe.Sizeof(zero)))
}

// convertible returns the conversion of elements of an Arrow type, or of a dictionary's values, to dtype; false if
// there is none.
func convertible(t arrow.DataType, dtype savedmodel.DType) (conversion, bool) {
	if dictionary, ok := t.(*arrow.DictionaryType); ok {
		t = dictionary.ValueType
		if t.ID() == arrow.NULL {
			return conversion{}, false
		}
	}
	switch t := t.(type) {
	case *arrow.StringType, *arrow.BinaryType, *arrow.LargeStringType, *arrow.LargeBinaryType, *arrow.StringViewType,
		*arrow.BinaryViewType:
		return conversion{}, dtype == savedmodel.String
	case *arrow.FixedSizeBinaryType:
		return conversion{}, dtype == savedmodel.String && t.ByteWidth > 0
	case *arrow.BooleanType:
		return conversion{}, dtype == savedmodel.Bool
	case *arrow.NullType: // rows of nulls never take part
		return conversion{}, dtype.Size() > 0 || dtype == savedmodel.String
	case *arrow.Decimal128Type:
		if t.Scale != 0 {
			return conversion{}, false
		}
	}
	how, ok := conversions[t.ID()][dtype]
	return how, ok
}

// segment is a range of elements of an array, [lo, hi), with pad elements of filling behind it.
type segment struct{ lo, hi, pad int }

// leaf makes tensors from arrays of elements whose type convertible has approved.
type leaf struct {
	dtype savedmodel.DType
	conversion
	filling []byte // one element of padding
}

// value makes a value of the given shape from segments of an array. It shares the array's buffer if there is a single
// segment of the same bits; TensorFlow copies if that memory is not 64-byte aligned.
func (l *leaf) value(a arrow.Array, segments []segment, shape []int64, mem memory.Allocator) (Value, error) {
	if l.dtype == savedmodel.String {
		return l.strings(a, segments, shape)
	}
	if l.convert == nil && len(segments) == 1 && segments[0].pad == 0 && plain(a) {
		buffer := a.Data().Buffers()[1]
		buffer.Retain()
		return Value{DType: l.dtype, Shape: shape, Data: bytesOf(a, segments[0].lo, segments[0].hi), buffer: buffer},
			nil
	}
	value := Allocate(l.dtype, shape, mem)
	rest := value.Data
	for _, p := range segments {
		n := (p.hi - p.lo) * l.dtype.Size()
		switch {
		case n == 0:
		case l.convert == nil:
			pack(rest[:n], a, p.lo, p.hi)
		case plain(a):
			l.convert(rest[:n], bytesOf(a, p.lo, p.hi))
		default:
			l.convert(rest[:n], packed(a, p.lo, p.hi))
		}
		rest = rest[n:]
		n = p.pad * l.dtype.Size()
		fill(rest[:n], l.filling)
		rest = rest[n:]
	}
	return value, nil
}

// outsiders marks the elements of an array that are out of the dtype's range; nil for none.
func (l *leaf) outsiders(a arrow.Array) []bool {
	switch {
	case l.outside == nil || a.Len() == 0 || a.DataType().ID() == arrow.NULL:
		return nil
	case plain(a):
		return l.outside(bytesOf(a, 0, a.Len()))
	}
	return l.outside(packed(a, 0, a.Len()))
}

// strings makes a string tensor that views the array's memory and holds a reference to it.
func (l *leaf) strings(a arrow.Array, segments []segment, shape []int64) (Value, error) {
	list := make([][]byte, 0, elements(shape))
	var at func(int) []byte
	if a.Len() > 0 { // an empty array may have no dictionary
		at = bytesAt(a)
	}
	size := 0
	for _, p := range segments {
		for i := p.lo; i < p.hi; i++ {
			s := at(i)
			size += len(s)
			list = append(list, s)
		}
		for range p.pad {
			size += len(l.filling)
			list = append(list, l.filling)
		}
		if size > MaxTensorBytes {
			return Value{}, tooLarge()
		}
	}
	return viewStrings(l.dtype, shape, list, a.Data()), nil
}

// plain reports whether the elements of an array are contiguous in its buffer, byte by byte.
func plain(a arrow.Array) bool {
	switch a.DataType().ID() {
	case arrow.BOOL, arrow.DICTIONARY, arrow.NULL:
		return false
	}
	return a.Data().Buffers()[1] != nil
}

// width returns how many bytes one element of an array has, as pack writes it.
func width(t arrow.DataType) int {
	switch t := t.(type) {
	case *arrow.BooleanType:
		return 1
	case *arrow.DictionaryType:
		return width(t.ValueType)
	}
	return t.(arrow.FixedWidthDataType).Bytes()
}

// bytesOf returns the elements [lo, hi) of a plain array.
func bytesOf(a arrow.Array, lo, hi int) []byte {
	whole, offset, width := a.Data().Buffers()[1].Bytes(), a.Data().Offset(), width(a.DataType())
	return whole[:len(whole):len(whole)][(offset+lo)*width : (offset+hi)*width]
}

// pack writes the elements [lo, hi) of an array contiguously into dst. The bytes of nulls are undefined.
func pack(dst []byte, a arrow.Array, lo, hi int) {
	switch a := a.(type) {
	case *array.Boolean:
		for i := lo; i < hi; i++ {
			dst[i-lo] = 0
			if a.Value(i) {
				dst[i-lo] = 1
			}
		}
	case *array.Dictionary:
		values, width := a.Dictionary(), width(a.DataType())
		for i := lo; i < hi; i++ {
			if !a.IsNull(i) {
				at := a.GetValueIndex(i)
				pack(dst[(i-lo)*width:(i-lo+1)*width], values, at, at+1)
			}
		}
	default:
		copy(dst, bytesOf(a, lo, hi))
	}
}

// packed returns the elements [lo, hi) of an array, contiguously.
func packed(a arrow.Array, lo, hi int) []byte {
	if plain(a) {
		return bytesOf(a, lo, hi)
	}
	dst := make([]byte, (hi-lo)*width(a.DataType()))
	if hi > lo {
		pack(dst, a, lo, hi)
	}
	return dst
}

// fill fills dst with copies of element.
func fill(dst, element []byte) {
	for n := copy(dst, element); n < len(dst); n *= 2 {
		copy(dst[n:], dst[:n])
	}
}

// bytesAt returns a reader of single string or binary elements, which view the array's memory. It is nil for an array
// of nulls, of which no element is read.
func bytesAt(a arrow.Array) func(int) []byte {
	text := func(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
	switch a := a.(type) {
	case *array.String:
		return func(i int) []byte { return text(a.Value(i)) }
	case *array.LargeString:
		return func(i int) []byte { return text(a.Value(i)) }
	case *array.StringView:
		return func(i int) []byte { return text(a.Value(i)) }
	case interface{ Value(int) []byte }: // binary, large, fixed-size and view
		return a.Value
	case *array.Dictionary:
		at := bytesAt(a.Dictionary())
		return func(i int) []byte { return at(a.GetValueIndex(i)) }
	}
	return nil
}

// viewStrings returns a string tensor whose elements view data; it holds a reference to data until Release.
func viewStrings(dtype savedmodel.DType, shape []int64, strings [][]byte, data arrow.ArrayData) Value {
	data.Retain()
	return Value{DType: dtype, Shape: shape, Strings: strings, held: []arrow.ArrayData{data}}
}
