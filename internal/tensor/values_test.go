// Tests of input tensors: columns of all kinds beside the tensors that they become, and each kind of error.

package tensor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/decimal128"
	"github.com/apache/arrow/go/v15/arrow/float16"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// Columns are written as plain Go values: nil is a null, []any a list, and an element is an int64, a uint64, a float64,
// a bool or a string.

// huge is a decimal of more than 64 bits.
type huge struct{}

// dirty is an allocator whose memory is not zeroed, like offheap's.
type dirty struct{ *memory.GoAllocator }

func (d dirty) Allocate(size int) []byte {
	b := d.GoAllocator.Allocate(size)
	for i := range b {
		b[i] = 0xa5
	}
	return b
}

func (d dirty) Reallocate(size int, b []byte) []byte {
	grown := d.Allocate(size)
	copy(grown, b)
	return grown
}

func appendValue(b array.Builder, v any) {
	if v == nil {
		b.AppendNull()
		return
	}
	if list, ok := v.([]any); ok {
		lists := b.(array.ListLikeBuilder)
		if sized, ok := b.(array.VarLenListLikeBuilder); ok {
			sized.AppendWithSize(true, len(list))
		} else {
			lists.Append(true)
		}
		for _, e := range list {
			appendValue(lists.ValueBuilder(), e)
		}
		return
	}
	number, isInt := v.(int64)
	if u, ok := v.(uint64); ok {
		number, isInt = int64(u), true
	}
	switch b := b.(type) {
	case *array.Int8Builder:
		b.Append(int8(number))
	case *array.Int16Builder:
		b.Append(int16(number))
	case *array.Int32Builder:
		b.Append(int32(number))
	case *array.Int64Builder:
		b.Append(number)
	case *array.Uint8Builder:
		b.Append(uint8(number))
	case *array.Uint16Builder:
		b.Append(uint16(number))
	case *array.Uint32Builder:
		b.Append(uint32(number))
	case *array.Uint64Builder:
		b.Append(uint64(number))
	case *array.Decimal128Builder:
		switch v := v.(type) {
		case int64:
			b.Append(decimal128.FromI64(v))
		case uint64:
			b.Append(decimal128.FromU64(v))
		default:
			b.Append(decimal128.New(3, 14))
		}
	case *array.Float16Builder:
		b.Append(float16.New(float32(v.(float64))))
	case *array.Float32Builder:
		b.Append(float32(v.(float64)))
	case *array.Float64Builder:
		b.Append(v.(float64))
	case *array.BooleanBuilder:
		b.Append(v.(bool))
	case *array.StringBuilder:
		b.Append(v.(string))
	case *array.LargeStringBuilder:
		b.Append(v.(string))
	case *array.BinaryBuilder:
		b.Append([]byte(v.(string)))
	case *array.StringViewBuilder:
		b.Append(v.(string))
	case *array.BinaryViewBuilder:
		b.Append([]byte(v.(string)))
	case *array.FixedSizeBinaryBuilder:
		b.Append([]byte(v.(string)))
	default:
		panic(fmt.Sprintf("no way to append to %T, %t", b, isInt))
	}
}

// feedsOf binds a record batch to one input and returns what is fed of it, and the rows that take part.
func feedsOf(t *testing.T, rec arrow.Record, mem memory.Allocator, entry protocol.Input,
	inputs ...savedmodel.Spec) ([]Feed, *Rows, error) {
	t.Helper()
	entry.Tensor, entry.Column = inputs[0].Name, rec.ColumnName(0)
	plan, err := NewPlan(savedmodel.Signature{Inputs: inputs, Outputs: anyInput},
		Options{Inputs: protocol.Inputs{entry}})
	if err != nil {
		t.Fatal(err)
	}
	binding, err := plan.Bind(rec.Schema())
	if err != nil {
		t.Fatal(err)
	}
	if err := binding.Check(rec); err != nil {
		t.Fatal(err)
	}
	rows := NewRows(int(rec.NumRows()))
	binding.Nulls(rec, rows, false)
	feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
	return feeds, rows, err
}

