package tensor

import (
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"

	"flightsvc/internal/fault"
)

// Check looks at the offsets and buffer sizes of the columns that are read, so that nothing which
// a stream says of itself leads outside its memory. It must come before all else. Its fault names
// the column.
func (b *Binding) Check(rec arrow.Record) error {
	for _, in := range b.inputs {
		column := rec.Column(in.column)
		if int64(column.Len()) != rec.NumRows() || !inBounds(column.Data()) {
			return fault.New(fault.BadRequest, "column %q of %s is malformed: its offsets or lengths do not fit its buffers", in.name, column.DataType())
		}
	}
	return nil
}

// inBounds reports whether an array lies within its buffers, at any depth.
func inBounds(data arrow.ArrayData) bool {
	buffers, n := data.Buffers(), int64(data.Offset()+data.Len())
	size := func(i int) int64 {
		if buffers[i] == nil {
			return 0
		}
		return int64(buffers[i].Len())
	}
	if bits := size(0); bits > 0 && 8*bits < n { // none at all means no nulls
		return false
	}
	if data.Len() == 0 {
		n = 0 // such an array may have no buffers
	}
	switch t := data.DataType().(type) {
	case *arrow.FixedSizeListType:
		child := data.Children()[0]
		return n <= int64(child.Len())/int64(max(t.Len(), 1)) && inBounds(child)
	case *arrow.ListType:
		child := data.Children()[0]
		return ascend[int32](data, size(1), int64(child.Len())) && inBounds(child)
	case *arrow.LargeListType:
		child := data.Children()[0]
		return ascend[int64](data, size(1), int64(child.Len())) && inBounds(child)
	case *arrow.StringType, *arrow.BinaryType:
		return ascend[int32](data, size(1), size(2))
	case *arrow.LargeStringType, *arrow.LargeBinaryType:
		return ascend[int64](data, size(1), size(2))
	case *arrow.BooleanType:
		return 8*size(1) >= n
	case arrow.FixedWidthDataType:
		return n <= size(1)/int64(t.Bytes())
	}
	return false // Bind lets no other type through
}

// ascend reports whether the offsets of an array, in a buffer of size bytes, never fall and
// stay within limit.
func ascend[T int32 | int64](data arrow.ArrayData, size, limit int64) bool {
	if data.Len() == 0 {
		return true
	}
	var one T
	if int64(data.Offset()+data.Len()) >= size/int64(unsafe.Sizeof(one)) {
		return false
	}
	offsets := view[T](data.Buffers()[1].Bytes())[data.Offset() : data.Offset()+data.Len()+1]
	last := T(0)
	for _, offset := range offsets {
		if offset < last {
			return false
		}
		last = offset
	}
	return int64(last) <= limit
}
