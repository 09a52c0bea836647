// Tensors: memory that is lent to TensorFlow or owned by it, and when it is released.

package tensorflow

// #include "door.h"
import "C"

import (
	"math"
	"math/bits"
	"runtime/cgo"
	"slices"
	"unsafe"

	"flightsvc/internal/savedmodel"
)

// maxRank is the most dimensions that TensorFlow's TensorShape can hold.
const maxRank = 254

// Tensor is a dense n-dimensional array, row-major. It owns one reference to its buffer until Close. Several goroutines
// may read it and feed it to sessions at once; Close must come after all of them, and after the last use of what Bytes
// and String returned.
type Tensor struct {
	c     *C.TF_Tensor // nil once closed
	dtype savedmodel.DType
	shape []int64
}

// NewTensor makes a tensor of elements of fixed size over data, whose length must be exactly that of the shape. data
// must lie off the Go heap, in C memory or a mapping, because TensorFlow keeps the pointer after the call, and must not
// change until release. It is not copied if 64-byte aligned; else TensorFlow may copy it, and then release is called
// before NewTensor returns.
//
// release, which may be nil, is called exactly once, also if NewTensor fails: as soon as TensorFlow no longer needs
// data, which may be after Close if an output shares the buffer. It runs on any thread and must neither block nor
// panic.
func NewTensor(dt savedmodel.DType, shape []int64, data []byte, release func()) (*Tensor, error) {
	if release == nil {
		release = func() {}
	}
	size, err := byteSize(dt, shape)
	if err == nil && size != len(data) {
		err = errorf(InvalidArgument, "a %v tensor of shape %v has %d bytes, %d were given", dt, shape, size, len(data))
	}
	if err != nil {
		release()
		return nil, err
	}
	live.Add(1) // the buffer; doorReturned takes it off
	c := C.door_lend(C.TF_DataType(dt), dims(shape), C.int(len(shape)),
		unsafe.Pointer(unsafe.SliceData(data)), C.size_t(size), C.uintptr_t(cgo.NewHandle(release)))
	if c == nil {
		return nil, errorf(Internal, "cannot make a %v tensor of shape %v", dt, shape)
	}
	return own(c, dt, shape), nil
}

// Allocate makes a tensor of elements of fixed size in memory that TensorFlow owns, 64-byte aligned. Its content is
// undefined until the caller fills Bytes.
func Allocate(dt savedmodel.DType, shape []int64) (*Tensor, error) {
	size, err := byteSize(dt, shape)
	if err != nil {
		return nil, err
	}
	c := C.TF_AllocateTensor(C.TF_DataType(dt), dims(shape), C.int(len(shape)), C.size_t(size))
	if c == nil || size > 0 && C.TF_TensorData(c) == nil {
		if c != nil {
			C.TF_DeleteTensor(c)
		}
		return nil, errorf(ResourceExhausted, "no memory for a %v tensor of shape %v (%d bytes)", dt, shape, size)
	}
	return own(c, dt, shape), nil
}

// NewStrings makes a tensor of n strings, the number of elements of shape; at returns the bytes of element i in
// row-major order and is called once for each. The bytes are copied, because operations such as Gather copy a string
// element without its owner, so a view could outlive its memory. TensorFlow frees the elements one by one.
func NewStrings(shape []int64, n int, at func(i int) []byte) (*Tensor, error) {
	count, err := elements(shape)
	if err != nil {
		return nil, err
	}
	if count != n {
		return nil, errorf(InvalidArgument, "a string tensor of shape %v has %d elements, %d were given",
			shape, count, n)
	}
	// A zeroed element is an empty string. n = 0 allocates one, too, because calloc may return NULL for none.
	array := (*C.TF_TString)(C.calloc(C.size_t(max(n, 1)), C.sizeof_TF_TString))
	if array == nil {
		return nil, errorf(ResourceExhausted, "no memory for a string tensor of shape %v", shape)
	}
	strings := unsafe.Slice(array, n)
	for i := range strings {
		if b := at(i); len(b) > 0 {
			C.TF_StringCopy(&strings[i], (*C.char)(unsafe.Pointer(unsafe.SliceData(b))), C.size_t(len(b)))
		}
	}
	live.Add(1) // the buffer; doorReturned takes it off
	c := C.door_strings(dims(shape), C.int(len(shape)), array, C.size_t(n))
	if c == nil {
		return nil, errorf(Internal, "cannot make a string tensor of shape %v", shape)
	}
	return own(c, savedmodel.String, shape), nil
}