// TestValues has columns of all kinds beside their tensors, whole and as a slice. Random columns are compared with
// TensorFlow in test_property.py.
func TestValues(t *testing.T) {
	p, b := arrow.PrimitiveTypes, arrow.BinaryTypes
	boolean, half := arrow.FixedWidthTypes.Boolean, arrow.FixedWidthTypes.Float16
	decimal := &arrow.Decimal128Type{Precision: 20}
	list := func(of arrow.DataType) arrow.DataType { return arrow.ListOf(of) }
	words, pairs := []any{"", "ß", nil, "longer than a view's twelve bytes"}, []any{[]any{1.0, 2.0}, []any{3.0, 4.0}}
	wordsRead := []string{"", "ß", "longer than a view's twelve bytes"}
	holes := []any{[]any{int64(1), int64(2)}, nil, []any{int64(3), nil}, []any{int64(4), int64(5)}}
	deep := []any{[]any{[]any{1.0}, []any{}}, []any{}, []any{[]any{2.0, 3.0}}}
	pads := map[string]string{"padded": "-1.5", "padded to a known size": "9", "padded text": `"-"`,
		"padded booleans": "true"}
	type dims = []int64
	for name, c := range map[string]struct {
		dtype  savedmodel.DType
		shape  dims // of the input; unknown rank if nil
		column arrow.DataType
		rows   []any
		got    dims // the shape of the tensor
		want   any
	}{
		"int8": {savedmodel.Int8, dims{-1}, p.Int8, []any{int64(-128), nil, int64(127)}, dims{2},
			[]int8{-128, 127}},
		"int64": {savedmodel.Int64, dims{-1}, p.Int64, []any{int64(math.MinInt64), int64(math.MaxInt64)},
			dims{2}, []int64{math.MinInt64, math.MaxInt64}},
		"int8 as int16":  {savedmodel.Int16, dims{-1}, p.Int8, []any{int64(-128)}, dims{1}, []int16{-128}},
		"uint8 as int16": {savedmodel.Int16, dims{-1}, p.Uint8, []any{int64(255)}, dims{1}, []int16{255}},
		"int16 as int32": {savedmodel.Int32, dims{-1}, p.Int16,
			[]any{int64(-1 << 15)}, dims{1}, []int32{-1 << 15}},
		"uint16 as int32": {savedmodel.Int32, dims{-1}, p.Uint16, []any{int64(65535)}, dims{1}, []int32{65535}},
		"int32 as int64": {savedmodel.Int64, dims{-1}, p.Int32,
			[]any{int64(-1 << 31)}, dims{1}, []int64{-1 << 31}},
		"uint32 as int64": {savedmodel.Int64, dims{-1}, p.Uint32, []any{int64(math.MaxUint32)}, dims{1},
			[]int64{math.MaxUint32}},
		"int64 as uint8": {savedmodel.Uint8, dims{-1}, p.Int64,
			[]any{int64(0), int64(255)}, dims{2}, []uint8{0, 255}},
		"int8 as uint16": {savedmodel.Uint16, dims{-1}, p.Int8, []any{int64(127)}, dims{1}, []uint16{127}},
		"uint64 as uint32": {savedmodel.Uint32, dims{-1}, p.Uint64, []any{uint64(math.MaxUint32)}, dims{1},
			[]uint32{math.MaxUint32}},
		"decimal": {savedmodel.Uint64, dims{-1}, decimal, []any{uint64(math.MaxUint64), int64(0)},
			dims{2}, []uint64{math.MaxUint64, 0}},
		"bool": {savedmodel.Bool, dims{-1}, boolean, []any{true, false, nil, true}, dims{3},
			[]bool{true, false, true}},
		"double to the nearest float": {savedmodel.Float32, dims{-1}, p.Float64,
			[]any{1 + 0x1p-24, 1 + 0x1.8p-23, 0x1p-149, math.Inf(-1), math.Copysign(0, -1)}, dims{5},
			[]float32{1, 1 + 0x1p-22, 0x1p-149, float32(math.Inf(-1)), float32(math.Copysign(0, -1))}},
		"int16 as float32": {savedmodel.Float32, dims{-1}, p.Int16,
			[]any{int64(-1 << 15)}, dims{1}, []float32{-1 << 15}},
		"uint32 as float64": {savedmodel.Float64, dims{-1}, p.Uint32,
			[]any{int64(math.MaxUint32)}, dims{1}, []float64{math.MaxUint32}},
		"float32 as float64": {savedmodel.Float64, dims{-1}, p.Float32, []any{math.MaxFloat32, 0x1p-149},
			dims{2}, []float64{math.MaxFloat32, 0x1p-149}},
		"float16 as float64": {savedmodel.Float64, dims{-1}, half, []any{65504.0, -0.5}, dims{2},
			[]float64{65504, -0.5}},
		"float16": {savedmodel.Float16, dims{-1}, half, []any{1.5}, dims{1}, []uint16{0x3e00}},
		"float32 as float16": {savedmodel.Float16, dims{-1}, p.Float32,
			[]any{65519.0, 0x1p-24, 0x1p-25, math.Inf(1)},
			dims{4}, []uint16{0x7bff, 1, 0, 0x7c00}},
		"int8 as float16": {savedmodel.Float16, dims{-1}, p.Int8,
			[]any{int64(-128)}, dims{1}, []uint16{0xd800}},
		"uint8 as bfloat16": {savedmodel.Bfloat16, dims{-1}, p.Uint8,
			[]any{int64(255)}, dims{1}, []uint16{0x437f}},
		"float32 as bfloat16": {savedmodel.Bfloat16, dims{-1}, p.Float32,
			[]any{1 + 0x1p-8, 1 + 0x1.8p-7, math.Inf(1)},
			dims{3}, []uint16{0x3f80, 0x3f82, 0x7f80}},

		"utf8":         {savedmodel.String, dims{-1}, b.String, words, dims{3}, wordsRead},
		"large utf8":   {savedmodel.String, dims{-1}, b.LargeString, words, dims{3}, wordsRead},
		"utf8 views":   {savedmodel.String, dims{-1}, b.StringView, words, dims{3}, wordsRead},
		"binary":       {savedmodel.String, dims{-1}, b.Binary, words, dims{3}, wordsRead},
		"binary views": {savedmodel.String, dims{-1}, b.BinaryView, words, dims{3}, wordsRead},
		"binary of 3": {savedmodel.String, dims{-1}, &arrow.FixedSizeBinaryType{ByteWidth: 3},
			[]any{"abc", nil, "\xff\x00\x01"},
			dims{2}, []string{"abc", "\xff\x00\x01"}},

		"lists": {savedmodel.Float32, dims{-1, 2}, list(p.Float32), pairs,
			dims{2, 2}, []float32{1, 2, 3, 4}},
		"large lists": {savedmodel.Float32, dims{-1, -1}, arrow.LargeListOf(p.Float64), pairs,
			dims{2, 2}, []float32{1, 2, 3, 4}},
		"list views": {savedmodel.Float64, dims{-1, 2}, arrow.ListViewOf(p.Float32), pairs,
			dims{2, 2}, []float64{1, 2, 3, 4}},
		"large list views": {savedmodel.Float32, dims{-1, 2}, arrow.LargeListViewOf(p.Float32), pairs,
			dims{2, 2},
			[]float32{1, 2, 3, 4}},
		"fixed-size lists": {savedmodel.Float32, nil, arrow.FixedSizeListOf(2, p.Float32), pairs,
			dims{2, 2}, []float32{1, 2, 3, 4}},
		"nulls in lists": {savedmodel.Uint8, dims{-1, 2}, list(p.Int32), holes,
			dims{2, 2}, []uint8{1, 2, 4, 5}},
		"nulls in views": {savedmodel.Int64, dims{-1, -1}, arrow.ListViewOf(p.Int64), holes,
			dims{2, 2}, []int64{1, 2, 4, 5}},
		"nulls in fixed": {savedmodel.Int64, dims{-1, 2}, arrow.FixedSizeListOf(2, p.Int8), holes,
			dims{2, 2}, []int64{1, 2, 4, 5}},
		"lists of nothing": {savedmodel.Int32, dims{-1, -1}, list(p.Int32),
			[]any{[]any{}, []any{}}, dims{2, 0}, []int32{}},
		"lists of booleans": {savedmodel.Bool, dims{-1, 2}, list(boolean),
			[]any{[]any{true, false}, []any{false, true}}, dims{2, 2}, []bool{true, false, false, true}},
		"lists of text": {savedmodel.String, nil, arrow.LargeListOf(b.StringView),
			[]any{[]any{"a", ""}, nil, []any{"b", "c"}},
			dims{2, 2}, []string{"a", "", "b", "c"}},
		"lists in lists": {savedmodel.Int32,
			dims{-1, 1, -1, 2}, arrow.ListViewOf(arrow.LargeListOf(arrow.FixedSizeListOf(2, p.Int16))),
			[]any{[]any{[]any{[]any{int64(1), int64(2)}, []any{int64(3), int64(4)}}}}, dims{1, 1, 2, 2},
			[]int32{1, 2, 3, 4}},

		"padded": {savedmodel.Float32, dims{-1, -1, -1}, list(list(p.Float64)), deep, dims{3, 2, 2},
			[]float32{1, -1.5, -1.5, -1.5, -1.5, -1.5, -1.5, -1.5, 2, 3, -1.5, -1.5}},
		"padded to a known size": {savedmodel.Int16, dims{-1, 3}, arrow.ListViewOf(p.Int8),
			[]any{[]any{}, nil, []any{int64(1)}}, dims{2, 3}, []int16{9, 9, 9, 1, 9, 9}},
		"padded text": {savedmodel.String, dims{-1, -1}, list(b.String),
			[]any{[]any{"a"}, []any{"b", "c"}}, dims{2, 2}, []string{"a", "-", "b", "c"}},
		"padded booleans": {savedmodel.Bool, dims{-1, -1}, list(boolean),
			[]any{[]any{false}, []any{}, []any{false, false}}, dims{3, 2},
			[]bool{false, true, true, true, false, false}},
	} {
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		input := savedmodel.Spec{Name: "x", Tensor: "x:0", DType: c.dtype, Shape: c.shape, UnknownRank: c.shape == nil}
		var entry protocol.Input
		if pad, ok := pads[name]; ok {
			entry.Pad = []byte(pad)
		}
		whole := record(t, mem, "c", c.column, c.rows...)
		long := record(t, mem, "c", c.column, slices.Concat(c.rows, c.rows, c.rows[:1])...)
		for _, rec := range []arrow.Record{whole, long.NewSlice(int64(len(c.rows)), int64(2*len(c.rows)))} {
			feeds, rows, err := feedsOf(t, rec, mem, entry, input)
			if err != nil || !holds(feeds[0].Value, c.got, c.want) || rows.Kept() != int(c.got[0]) {
				t.Errorf("%s: %v, want %v of %v (%v)", name, feeds, c.want, c.got, err)
			}
			ReleaseFeeds(feeds)
			rec.Release()
		}
		none := long.NewSlice(1, 1)
		if feeds, rows, err := feedsOf(t, none, mem, entry, input); err != nil || len(feeds) > 0 && rows.Kept() > 0 {
			t.Errorf("%s without rows: %v, %v", name, feeds, err)
		} else {
			ReleaseFeeds(feeds)
		}
		none.Release()
		long.Release()
		mem.AssertSize(t, 0)
	}
}

// holds reports whether a tensor has a shape and elements, which are a slice.
func holds(v Value, shape []int64, elements any) bool {
	if texts, ok := elements.([]string); ok {
		return slices.Equal(v.Shape, shape) &&
			slices.EqualFunc(v.Strings, texts, func(a []byte, b string) bool { return string(a) == b })
	}
	data, err := binary.Append(nil, binary.LittleEndian, elements)
	return err == nil && slices.Equal(v.Shape, shape) && bytes.Equal(v.Data, data)
}

