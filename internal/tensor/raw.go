package tensor

import (
	"fmt"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/savedmodel"
)

// raw is the source of an input whose binary cells hold the bytes of a row, row-major and little endian.
type raw struct {
	dtype savedmodel.DType
	inner []int64 // dimensions after the first
}

// size returns the bytes of one row.
func (r *raw) size() int { return int(elements(r.inner)) * r.dtype.Size() }

func (r *raw) nulls(column arrow.Array) []bool { return nulls(column, 0) }

func (r *raw) screen(column arrow.Array, refuse func(row int, reason string)) {
	at := bytesAt(column)
	for row := range column.Len() {
		if column.IsNull(row) {
			continue
		}
		cell := at(row)
		if len(cell) != r.size() {
			refuse(row, fmt.Sprintf("a raw cell of %d bytes, want %d", len(cell), r.size()))
			continue
		}
		if r.dtype == savedmodel.Bool {
			for _, b := range cell {
				if b > 1 {
					refuse(row, "a raw bool is a byte other than 0 and 1")
					break
				}
			}
		}
	}
}

// value shares the column's memory if the cells are contiguous there.
func (r *raw) value(column arrow.Array, rows []span, mem memory.Allocator) (Value, []int64, error) {
	at, size := bytesAt(column), r.size()
	var cells [][]byte
	contiguous := true
	for _, span := range rows {
		for row := span.lo; row < span.hi; row++ {
			cell := at(row)
			if n := len(cells); n > 0 && size > 0 {
				end := unsafe.Add(unsafe.Pointer(unsafe.SliceData(cells[n-1])), size)
				contiguous = contiguous && unsafe.Pointer(unsafe.SliceData(cell)) == end
			}
			cells = append(cells, cell)
		}
	}
	shape := append([]int64{int64(len(cells))}, r.inner...)
	if !fits(r.dtype, shape) {
		return Value{}, nil, tooLarge()
	}
	if contiguous && size > 0 {
		for _, buffer := range column.Data().Buffers() {
			if whole := within(buffer, unsafe.SliceData(cells[0]), len(cells)*size); whole != nil {
				buffer.Retain()
				return Value{DType: r.dtype, Shape: shape, Data: whole, buffer: buffer}, nil, nil
			}
		}
	}
	value := Allocate(r.dtype, shape, mem)
	for i, cell := range cells {
		copy(value.Data[i*size:], cell)
	}
	return value, nil, nil
}

// within returns the n bytes from start if they lie in the buffer, else nil.
func within(buffer *memory.Buffer, start *byte, n int) []byte {
	if buffer == nil || buffer.Len() == 0 {
		return nil
	}
	whole := buffer.Bytes()
	lo := uintptr(unsafe.Pointer(start)) - uintptr(unsafe.Pointer(unsafe.SliceData(whole)))
	if lo > uintptr(len(whole)) || uintptr(n) > uintptr(len(whole))-lo {
		return nil
	}
	return whole[lo : int(lo)+n : int(lo)+n]
}
