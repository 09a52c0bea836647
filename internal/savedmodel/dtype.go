package savedmodel

import "fmt"

// DType is a TensorFlow element type. Its numbers are those of TensorFlow's
// types.proto, so a DType converts to TF_DataType and back without a table.
type DType int32

// The element types that a request can have, and Resource and Variant. Others (complex, quantised) keep their number,
// which String prints in errors.
const (
	Float32  DType = 1
	Float64  DType = 2
	Int32    DType = 3
	Uint8    DType = 4
	Int16    DType = 5
	Int8     DType = 6
	String   DType = 7
	Int64    DType = 9
	Bool     DType = 10
	Bfloat16 DType = 14
	Uint16   DType = 17
	Float16  DType = 19
	Resource DType = 20
	Variant  DType = 21
	Uint32   DType = 22
	Uint64   DType = 23
)

// dtypes holds the name, as tf.DType.name spells it, and the bytes of one element; 0 means that elements have no fixed
// size.
var dtypes = map[DType]struct {
	name string
	size int
}{
	Float32: {"float32", 4}, Float64: {"float64", 8},
	Int8: {"int8", 1}, Int16: {"int16", 2}, Int32: {"int32", 4}, Int64: {"int64", 8},
	Uint8: {"uint8", 1}, Uint16: {"uint16", 2}, Uint32: {"uint32", 4}, Uint64: {"uint64", 8},
	Float16: {"float16", 2}, Bfloat16: {"bfloat16", 2}, Bool: {"bool", 1},
	String: {"string", 0}, Resource: {"resource", 0}, Variant: {"variant", 0},
}

// String returns the name that tf.DType.name gives, for instance "float32".
func (d DType) String() string {
	if t, ok := dtypes[d]; ok {
		return t.name
	}
	return fmt.Sprintf("dtype(%d)", int32(d))
}

// Size returns the bytes of one element, or 0 where elements have no fixed size.
func (d DType) Size() int { return dtypes[d].size }