// TestDictionaries has nulls among the indices and among the values, in columns and in lists.
func TestDictionaries(t *testing.T) {
	for _, index := range []arrow.DataType{arrow.PrimitiveTypes.Int8, arrow.PrimitiveTypes.Uint8,
		arrow.PrimitiveTypes.Int16, arrow.PrimitiveTypes.Uint16, arrow.PrimitiveTypes.Int32,
		arrow.PrimitiveTypes.Uint32, arrow.PrimitiveTypes.Int64, arrow.PrimitiveTypes.Uint64} {
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		for _, c := range []struct {
			of     arrow.DataType
			values []any
			dtype  savedmodel.DType
			want   any
		}{
			{arrow.BinaryTypes.String, []any{"a", nil, "unused", "ß"}, savedmodel.String, []string{"ß", "a", "a"}},
			{arrow.BinaryTypes.BinaryView, []any{"a", nil, "unused", "ß"}, savedmodel.String,
				[]string{"ß", "a", "a"}},
			{arrow.PrimitiveTypes.Int16, []any{int64(7), nil, int64(8), int64(9)}, savedmodel.Uint8,
				[]uint8{9, 7, 7}},
			{arrow.FixedWidthTypes.Boolean, []any{false, nil, true, true}, savedmodel.Bool,
				[]bool{true, false, false}},
		} {
			values := record(t, mem, "v", c.of, c.values...)
			indices := record(t, mem, "i", index, int64(3), nil, int64(0), int64(1), int64(0))
			kind := &arrow.DictionaryType{IndexType: index, ValueType: c.of}
			coded := array.NewDictionaryArray(kind, indices.Column(0), values.Column(0))
			rec := one("c", coded)
			feeds, _, err := feedsOf(t, rec, mem, protocol.Input{}, spec("x", c.dtype, -1))
			if err != nil || !holds(feeds[0].Value, []int64{3}, c.want) {
				t.Errorf("%s by %s: %v, %v", c.of, index, feeds, err)
			}
			ReleaseFeeds(feeds)
			ends := memory.NewBufferBytes(arrow.Int32Traits.CastToBytes([]int32{2, 3, 5}))
			data := array.NewData(arrow.ListOf(kind), 2, []*memory.Buffer{nil, ends},
				[]arrow.ArrayData{rec.Column(0).Data()}, 0, 0)
			lists := one("c", array.MakeFromData(data))
			feeds, rows, err := feedsOf(t, lists, mem, protocol.Input{}, spec("x", c.dtype, -1, -1))
			if err != nil || !slices.Equal(rows.Positions(), []int{0}) ||
				!slices.Equal(feeds[0].Value.Shape, []int64{1, 1}) {
				t.Errorf("lists of %s by %s: rows %v, %v, %v", c.of, index, rows.Positions(), feeds, err)
			}
			ReleaseFeeds(feeds)
			data.Release()
			for _, r := range []arrow.Record{lists, rec, indices, values} {
				r.Release()
			}
		}
		mem.AssertSize(t, 0)
	}
}

// TestNullsMayBeRefused has a row with a null, which takes no part, with and without a reason.
func TestNullsMayBeRefused(t *testing.T) {
	rec := record(t, memory.DefaultAllocator, "c", arrow.PrimitiveTypes.Int64, int64(1), nil)
	defer rec.Release()
	binding := bindOne(t, spec("x", savedmodel.Int64, -1), protocol.Input{}, rec.Schema().Field(0))
	for refuse, want := range map[bool]rowState{false: rowNull, true: rowRefused} {
		rows := NewRows(2)
		binding.Nulls(rec, rows, refuse)
		if reason, refused := rows.reason(1); rows.state[1] != want || refused != refuse ||
			refuse && !strings.Contains(reason, `"c"`) || rows.Kept() != 1 {
			t.Errorf("state %d, %q", rows.state[1], reason)
		}
	}
}

// TestLengths feeds how long the lists of the rows were that take part.
func TestLengths(t *testing.T) {
	mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "c", arrow.ListOf(arrow.PrimitiveTypes.Int32),
		[]any{int64(1), int64(2)}, []any{}, nil, []any{int64(3)})
	defer rec.Release()
	for dtype, want := range map[savedmodel.DType]any{savedmodel.Int8: []int8{2, 0, 1},
		savedmodel.Uint16: []uint16{2, 0, 1},
		savedmodel.Int32:  []int32{2, 0, 1}, savedmodel.Uint64: []uint64{2, 0, 1}} {
		entry := protocol.Input{Pad: []byte("0"), Lengths: "n"}
		feeds, _, err := feedsOf(t, rec, mem, entry, spec("x", savedmodel.Int64, -1, -1), spec("n", dtype, -1))
		if err != nil || len(feeds) != 2 || !holds(feeds[0].Value, []int64{3, 2}, []int64{1, 2, 0, 0, 3, 0}) ||
			feeds[1].Tensor != "n:0" || !holds(feeds[1].Value, []int64{3}, want) {
			t.Errorf("%s: %v, %v", dtype, feeds, err)
		}
		ReleaseFeeds(feeds)
	}
}

var vectorType = arrow.StructOf(
	arrow.Field{Name: "type", Type: arrow.PrimitiveTypes.Int8},
	arrow.Field{Name: "size", Type: arrow.PrimitiveTypes.Int32, Nullable: true},
	arrow.Field{Name: "indices", Type: arrow.ListOf(arrow.PrimitiveTypes.Int32), Nullable: true},
	arrow.Field{Name: "values", Type: arrow.ListOf(arrow.PrimitiveTypes.Float64), Nullable: true})

func bindAll(signature savedmodel.Signature, schema *arrow.Schema) (*Binding, error) {
	signature.Outputs = []savedmodel.Spec{{Name: "y", Tensor: "y:0", DType: savedmodel.Float32, Shape: []int64{-1}}}
	plan, err := NewPlan(signature, Options{})
	if err != nil {
		return nil, err
	}
	return plan.Bind(schema)
}

// record builds one column from rows of plain Go values.
func record(t *testing.T, mem memory.Allocator, name string, dtype arrow.DataType, rows ...any) arrow.Record {
	t.Helper()
	b := array.NewBuilder(mem, dtype)
	defer b.Release()
	for _, row := range rows {
		appendValue(b, row)
	}
	column := b.NewArray()
	defer column.Release()
	return array.NewRecord(arrow.NewSchema([]arrow.Field{{Name: name, Type: dtype, Nullable: true}}, nil),
		[]arrow.Array{column}, int64(len(rows)))
}

func spec(name string, dtype savedmodel.DType, shape ...int64) savedmodel.Spec {
	return savedmodel.Spec{Name: name, Tensor: name + ":0", DType: dtype, Shape: shape}
}

func TestWholeAlignedColumnIsNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "x", arrow.ListOf(arrow.PrimitiveTypes.Float32), []any{1.0, 2.0}, []any{3.0, 4.0},
		[]any{5.0, 6.0})
	defer rec.Release()
	address := unsafe.SliceData(rec.Column(0).(*array.List).ListValues().Data().Buffers()[1].Bytes())
	binding, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 2)}},
		rec.Schema())
	if err != nil {
		t.Fatal(err)
	}
	take := func(rec arrow.Record, skip ...int) Value {
		t.Helper()
		rows := NewRows(int(rec.NumRows()))
		for _, row := range skip {
			rows.Null(row)
		}
		feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
		if err != nil {
			t.Fatal(err)
		}
		return feeds[0].Value
	}

	whole := take(rec)
	if unsafe.SliceData(whole.Data) != address {
		t.Error("a whole column was copied")
	}
	slice := rec.NewSlice(1, 3)
	sliced := take(slice)
	if unsafe.SliceData(sliced.Data) != (*byte)(unsafe.Add(unsafe.Pointer(address), 8)) {
		t.Error("a slice is not a view of its column")
	}
	holes := take(rec, 1)
	if unsafe.SliceData(holes.Data) == address || len(holes.Data) != 16 {
		t.Error("a selection with a hole must be copied")
	}
	// The buffer outlives the record for as long as a value views it.
	slice.Release()
	for _, v := range []Value{whole, sliced, holes} {
		v.Release()
	}
}