// own wraps a tensor of which the caller knows type and shape.
func own(c *C.TF_Tensor, dt savedmodel.DType, shape []int64) *Tensor {
	live.Add(1)
	return &Tensor{c: c, dtype: dt, shape: slices.Clone(shape)}
}

// adopt wraps a tensor that TensorFlow made, and reads its type and shape.
func adopt(c *C.TF_Tensor) *Tensor {
	shape := make([]int64, C.TF_NumDims(c))
	for i := range shape {
		shape[i] = int64(C.TF_Dim(c, C.int(i)))
	}
	live.Add(1)
	return &Tensor{c: c, dtype: savedmodel.DType(C.TF_TensorType(c)), shape: shape}
}

// DType returns the element type.
func (t *Tensor) DType() savedmodel.DType { return t.dtype }

// Shape returns the length of each dimension, empty for a scalar. It must not be written to.
func (t *Tensor) Shape() []int64 { return t.shape }

// Len returns the number of elements.
func (t *Tensor) Len() int {
	n, _ := elements(t.shape) // a tensor's shape was checked when it was made
	return n
}

// Bytes returns the elements in the machine's byte order, Len times the element's size. It is a view, valid until
// Close, and nil for a tensor that is empty, closed or of strings. Only the caller of Allocate may write to it, before
// the tensor is fed.
func (t *Tensor) Bytes() []byte {
	if t.c == nil || t.dtype.Size() == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(C.TF_TensorData(t.c)), int(C.TF_TensorByteSize(t.c)))
}

// String returns the bytes of element i, in row-major order, of a string tensor. It is a view, valid until Close. It
// panics if i is out of range, or the tensor is closed or not of strings.
func (t *Tensor) String(i int) []byte {
	if t.c == nil || t.dtype != savedmodel.String || i < 0 || i >= t.Len() {
		panic("tensorflow: no such string element")
	}
	s := C.door_string(t.c, C.size_t(i))
	return unsafe.Slice((*byte)(unsafe.Pointer(s.data)), int(s.len))
}

// Close drops the tensor's reference to its buffer. Calls after the first do nothing.
func (t *Tensor) Close() {
	if t.c == nil {
		return
	}
	C.TF_DeleteTensor(t.c)
	t.c = nil
	live.Add(-1)
}

// doorReturned is called when TensorFlow has released a lent buffer. handle is that of the release function, or 0.
//
//export doorReturned
func doorReturned(handle C.uintptr_t) {
	live.Add(-1)
	if handle != 0 {
		h := cgo.Handle(handle)
		release := h.Value().(func())
		h.Delete()
		release()
	}
}

// elements returns the product of the dimensions, which fits an int.
func elements(shape []int64) (int, error) {
	if len(shape) > maxRank {
		return 0, errorf(InvalidArgument, "a tensor has at most %d dimensions, not %d", maxRank, len(shape))
	}
	n, empty := uint64(1), false
	for _, d := range shape {
		if d < 0 {
			return 0, errorf(InvalidArgument, "shape %v has a negative dimension", shape)
		}
		empty = empty || d == 0
		// Zero dimensions count as 1 here: an overflow of the others would make TensorFlow end the process, too.
		high, low := bits.Mul64(n, uint64(max(d, 1)))
		if high != 0 || low > math.MaxInt64 {
			return 0, errorf(InvalidArgument, "shape %v has too many elements", shape)
		}
		n = low
	}
	if empty {
		return 0, nil
	}
	return int(n), nil
}

// byteSize returns the bytes of a tensor with elements of fixed size.
func byteSize(dt savedmodel.DType, shape []int64) (int, error) {
	if dt.Size() == 0 {
		return 0, errorf(InvalidArgument, "%v elements have no fixed size", dt)
	}
	n, err := elements(shape)
	if err != nil {
		return 0, err
	}
	if high, low := bits.Mul64(uint64(n), uint64(dt.Size())); high != 0 || low > math.MaxInt64 {
		return 0, errorf(InvalidArgument, "a %v tensor of shape %v has too many bytes", dt, shape)
	}
	return n * dt.Size(), nil
}

// dims returns a shape as the C API takes it, without a copy.
func dims(shape []int64) *C.int64_t { return (*C.int64_t)(unsafe.SliceData(shape)) }
