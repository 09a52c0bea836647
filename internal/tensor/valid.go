// Validation: offsets, indices and buffer sizes of the columns are checked before anything follows them.

package tensor

import (
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/bitutil"

	"flightsvc/internal/fault"
)

// Check validates the offsets, indices and buffer sizes of the columns that are read, so that none leads outside its
// memory or makes much work of few bytes. It comes before any other use of rec. Its fault names the column.
func (b *Binding) Check(rec arrow.Record) error {
	for i := range b.inputs {
		in := &b.inputs[i]
		column := rec.Column(in.at)
		if int64(column.Len()) != rec.NumRows() || !inBounds(column.Data()) {
			return fault.New(fault.BadRequest,
				"column %q of %s is malformed: its offsets or lengths do not fit its buffers", in.name,
				typeText(column.DataType()))
		}
	}
	return nil
}

// Bounds of what a few bytes can stand for.
const (
	maxNulls    = 1 << 24 // of an array<void>, whose entries take no bytes
	maxViewable = 1 << 27 // elements that the views of one list view array have together, which may overlap
)

// inBounds reports whether an array lies within its buffers, at any depth.
func inBounds(data arrow.ArrayData) bool {
	buffers, n := data.Buffers(), int64(data.Offset()+data.Len())
	size := func(i int) int64 {
		if i >= len(buffers) || buffers[i] == nil {
			return 0
		}
		return int64(buffers[i].Len())
	}
	if data.Len() < 0 || n < 0 {
		return false
	}
	switch bits := size(0); {
	case bits > 0 && n > 8*bits:
		return false
	case bits == 0 && data.NullN() != 0 && data.DataType().ID() != arrow.NULL: // nulls without a validity bitmap
		return false
	}
	if data.Len() == 0 {
		n = 0 // an empty array may have no buffers
	}
	child := func(i int) arrow.ArrayData { return data.Children()[i] }
	switch t := data.DataType().(type) {
	case *arrow.NullType:
		return n <= maxNulls
	case *arrow.FixedSizeListType:
		return n <= int64(child(0).Len())/int64(max(t.Len(), 1)) && inBounds(child(0))
	case *arrow.ListType:
		return ascend[int32](data, size(1), int64(child(0).Len())) && inBounds(child(0))
	case *arrow.LargeListType:
		return ascend[int64](data, size(1), int64(child(0).Len())) && inBounds(child(0))
	case *arrow.ListViewType:
		return viewable[int32](data, size(1), size(2)) && inBounds(child(0))
	case *arrow.LargeListViewType:
		return viewable[int64](data, size(1), size(2)) && inBounds(child(0))
	case *arrow.StructType:
		for _, field := range data.Children() {
			if n > int64(field.Len()) || !inBounds(field) {
				return false
			}
		}
		return len(data.Children()) == len(t.Fields())
	case *arrow.StringType, *arrow.BinaryType:
		return ascend[int32](data, size(1), size(2))
	case *arrow.LargeStringType, *arrow.LargeBinaryType:
		return ascend[int64](data, size(1), size(2))
	case *arrow.StringViewType, *arrow.BinaryViewType:
		return n <= size(1)/int64(arrow.ViewHeaderSizeBytes) && readable(data)
	case *arrow.DictionaryType:
		return n <= size(1)/int64(t.IndexType.(arrow.FixedWidthDataType).Bytes()) && indexed(data, t.IndexType)
	case *arrow.BooleanType:
		return n <= 8*size(1)
	case arrow.FixedWidthDataType:
		return t.Bytes() > 0 && n <= size(1)/int64(t.Bytes())
	}
	return false // Bind admits no other type
}

// present returns a function that reports whether an element of data is not null.
func present(data arrow.ArrayData) func(i int) bool {
	bits := data.Buffers()[0]
	if bits == nil || bits.Len() == 0 {
		return func(int) bool { return true }
	}
	return func(i int) bool { return bitutil.BitIsSet(bits.Bytes(), data.Offset()+i) }
}

// ascend reports whether the offsets of an array, in a buffer of size bytes, ascend from 0 or more to limit at most.
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

// viewable reports whether the views of a list view array, in buffers of the given sizes, lie within its elements and
// have at most maxViewable together. Null views are not looked at.
func viewable[T int32 | int64](data arrow.ArrayData, offsetBytes, sizeBytes int64) bool {
	if data.Len() == 0 {
		return true
	}
	var one T
	width, end := int64(unsafe.Sizeof(one)), int64(data.Offset()+data.Len())
	if end > offsetBytes/width || end > sizeBytes/width {
		return false
	}
	offsets := view[T](data.Buffers()[1].Bytes())[data.Offset():end]
	sizes := view[T](data.Buffers()[2].Bytes())[data.Offset():end]
	limit, total, present := int64(data.Children()[0].Len()), int64(0), present(data)
	for i, size := range sizes {
		if size == 0 || !present(i) {
			continue
		}
		if offset := int64(offsets[i]); size < 0 || offset < 0 || int64(size) > limit || offset > limit-int64(size) {
			return false
		}
		if total += int64(size); total > maxViewable {
			return false
		}
	}
	return true
}

// readable reports whether the elements of a view array that are not inline lie in its buffers; the headers are within
// bounds. Null elements are not looked at.
func readable(data arrow.ArrayData) bool {
	if data.Len() == 0 {
		return true
	}
	present, buffers := present(data), data.Buffers()[2:]
	headers := view[arrow.ViewHeader](data.Buffers()[1].Bytes())[data.Offset() : data.Offset()+data.Len()]
	for i := range headers {
		h := &headers[i]
		if !present(i) {
			continue
		}
		if h.Len() < 0 {
			return false
		}
		if h.IsInline() {
			continue
		}
		buffer, offset := int(h.BufferIndex()), int64(h.BufferOffset())
		if buffer < 0 || buffer >= len(buffers) || buffers[buffer] == nil || offset < 0 ||
			offset+int64(h.Len()) > int64(buffers[buffer].Len()) {
			return false
		}
	}
	return true
}

// indexed reports whether the dictionary of a dictionary array is valid, and all indices but those of nulls lie in it.
func indexed(data arrow.ArrayData, index arrow.DataType) bool {
	if data.Len() == 0 {
		return true
	}
	dictionary := data.Dictionary()
	if dictionary == nil || !inBounds(dictionary) {
		return false
	}
	bytes, limit := data.Buffers()[1].Bytes(), uint64(dictionary.Len())
	switch index.(arrow.FixedWidthDataType).Bytes() { // read as unsigned, a negative index is too large
	case 1:
		return below(view[uint8](bytes), data, limit)
	case 2:
		return below(view[uint16](bytes), data, limit)
	case 4:
		return below(view[uint32](bytes), data, limit)
	}
	return below(view[uint64](bytes), data, limit)
}

func below[T uint8 | uint16 | uint32 | uint64](indices []T, data arrow.ArrayData, limit uint64) bool {
	present := present(data)
	for i, index := range indices[data.Offset() : data.Offset()+data.Len()] {
		if uint64(index) >= limit && present(i) {
			return false
		}
	}
	return true
}