func TestTakeCopiesRows(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	v := Allocate(savedmodel.Int16, []int64{3, 2}, mem)
	copy(v.Data, []byte{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5})
	some := v.Take([]int{2, 0}, mem)
	if !slices.Equal(some.Shape, []int64{2, 2}) || string(some.Data) != string([]byte{4, 4, 5, 5, 0, 0, 1, 1}) {
		t.Errorf("took %v %v", some.Shape, some.Data)
	}
	v.Release()
	some.Release()
	some.Release() // a second time does nothing
	texts := Value{DType: savedmodel.String, Shape: []int64{2, 1}, Strings: [][]byte{[]byte("a"), []byte("b")}}
	if got := texts.Take([]int{1}, mem); string(got.Strings[0]) != "b" || len(got.Strings) != 1 {
		t.Errorf("took %q", got.Strings)
	}
	if (&Value{}).Rows() != -1 {
		t.Error("a scalar has no rows")
	}
}

// pixel is the tensor of pictures of one pixel.
var pixel = PictureTensor{savedmodel.Float32, []int64{-1, 1, 1, 3}}

// decoder is a Pictures by which a picture becomes twelve copies of its first byte.
type decoder func(input string, pictures []Picture, mem memory.Allocator) (Value, map[int]string, error)

func (d decoder) Bytes(_ string, p Picture) int64 { return int64(len(p.Data)) }

func (d decoder) Decode(_ context.Context, input string, pictures []Picture,
	mem memory.Allocator) (Value, map[int]string, error) {
	return d(input, pictures, mem)
}

// TestPictures checks that rows whose picture is refused leave every input, and that decoding sees only rows that
// take part.
func TestPictures(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	signature := savedmodel.Signature{
		Inputs: []savedmodel.Spec{spec("k", savedmodel.Int64, -1), spec("p", savedmodel.Float32, -1, 1, 1, 3),
			spec("q", savedmodel.Float32, -1, 1, 1, 3)},
		Outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1)},
	}
	plan, err := NewPlan(signature, Options{Pictures: map[string]PictureTensor{"p": pixel, "q": pixel}})
	if err != nil {
		t.Fatal(err)
	}
	k := record(t, mem, "k", arrow.PrimitiveTypes.Int64, int64(0), int64(1), int64(2), int64(3), int64(4))
	p := record(t, mem, "p", arrow.BinaryTypes.Binary, "a", "bad", nil, "d", "e")
	q := record(t, mem, "q", arrow.BinaryTypes.Binary, "v", "w", "x", "bad", "z")
	schema := arrow.NewSchema([]arrow.Field{k.Schema().Field(0), p.Schema().Field(0), q.Schema().Field(0)}, nil)
	rec := array.NewRecord(schema, []arrow.Array{k.Column(0), p.Column(0), q.Column(0)}, 5)
	for _, r := range []arrow.Record{k, p, q} {
		r.Release()
	}
	defer rec.Release()
	binding, err := plan.Bind(schema)
	if err != nil {
		t.Fatal(err)
	}
	decode := decoder(func(_ string, pictures []Picture, mem memory.Allocator) (Value, map[int]string, error) {
		v := Allocate(savedmodel.Float32, []int64{int64(len(pictures)), 1, 1, 3}, mem)
		failed := map[int]string{}
		for i, p := range pictures {
			if string(p.Data) == "bad" {
				failed[i] = "no picture"
			}
			copy(v.Data[i*12:], strings.Repeat(string(p.Data[:1]), 12))
		}
		return v, failed, nil
	})
	rows := NewRows(5)
	binding.Nulls(rec, rows, false)
	feeds, err := binding.Values(t.Context(), rec, rows, decode, mem)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, feed := range feeds {
		got[feed.Tensor] = string(feed.Value.Data)
	}
	twelve := func(s string) string { return strings.Repeat(s, 12) }
	want := map[string]string{"p:0": twelve("a") + twelve("e"), "q:0": twelve("v") + twelve("z"),
		"k:0": "\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"}
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s is %q, want %q", name, got[name], want[name])
		}
	}
	ReleaseFeeds(feeds)
	if row, reason, ok := rows.FirstRefused(); row != 1 || reason != `column "p": no picture` || !ok {
		t.Errorf("first refused is row %d: %q, %t", row, reason, ok)
	}

	all := NewRows(5)
	feeds, err = binding.Values(t.Context(), rec, all, decoder(func(_ string, pictures []Picture,
		mem memory.Allocator) (Value, map[int]string, error) {
		failed := map[int]string{}
		for i := range pictures {
			failed[i] = "no picture"
		}
		return Allocate(savedmodel.Float32, []int64{int64(len(pictures)), 1, 1, 3}, mem), failed, nil
	}), mem)
	if feeds != nil || err != nil || all.Kept() != 0 {
		t.Errorf("with every picture refused: %d feeds, %d kept, %v", len(feeds), all.Kept(), err)
	}
	calls := 0
	_, err = binding.Values(t.Context(), rec, NewRows(5),
		decoder(func(input string, pictures []Picture, mem memory.Allocator) (Value, map[int]string, error) {
			if calls++; calls == 2 {
				return Value{}, nil, errors.New("the decoder broke")
			}
			return decode(input, pictures[:0], mem)
		}), mem)
	if err == nil || err.Error() != "the decoder broke" {
		t.Errorf("the decoder's error became %v", err)
	}
}

