package client

import (
	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/util"
)

// sizeOf returns about how many bytes a record batch is on the wire. Unlike Arrow's own count, a slice is as large as its
// rows.
func sizeOf(rec arrow.Record) (size int64) {
	for _, column := range rec.Columns() {
		size += arraySize(column)
	}
	return size
}

func arraySize(arr arrow.Array) int64 {
	n := int64(arr.Len())
	if n == 0 {
		return 0
	}
	const offsetBytes = 4
	size := n / 8 // validity
	switch arr := arr.(type) {
	case array.ExtensionArray:
		return arraySize(arr.Storage())
	case *array.Dictionary:
		return size + arraySize(arr.Indices()) + util.TotalArraySize(arr.Dictionary())
	case *array.Struct:
		for i := range arr.NumField() {
			size += arraySize(arr.Field(i))
		}
		return size
	case array.ListLike:
		first, _ := arr.ValueOffsets(0)
		_, last := arr.ValueOffsets(arr.Len() - 1)
		values := array.NewSlice(arr.ListValues(), first, last)
		defer values.Release()
		return size + n*offsetBytes + arraySize(values)
	case array.BinaryLike:
		return size + n*offsetBytes + int64(len(arr.ValueBytes()))
	}
	if fixed, ok := arr.DataType().(arrow.FixedWidthDataType); ok {
		return size + n*int64(fixed.BitWidth())/8
	}
	return util.TotalArraySize(arr)
}
