package client

import (
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"
)

// TestArraySize: half of an array is half as large, in any type.
func TestArraySize(t *testing.T) {
	const rows = 1024
	for _, c := range []struct {
		kind arrow.DataType
		text string
		want int64 // bytes of a row, besides its bit of validity
	}{
		{arrow.PrimitiveTypes.Float32, "1.5", 4},
		{arrow.BinaryTypes.String, "abcd", 4 + 4},
		{arrow.BinaryTypes.Binary, "YWJjZA==", 4 + 4},
		{arrow.ListOf(arrow.PrimitiveTypes.Int64), "[1,2,3]", 4 + 3*8},
		{arrow.FixedSizeListOf(3, arrow.PrimitiveTypes.Int64), "[1,2,3]", 4 + 3*8},
		{arrow.StructOf(arrow.Field{Name: "a", Type: arrow.PrimitiveTypes.Int64}), `{"a":1}`, 8},
	} {
		builder := array.NewBuilder(memory.DefaultAllocator, c.kind)
		for range rows {
			if err := builder.AppendValueFromString(c.text); err != nil {
				t.Fatal(err)
			}
		}
		whole := builder.NewArray()
		half := array.NewSlice(whole, rows/2, rows)
		for _, arr := range []arrow.Array{whole, half} {
			got, want := arraySize(arr), c.want*int64(arr.Len())
			if got < want || got > want+want/8 { // and some validity
				t.Errorf("%d rows of %s are %d bytes; want about %d", arr.Len(), c.kind, got, want)
			}
		}
		if empty := array.NewSlice(whole, 0, 0); arraySize(empty) != 0 {
			t.Errorf("no rows of %s are %d bytes", c.kind, arraySize(empty))
		}
	}
}