func TestBindNamesColumnAndBothTypes(t *testing.T) {
	list := func(t arrow.DataType) arrow.DataType { return arrow.ListOf(t) }
	f32, i64, str, stamp := arrow.PrimitiveTypes.Float32, arrow.PrimitiveTypes.Int64, arrow.BinaryTypes.String,
		arrow.FixedWidthTypes.Timestamp_us
	date, decimal := arrow.PrimitiveTypes.Date32, &arrow.Decimal128Type{Precision: 10, Scale: 2}
	tensorField := func(meta string) arrow.Metadata {
		return arrow.NewMetadata([]string{"ARROW:extension:name", "ARROW:extension:metadata"},
			[]string{"arrow.fixed_shape_tensor", meta})
	}
	for name, c := range map[string]struct {
		input    savedmodel.Spec
		column   arrow.DataType
		texts    []string
		metadata arrow.Metadata
	}{
		"wrong dtype": {input: spec("x", savedmodel.Float32, -1, 4), column: list(str),
			texts: []string{`"x" float32 [?,4]`, `column "c"`, "list<item: utf8", "wants elements of float32"}},
		"narrowing": {input: spec("x", savedmodel.Int32, -1), column: i64,
			texts: []string{`"x" int32 [?]`, `column "c" of int64`, "wants elements of int32"}},
		"int32 to float32": {input: spec("x", savedmodel.Float32, -1), column: arrow.PrimitiveTypes.Int32,
			texts: []string{`"x" float32 [?]`, "int32", "wants elements of float32"}},
		"double to half": {input: spec("x", savedmodel.Float16, -1), column: arrow.PrimitiveTypes.Float64,
			texts: []string{"float64", "wants elements of float16"}},
		"too flat": {input: spec("x", savedmodel.Float32, -1, 4), column: f32,
			texts: []string{`"x" float32 [?,4]`, "1 level of list", `column "c" is float32`}},
		"too deep": {input: spec("x", savedmodel.Float32, -1), column: list(f32),
			texts: []string{"0 levels", "list<item: float32"}},
		"fixed size": {input: spec("x", savedmodel.Float32, -1, 4), column: arrow.FixedSizeListOf(3, f32),
			texts: []string{`"x" float32 [?,4]`, "fixed_size_list", "3 elements at dimension 1"}},
		"date": {input: spec("x", savedmodel.Int32, -1), column: date,
			texts: []string{"date32", "wants elements of int32"}},
		"dates in lists": {input: spec("x", savedmodel.Int64, -1, -1, -1), column: list(list(date)),
			texts: []string{"date32", "wants elements of int64"}},
		"timestamp": {input: spec("x", savedmodel.Int64, -1), column: stamp,
			texts: []string{"timestamp[us", "wants elements of int64"}},
		"timestamp for text": {input: spec("x", savedmodel.String, -1), column: stamp,
			texts: []string{"timestamp[us", "wants elements of string"}},
		"time": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.Time64ns,
			texts: []string{"time64", "wants elements of int64"}},
		"duration": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.Duration_us,
			texts: []string{"duration", "wants elements of int64"}},
		"decimal": {input: spec("x", savedmodel.Float64, -1), column: decimal,
			texts: []string{"decimal", "wants elements of float64"}},
		"decimal with fraction": {input: spec("x", savedmodel.Uint64, -1), column: decimal,
			texts: []string{"decimal", "wants elements of uint64"}},
		"binary": {input: spec("x", savedmodel.Float32, -1, 2), column: arrow.BinaryTypes.Binary,
			texts: []string{"float32", "binary", `"encoding":"raw"`}},
		"dictionary": {input: spec("x", savedmodel.Int32, -1),
			column: &arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: i64},
			texts:  []string{"dictionary", "wants elements of int32"}},
		"map": {input: spec("x", savedmodel.Float32, -1, -1), column: arrow.MapOf(str, f32),
			texts: []string{"map<", "wants elements of float32"}},
		"struct": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.StructOf(arrow.Field{Name: "a\x1b f", Type: f32}),
			texts:  []string{`struct<a\x1b f`, "wants elements of float32"}},
		"union": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.SparseUnionOf([]arrow.Field{{Name: "f", Type: f32}}, []int8{0}),
			texts:  []string{"union", "wants elements of float32"}},
		"run-end encoded": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.RunEndEncodedOf(arrow.PrimitiveTypes.Int32, f32),
			texts:  []string{"run_end_encoded", "wants elements of float32"}},
		"interval": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.MonthInterval,
			texts: []string{"month_interval", "wants elements of int64"}},
		"binary of no bytes": {input: spec("x", savedmodel.String, -1), column: &arrow.FixedSizeBinaryType{},
			texts: []string{"fixed_size_binary[0]"}},
		"dtype without type": {input: spec("x", savedmodel.Resource, -1), column: f32,
			texts: []string{"resource", "float32", "no column can feed"}},
		"vectors for integers": {input: spec("x", savedmodel.Int64, -1, -1), column: vectorType,
			texts: []string{`"x" int64 [?,?]`, `column "c" of Spark vectors`, "send lists"}},
		"vectors of rank 1": {input: spec("x", savedmodel.Float64, -1), column: vectorType,
			texts: []string{"2 dimensions", "send lists"}},
		"tensor of many dimensions": {input: savedmodel.Spec{Name: "x", DType: savedmodel.Float32, UnknownRank: true},
			column:   arrow.FixedSizeListOf(1, f32),
			metadata: tensorField(`{"shape":[1` + strings.Repeat(",1", MaxRank-1) + `]}`),
			texts:    []string{`input "x"`, "65 dimensions", "64 at most"}},
		"tensor of other shape": {input: spec("x", savedmodel.Float32, -1, 3, 2),
			column: arrow.FixedSizeListOf(6, f32), metadata: tensorField(`{"shape":[2,3]}`),
			texts: []string{"2 elements at dimension 1"}},
		"tensor of other rank": {input: spec("x", savedmodel.Float32, -1, 6), column: arrow.FixedSizeListOf(6, f32),
			metadata: tensorField(`{"shape":[2,3]}`), texts: []string{"1 level of list"}},
		"tensor of other size": {input: spec("x", savedmodel.Float32, -1, 3, 2),
			column: arrow.FixedSizeListOf(6, f32), metadata: tensorField(`{"shape":[2,4]}`),
			texts: []string{"shape [2 4]", "6 elements"}},
		"tensor overflows": {input: spec("x", savedmodel.Float32, -1, 3, 2),
			column: arrow.FixedSizeListOf(6, f32), metadata: tensorField(`{"shape":[4294967296,4294967296]}`),
			texts: []string{"6 elements"}},
		"tensor permuted": {input: spec("x", savedmodel.Float32, -1, 2, 3),
			column: arrow.FixedSizeListOf(6, f32), metadata: tensorField(`{"shape":[2,3],"permutation":[1,0]}`),
			texts: []string{"permutation [1 0]"}},
		"tensor without shape": {input: spec("x", savedmodel.Float32, -1, 2, 3),
			column: arrow.FixedSizeListOf(6, f32), metadata: tensorField(`{}`),
			texts: []string{"metadata", "cannot be read"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{c.input}},
				arrow.NewSchema([]arrow.Field{{Name: "c", Type: c.column, Metadata: c.metadata}}, nil))
			expect.Fault(t, err, fault.BadRequest, c.texts...)
		})
	}
	two := savedmodel.Signature{Inputs: []savedmodel.Spec{spec("a", savedmodel.Float32, -1),
		spec("b", savedmodel.Float32, -1)}}
	_, err := bindAll(two, arrow.NewSchema([]arrow.Field{{Name: "a", Type: f32}, {Name: "z", Type: f32}}, nil))
	expect.Fault(t, err, fault.BadRequest, `input "b"`, `column "b"`, "not", `"a", "z"`)
	_, err = bindAll(two, arrow.NewSchema([]arrow.Field{{Name: "a", Type: f32}, {Name: "a", Type: f32},
		{Name: "b", Type: f32}}, nil))
	expect.Fault(t, err, fault.BadRequest, `column "a"`, "2 times")
}

func TestNewPlanRefuses(t *testing.T) {
	many := make([]int64, MaxRank+1) // dimensions, the first of any size
	for i := range many {
		many[i] = 1
	}
	many[0] = -1
	mapped := func(in protocol.Input) Options {
		in.Tensor, in.Column = "x", "c"
		return Options{Inputs: protocol.Inputs{in}}
	}
	x, y := spec("x", savedmodel.Float32, -1, 4), spec("y", savedmodel.Float32, -1)
	for name, c := range map[string]struct {
		inputs, outputs []savedmodel.Spec
		options         Options
		texts           []string
	}{
		"unknown input": {options: Options{Inputs: protocol.Inputs{{Tensor: "nope", Column: "c"}}},
			texts: []string{`no input "nope"`, `"x" float32 [?,4]`}},
		"input left out": {options: Options{Inputs: protocol.Inputs{}}, texts: []string{`input "x" is not mapped`}},
		"unknown output": {options: Options{Outputs: protocol.Outputs{{Tensor: "nope", Column: "c"}}},
			texts: []string{`no output "nope"`, `"y" float32 [?]`}},
		"no output": {options: Options{Outputs: protocol.Outputs{}}, texts: []string{"no output is requested"}},
		"two outputs, one name": {outputs: []savedmodel.Spec{y, spec("z", savedmodel.Int64, -1)},
			options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c"}, {Tensor: "z", Column: "c"}}},
			texts:   []string{`"c"`, "error_column"}},
		"error column in use": {options: Options{ErrorColumn: "y"}, texts: []string{`"y"`, "error_column"}},
		"output not per row": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32)},
			texts: []string{`output "y"`, "float32", "first dimension must be the batch"}},
		"output of no rank": {outputs: []savedmodel.Spec{{Name: "y", DType: savedmodel.Float32, UnknownRank: true}},
			texts: []string{`output "y"`, "unknown rank", `"outputs":{"y":{"column":"y","shape":[-1,-1]}}`}},
		"output of no type": {outputs: []savedmodel.Spec{spec("y", savedmodel.DType(8), -1)},
			texts: []string{`output "y"`, "dtype(8)"}},
		"no input": {inputs: []savedmodel.Spec{}, texts: []string{"no input"}},
		"input without batch": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32)},
			texts: []string{`"x" float32 []`, "no batch dimension"}},
		"input of fixed batch": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, 8, 4)},
			texts: []string{`"x" float32 [8,4]`, "no batch dimension"}},
		"encoding": {options: mapped(protocol.Input{Encoding: "base64"}),
			texts: []string{`input "x"`, `"base64"`, `"raw"`}},
		"raw strings": {inputs: []savedmodel.Spec{spec("x", savedmodel.String, -1, 4)},
			options: mapped(protocol.Input{Encoding: "raw"}), texts: []string{`"x" string [?,4]`, "no fixed size"}},
		"raw of open shape": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 4, -1)},
			options: mapped(protocol.Input{Encoding: "raw"}), texts: []string{`"x" float32 [?,4,?]`, "must be known"}},
		"raw with pad": {options: mapped(protocol.Input{Encoding: "raw", Pad: []byte("0")}),
			texts: []string{"leave pad and lengths out"}},
		"pad of rank 1": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1)},
			options: mapped(protocol.Input{Pad: []byte("0")}), texts: []string{`"x" float32 [?]`, "cannot have pad"}},
		"pad of text": {options: mapped(protocol.Input{Pad: []byte(`"0"`)}),
			texts: []string{`"x" float32 [?,4]`, "a number for float32"}},
		"pad of null": {options: mapped(protocol.Input{Pad: []byte(`null`)}), texts: []string{"a number for float32"}},
		"pad of list": {options: mapped(protocol.Input{Pad: []byte(`[0]`)}), texts: []string{"a number for float32"}},
		"pad too large": {inputs: []savedmodel.Spec{spec("x", savedmodel.Int8, -1, 4)},
			options: mapped(protocol.Input{Pad: []byte("128")}), texts: []string{"from -128 to 127", "int8"}},
		"pad negative": {inputs: []savedmodel.Spec{spec("x", savedmodel.Uint8, -1, 4)},
			options: mapped(protocol.Input{Pad: []byte("-1")}), texts: []string{"0 to 255"}},
		"pad infinite": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float16, -1, 4)},
			options: mapped(protocol.Input{Pad: []byte("65520")}), texts: []string{"in range for float16"}},
		"pad for bool": {inputs: []savedmodel.Spec{spec("x", savedmodel.Bool, -1, 4)},
			options: mapped(protocol.Input{Pad: []byte("0")}), texts: []string{"true or false for bool"}},
		"pad for text": {inputs: []savedmodel.Spec{spec("x", savedmodel.String, -1, 4)},
			options: mapped(protocol.Input{Pad: []byte("0")}), texts: []string{"a string for string"}},
		"lengths of nobody": {options: mapped(protocol.Input{Lengths: "n"}), texts: []string{`no input "n"`}},
		"lengths of itself": {options: mapped(protocol.Input{Lengths: "x"}), texts: []string{`input "x" is fed twice`}},
		"lengths in floats": {inputs: []savedmodel.Spec{spec("n", savedmodel.Float32, -1), x},
			options: mapped(protocol.Input{Lengths: "n"}),
			texts:   []string{`"n" float32 [?]`, "whole numbers of rank 1"}},
		"lengths in lists": {inputs: []savedmodel.Spec{spec("n", savedmodel.Int32, -1, -1), x},
			options: mapped(protocol.Input{Lengths: "n"}), texts: []string{`"n" int32 [?,?]`, "rank 1"}},
		"picture with pad": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 8, 8, 3)},
			options: Options{Inputs: protocol.Inputs{{Tensor: "x", Column: "c", Pad: []byte("0")}},
				Pictures: map[string]PictureTensor{"x": {savedmodel.Float32, []int64{-1, 8, 8, 3}}}},
			texts: []string{"preprocess", "pad"}},
		"output of fixed batch": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, 3, 4)},
			texts: []string{`"y" float32 [3,4]`, "must be the batch"}},
		"input of many dimensions": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, many...)},
			texts: []string{`input "x" has 65 dimensions`, "64 at most"}},
		"output of many dimensions": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, many...)},
			texts: []string{`output "y" has 65 dimensions`, "64 at most"}},
		"shape of many dimensions": {
			outputs: []savedmodel.Spec{{Name: "y", DType: savedmodel.Float32, UnknownRank: true}},
			options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: many}}},
			texts:   []string{`output "y" has 65 dimensions`, "64 at most"}},
		"output of type int": {options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Type: "int"}}},
			texts: []string{`"int"`, `"utf8"`}},
		"numbers as utf8": {options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Type: "utf8"}}},
			texts: []string{`"y" float32 [?]`, "strings"}},
		"shape without batch": {
			options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: []int64{3}}}},
			texts:   []string{"[3]", "-1 for the rows"}},
		"shape of other rank": {
			options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: []int64{-1, 3}}}},
			texts:   []string{`"y" float32 [?]`, "[?,3]"}},
		"shape of other size": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 4)},
			options: Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: []int64{-1, 3}}}},
			texts:   []string{`"y" float32 [?,4]`, "[?,3]"}},
		"open tensor": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 4, -1)},
			options: Options{Layout: protocol.LayoutTensor}, texts: []string{`"y" float32 [?,4,?]`,
				`"outputs":{"y":{"column":"y","shape":[-1,4,SIZE]}}`}},
		"empty tensor": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 0)},
			options: Options{Layout: protocol.LayoutTensor}, texts: []string{"from 1 to"}},
		"huge tensor": {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 1<<20, 1<<20)},
			options: Options{Layout: protocol.LayoutTensor}, texts: []string{"from 1 to"}},
		"unknown picture": {options: Options{Pictures: map[string]PictureTensor{"nope": pixel}},
			texts: []string{`no input "nope"`}},
		"picture of wrong rank": {options: Options{Pictures: map[string]PictureTensor{"x": pixel}},
			texts: []string{"makes float32 [?,1,1,3]", `"x" float32 [?,4]`}},
		"picture of wrong size": {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 8, 8, 3)},
			options: Options{Pictures: map[string]PictureTensor{"x": pixel}},
			texts:   []string{"makes float32 [?,1,1,3]", `"x" float32 [?,8,8,3]`}},
		"picture of wrong type": {inputs: []savedmodel.Spec{spec("x", savedmodel.Uint8, -1, 1, 1, 3)},
			options: Options{Pictures: map[string]PictureTensor{"x": pixel}},
			texts:   []string{"makes float32 [?,1,1,3]", `"x" uint8 [?,1,1,3]`}},
	} {
		t.Run(name, func(t *testing.T) {
			signature := savedmodel.Signature{Inputs: c.inputs, Outputs: c.outputs}
			if c.inputs == nil {
				signature.Inputs = []savedmodel.Spec{x}
			}
			if c.outputs == nil {
				signature.Outputs = []savedmodel.Spec{y}
			}
			_, err := NewPlan(signature, c.options)
			expect.Fault(t, err, fault.BadRequest, c.texts...)
		})
	}
	plan, err := NewPlan(savedmodel.Signature{Inputs: []savedmodel.Spec{spec("p", savedmodel.Float32, -1, 8, 8, 3)},
		Outputs: []savedmodel.Spec{y}}, Options{Pictures: map[string]PictureTensor{"p": {savedmodel.Float32,
		[]int64{-1, 8, 8, 3}}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = plan.Bind(arrow.NewSchema([]arrow.Field{{Name: "c", Type: arrow.BinaryTypes.String}}, nil))
	expect.Fault(t, err, fault.BadRequest, `input "p"`, "binary", `column "c" is utf8`)
	for _, fields := range [][]arrow.Field{
		{{Name: "height", Type: arrow.PrimitiveTypes.Int32}},
		imageFields("height", arrow.PrimitiveTypes.Int64),
		imageFields("data", arrow.BinaryTypes.String),
	} {
		_, err = plan.Bind(arrow.NewSchema([]arrow.Field{{Name: "c", Type: arrow.StructOf(fields...)}}, nil))
		expect.Fault(t, err, fault.BadRequest, `input "p"`, "Spark's image struct", `column "c" is struct`)
	}
}

// TestValuesRefuse has a bad row or batch of each kind: a row leaves with a reason and the others stay; a batch is a
// fault.
func TestValuesRefuse(t *testing.T) {
	f32 := arrow.PrimitiveTypes.Float32
	lists, texts, blobs := arrow.ListOf(f32), arrow.BinaryTypes.String, arrow.BinaryTypes.Binary
	big := make([]any, 1<<15)
	for i := range big {
		big[i] = 1.0
	}
	many := make([]any, 1<<14)
	for i := range many {
		many[i] = []any{}
	}
	many[0] = big
	for name, c := range map[string]struct {
		input   savedmodel.Spec
		mapping protocol.Input
		column  arrow.DataType
		rows    []any
		refused map[int]string
		kind    fault.Kind
		fault   []string
	}{
		"wrong length": {input: spec("x", savedmodel.Float32, -1, 2), column: lists,
			rows: []any{[]any{1.0, 2.0}, []any{1.0}, []any{}},
			refused: map[int]string{1: `column "c": a list of 1 elements at dimension 1, want 2`,
				2: `column "c": a list of 0 elements at dimension 1, want 2`}},
		"inner length": {input: spec("x", savedmodel.Float32, -1, 1, 2), column: arrow.ListOf(lists),
			rows:    []any{[]any{[]any{1.0, 2.0}}, []any{[]any{1.0}}},
			refused: map[int]string{1: `column "c": a list of 1 elements at dimension 2, want 2`}},
		"too long to pad": {input: spec("x", savedmodel.Float32, -1, 2), mapping: protocol.Input{Pad: []byte("0")},
			column: lists, rows: []any{[]any{1.0, 2.0, 3.0}, []any{1.0}},
			refused: map[int]string{0: `column "c": a list of 3 elements at dimension 1, want 2 at most`}},
		"out of range": {input: spec("x", savedmodel.Uint8, -1), column: arrow.PrimitiveTypes.Int64,
			rows: []any{int64(255), int64(256), int64(-1)},
			refused: map[int]string{1: `column "c": a value is outside uint8, 0 to 255`,
				2: `column "c": a value is outside uint8, 0 to 255`}},
		"half overflows": {input: spec("x", savedmodel.Float16, -1), column: f32,
			rows:    []any{65519.0, 65520.0, math.Inf(1)},
			refused: map[int]string{1: `column "c": a value is outside float16, -65504 to 65504`}},
		"uint16 of int32": {input: spec("x", savedmodel.Uint16, -1), column: arrow.PrimitiveTypes.Int32,
			rows: []any{int64(65535), int64(65536), int64(0), int64(-3077)},
			refused: map[int]string{1: `column "c": a value is outside uint16, 0 to 65535`,
				3: `column "c": a value is outside uint16, 0 to 65535`}},
		"uint32 of uint64": {input: spec("x", savedmodel.Uint32, -1), column: arrow.PrimitiveTypes.Uint64,
			rows:    []any{int64(math.MaxUint32), int64(1 << 32), int64(0)},
			refused: map[int]string{1: `column "c": a value is outside uint32, 0 to 4294967295`}},
		"uint64 of int64": {input: spec("x", savedmodel.Uint64, -1), column: arrow.PrimitiveTypes.Int64,
			rows:    []any{int64(math.MaxInt64), int64(math.MinInt64)},
			refused: map[int]string{1: `column "c": a value is outside uint64, 0 to 18446744073709551615`}},
		"uint64 of decimals": {input: spec("x", savedmodel.Uint64, -1), column: &arrow.Decimal128Type{Precision: 20},
			rows: []any{uint64(math.MaxUint64), huge{}, int64(-77)},
			refused: map[int]string{1: `column "c": a value is outside uint64, 0 to 18446744073709551615`,
				2: `column "c": a value is outside uint64, 0 to 18446744073709551615`}},
		"bfloat16 overflows": {input: spec("x", savedmodel.Bfloat16, -1), column: f32,
			rows:    []any{1.0, math.MaxFloat32, math.Inf(-1)},
			refused: map[int]string{1: `column "c": a value is outside bfloat16, -3.39e38 to 3.39e38`}},
		"raw size": {input: spec("x", savedmodel.Float32, -1, 2), mapping: protocol.Input{Encoding: "raw"},
			column: blobs,
			rows:   []any{"12345678", "1234", ""},
			refused: map[int]string{1: `column "c": a raw cell of 4 bytes, want 8`,
				2: `column "c": a raw cell of 0 bytes, want 8`}},
		"raw bool": {input: spec("x", savedmodel.Bool, -1, 2), mapping: protocol.Input{Encoding: "raw"},
			column:  blobs,
			rows:    []any{"\x00\x01", "\x00\x02"},
			refused: map[int]string{1: `column "c": a raw bool is a byte other than 0 and 1`}},
		"all rows": {input: spec("x", savedmodel.Float32, -1, 2), column: lists, rows: []any{[]any{1.0}},
			refused: map[int]string{0: `column "c": a list of 1 elements at dimension 1, want 2`}},

		"ragged lists": {input: spec("x", savedmodel.Float32, -1, -1), column: lists,
			rows: []any{[]any{1.0}, []any{1.0, 2.0}}, kind: fault.BadRequest,
			fault: []string{`"x" float32 [?,?]`, `column "c"`, "lists of 1 and of 2 elements", "dimension 1",
				`"pad"`}},
		"padding is huge": {input: spec("x", savedmodel.Float32, -1, -1), mapping: protocol.Input{Pad: []byte("0")},
			column: lists, rows: many, kind: fault.Exhausted,
			fault: []string{`"x" float32 [?,?]`, `column "c"`, "1024 MiB", "fewer rows"}},
		"raw not binary": {input: spec("x", savedmodel.Float32, -1, 2), mapping: protocol.Input{Encoding: "raw"},
			column: texts,
			kind:   fault.BadRequest, fault: []string{`"x" float32 [?,2]`, "binary column", `column "c" is utf8`}},
		"raw fixed size": {input: spec("x", savedmodel.Float32, -1, 2), mapping: protocol.Input{Encoding: "raw"},
			column: &arrow.FixedSizeBinaryType{ByteWidth: 4}, kind: fault.BadRequest,
			fault: []string{"8 bytes", "fixed_size_binary[4]"}},
	} {
		t.Run(name, func(t *testing.T) {
			mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
			defer mem.AssertSize(t, 0)
			rec := record(t, mem, "c", c.column, c.rows...)
			defer rec.Release()
			c.mapping.Tensor, c.mapping.Column = "x", "c"
			plan, err := NewPlan(savedmodel.Signature{Inputs: []savedmodel.Spec{c.input}, Outputs: anyInput},
				Options{Inputs: protocol.Inputs{c.mapping}})
			if err != nil {
				t.Fatal(err)
			}
			binding, err := plan.Bind(rec.Schema())
			rows := NewRows(len(c.rows))
			if err == nil {
				var feeds []Feed
				feeds, err = binding.Values(t.Context(), rec, rows, nil, mem)
				if err == nil && len(feeds) > 0 && feeds[0].Value.Rows() != int64(rows.Kept()) {
					t.Errorf("%d rows of %d kept", feeds[0].Value.Rows(), rows.Kept())
				}
				ReleaseFeeds(feeds)
			}
			if c.fault != nil {
				expect.Fault(t, err, c.kind, c.fault...)
			} else if err != nil {
				t.Error(err)
			}
			refused := map[int]string{}
			for row := range rows.Len() {
				if reason, ok := rows.reason(row); ok {
					refused[row] = reason
				}
			}
			if !maps.Equal(refused, c.refused) {
				t.Errorf("refused %v, want %v", refused, c.refused)
			}
		})
	}
}

// TestCheckFindsDamage damages valid columns, one buffer or length at a time.
func TestCheckFindsDamage(t *testing.T) {
	f32, i32 := arrow.PrimitiveTypes.Float32, func(v ...int32) []byte { return arrow.Int32Traits.CastToBytes(v) }
	i64 := func(v ...int64) []byte { return arrow.Int64Traits.CastToBytes(v) }
	array4 := func(t arrow.DataType, n int, children []arrow.ArrayData, buffers ...[]byte) *array.Data {
		list := make([]*memory.Buffer, len(buffers))
		for i, b := range buffers {
			if b != nil {
				list[i] = memory.NewBufferBytes(b)
			}
		}
		nulls := 0
		if len(list) > 0 && list[0] != nil {
			nulls = array.UnknownNullCount
		}
		return array.NewData(t, n, list, children, nulls, 0)
	}
	unmarked := func(nulls int) *array.Data { // no bits say which
		return array.NewData(f32, 4, []*memory.Buffer{nil, memory.NewBufferBytes(make([]byte, 16))}, nil, nulls, 0)
	}
	four := []arrow.ArrayData{array4(f32, 4, nil, nil, make([]byte, 16))}
	short := []arrow.ArrayData{array4(f32, 4, nil, nil, make([]byte, 12))}
	list, large, fixed := arrow.ListOf(f32), arrow.LargeListOf(f32), arrow.FixedSizeListOf(2, f32)
	text, bigText := arrow.BinaryTypes.String, arrow.BinaryTypes.LargeString
	views, textViews := arrow.ListViewOf(f32), arrow.BinaryTypes.StringView
	headers := func(texts ...string) (bytes []byte) {
		for _, text := range texts {
			var h arrow.ViewHeader
			h.SetString(text)
			bytes = append(bytes, unsafe.Slice((*byte)(unsafe.Pointer(&h)), arrow.ViewHeaderSizeBytes)...)
		}
		return bytes
	}
	indices := func(index arrow.DataType, n int, nulls, bytes []byte) *array.Data {
		values := four[0].(*array.Data)
		d := array4(&arrow.DictionaryType{IndexType: index, ValueType: f32}, n, nil, nulls, bytes)
		d.SetDictionary(values)
		return d
	}
	vectorData := func(n, size int) *array.Data {
		fields := []arrow.ArrayData{
			array4(arrow.PrimitiveTypes.Int8, n, nil, nil, make([]byte, n)),
			array4(arrow.PrimitiveTypes.Int32, size, nil, nil, make([]byte, 4*n)),
			array4(arrow.ListOf(arrow.PrimitiveTypes.Int32), n,
				[]arrow.ArrayData{array4(arrow.PrimitiveTypes.Int32, 0, nil, nil, nil)}, nil, make([]byte, 4*n+4)),
			array4(arrow.ListOf(arrow.PrimitiveTypes.Float64), n,
				[]arrow.ArrayData{array4(arrow.PrimitiveTypes.Float64, 0, nil, nil, nil)}, nil, make([]byte, 4*n+4)),
		}
		return array4(vectorType, n, fields, nil)
	}
	for name, c := range map[string]struct {
		data *array.Data
		ok   bool
	}{
		"list":                  {array4(list, 2, four, nil, i32(0, 2, 4)), true},
		"list from 1":           {array4(list, 2, four, nil, i32(1, 2, 4)), true},
		"empty without buffers": {array4(list, 0, []arrow.ArrayData{array4(f32, 0, nil, nil, nil)}, nil, nil), true},
		"fixed-size list":       {array4(fixed, 2, four, nil), true},
		"text":                  {array4(text, 2, nil, nil, i32(0, 1, 3), []byte("abc")), true},
		"bools":                 {array4(arrow.FixedWidthTypes.Boolean, 9, nil, nil, make([]byte, 2)), true},

		"list view":             {array4(views, 2, four, nil, i32(2, 0), i32(2, 3)), true},
		"null view of nonsense": {array4(views, 2, four, []byte{1}, i32(2, 99), i32(2, -3)), true},
		"empty view elsewhere":  {array4(views, 2, four, nil, i32(2, 99), i32(2, 0)), true},
		"large list view":       {array4(arrow.LargeListViewOf(f32), 2, four, nil, i64(2, 0), i64(2, 3)), true},
		"text views": {array4(textViews, 2, nil, nil, headers("short", "longer than that"),
			[]byte("longer than that")), true},
		"dictionary":  {indices(arrow.PrimitiveTypes.Int8, 2, nil, []byte{0, 3}), true},
		"null index":  {indices(arrow.PrimitiveTypes.Int8, 2, []byte{1}, []byte{0, 99}), true},
		"large index": {indices(arrow.PrimitiveTypes.Uint64, 1, nil, i64(3)), true},
		"vectors":     {vectorData(2, 2), true},
		"nulls":       {array4(arrow.Null, 9, nil, nil), true},
		"decimals":    {array4(&arrow.Decimal128Type{Precision: 20}, 2, nil, nil, make([]byte, 32)), true},
		"blobs of 3":  {array4(&arrow.FixedSizeBinaryType{ByteWidth: 3}, 2, nil, nil, make([]byte, 6)), true},

		"view beyond":           {array4(views, 2, four, nil, i32(2, 0), i32(3, 1)), false},
		"view from beyond":      {array4(views, 2, four, nil, i32(5, 0), i32(1, 1)), false},
		"view negative":         {array4(views, 2, four, nil, i32(-1, 0), i32(1, 1)), false},
		"view of negative size": {array4(views, 2, four, nil, i32(1, 0), i32(-1, 1)), false},
		"view overflows":        {array4(arrow.LargeListViewOf(f32), 1, four, nil, i64(math.MaxInt64), i64(2)), false},
		"too few views":         {array4(views, 2, four, nil, i32(2, 0), i32(2)), false},
		"views of all, often": {array4(views, 1<<17, []arrow.ArrayData{array4(arrow.PrimitiveTypes.Int8, 1<<11, nil,
			nil, make([]byte, 1<<11))}, nil, make([]byte, 4<<17), bytes.Repeat(i32(1<<11), 1<<17)), false},
		"text view beyond":    {array4(textViews, 1, nil, nil, headers("longer than that"), []byte("longer")), false},
		"text view elsewhere": {array4(textViews, 1, nil, nil, headers("longer than that")), false},
		"text view negative":  {array4(textViews, 1, nil, nil, append(i32(-1), make([]byte, 12)...)), false},
		"too few text views":  {array4(textViews, 2, nil, nil, headers("short")), false},
		"index beyond":        {indices(arrow.PrimitiveTypes.Int8, 2, nil, []byte{0, 4}), false},
		"index negative":      {indices(arrow.PrimitiveTypes.Int64, 1, nil, i64(-1)), false},
		"too few indices":     {indices(arrow.PrimitiveTypes.Int32, 2, nil, i32(0)), false},
		"vector child short":  {vectorData(2, 1), false},
		"nulls without end":   {array4(arrow.Null, math.MaxInt, nil, nil), false},
		"blobs of nothing":    {array4(&arrow.FixedSizeBinaryType{}, 2, nil, nil, make([]byte, 6)), false},

		"negative offset":       {array4(list, 2, four, nil, i32(-1, 2, 4)), false},
		"falling offsets":       {array4(list, 2, four, nil, i32(0, 4, 2)), false},
		"offset beyond":         {array4(list, 2, four, nil, i32(0, 2, 5)), false},
		"too few offsets":       {array4(list, 2, four, nil, i32(0, 2)), false},
		"no offsets":            {array4(list, 2, four, nil, nil), false},
		"large offset beyond":   {array4(large, 2, four, nil, i64(0, 2, 1<<40)), false},
		"large falling":         {array4(large, 2, four, nil, i64(0, 4, 2)), false},
		"child too short":       {array4(list, 2, short, nil, i32(0, 2, 4)), false},
		"fixed list too long":   {array4(fixed, 3, four, nil), false},
		"fixed list overflows":  {array4(fixed, math.MaxInt, four, nil), false},
		"numbers too long":      {array4(f32, 5, nil, nil, make([]byte, 16)), false},
		"numbers overflow":      {array4(f32, math.MaxInt/2, nil, nil, make([]byte, 16)), false},
		"bools too long":        {array4(arrow.FixedWidthTypes.Boolean, 17, nil, nil, make([]byte, 2)), false},
		"bools overflow":        {array4(arrow.FixedWidthTypes.Boolean, math.MaxInt, nil, nil, make([]byte, 2)), false},
		"nulls too short":       {array4(f32, 9, nil, make([]byte, 1), make([]byte, 36)), false},
		"nulls without bits":    {unmarked(1), false},
		"unknown, without bits": {unmarked(array.UnknownNullCount), false},
		"text beyond":           {array4(text, 2, nil, nil, i32(0, 1, 4), []byte("abc")), false},
		"text falling":          {array4(text, 2, nil, nil, i32(0, 9, 3), []byte("abc")), false},
		"large text falling":    {array4(bigText, 2, nil, nil, i64(0, 9, 3), []byte("abc")), false},
		"more rows than offset": {array4(text, math.MaxInt, nil, nil, i32(0, 1), []byte("a")), false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := inBounds(c.data); got != c.ok {
				t.Errorf("in bounds: %t, want %t", got, c.ok)
			}
		})
	}
}
