// Tests of input tensors: columns of edge values, lists, dictionaries and nulls, and each kind of error. Random columns
// are compared with TensorFlow in pyspark-shim/tests/test_property.py.

package tensor

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// Shorter names of types that many tables have.
var (
	i8, i16, i32, i64 = arrow.PrimitiveTypes.Int8, arrow.PrimitiveTypes.Int16, arrow.PrimitiveTypes.Int32,
		arrow.PrimitiveTypes.Int64
	u8, f32, f64       = arrow.PrimitiveTypes.Uint8, arrow.PrimitiveTypes.Float32, arrow.PrimitiveTypes.Float64
	str, blob, boolean = arrow.BinaryTypes.String, arrow.BinaryTypes.Binary, arrow.FixedWidthTypes.Boolean
	decimal            = &arrow.Decimal128Type{Precision: 20}
)

// half and bfloat are the bits of 16-bit floats, int128 is a decimal of scale 0.
type (
	half   uint16
	bfloat uint16
	int128 struct{ Low, High uint64 }
)

var minusZero, infinite, nan = math.Copysign(0, -1), math.Inf(1), math.Float32frombits(0x7fc00001)

// tensorOf returns a tensor of rank 1 with the elements of a slice, by whose type its dtype goes.
func tensorOf(elements any) Value {
	dtypes := map[string]savedmodel.DType{"[]tensor.half": savedmodel.Float16, "[]tensor.bfloat": savedmodel.Bfloat16}
	for _, dtype := range outDTypes {
		dtypes["[]"+dtype.String()] = dtype
	}
	v := Value{DType: dtypes[fmt.Sprintf("%T", elements)]}
	if texts, ok := elements.([]string); ok {
		for _, text := range texts {
			v.Strings = append(v.Strings, []byte(text))
		}
		v.Shape = []int64{int64(len(texts))}
		return v
	}
	var err error
	if v.Data, err = binary.Append(nil, binary.LittleEndian, elements); err != nil {
		panic(err)
	}
	v.Shape = []int64{int64(len(v.Data) / v.DType.Size())}
	return v
}

// leafTypes has, for each element type of a column, elements at the edges, and what they become in the dtypes that the
// type feeds. An element that is out of range is missing there: its row is refused.
var leafTypes = []struct {
	column   arrow.DataType
	elements any // a slice, or JSON
	wants    []any
}{
	{i8, []int8{-128, -1, 0, 127}, []any{[]int8{-128, -1, 0, 127}, []int16{-128, -1, 0, 127},
		[]int32{-128, -1, 0, 127}, []int64{-128, -1, 0, 127}, []uint8{0, 127}, []uint16{0, 127}, []uint32{0, 127},
		[]uint64{0, 127}, []float32{-128, -1, 0, 127}, []float64{-128, -1, 0, 127},
		[]half{0xd800, 0xbc00, 0, 0x57f0}, []bfloat{0xc300, 0xbf80, 0, 0x42fe}}},
	{i16, []int16{-1 << 15, -1, 0, 255, 256, 1<<15 - 1}, []any{
		[]int16{-1 << 15, -1, 0, 255, 256, 1<<15 - 1}, []int32{-1 << 15, -1, 0, 255, 256, 1<<15 - 1},
		[]int64{-1 << 15, -1, 0, 255, 256, 1<<15 - 1}, []uint8{0, 255}, []uint16{0, 255, 256, 1<<15 - 1},
		[]uint32{0, 255, 256, 1<<15 - 1}, []uint64{0, 255, 256, 1<<15 - 1},
		[]float32{-1 << 15, -1, 0, 255, 256, 1<<15 - 1}, []float64{-1 << 15, -1, 0, 255, 256, 1<<15 - 1}}},
	{i32, []int32{-1 << 31, -1, 0, 255, 256, 65535, 65536, 1<<31 - 1}, []any{
		[]int32{-1 << 31, -1, 0, 255, 256, 65535, 65536, 1<<31 - 1},
		[]int64{-1 << 31, -1, 0, 255, 256, 65535, 65536, 1<<31 - 1}, []uint8{0, 255}, []uint16{0, 255, 256, 65535},
		[]uint32{0, 255, 256, 65535, 65536, 1<<31 - 1}, []uint64{0, 255, 256, 65535, 65536, 1<<31 - 1},
		[]float64{-1 << 31, -1, 0, 255, 256, 65535, 65536, 1<<31 - 1}}},
	{i64, []int64{-1 << 63, -1, 0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<63 - 1}, []any{
		[]int64{-1 << 63, -1, 0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<63 - 1}, []uint8{0, 255},
		[]uint16{0, 255, 256, 65535}, []uint32{0, 255, 256, 65535, 65536, 1<<32 - 1},
		[]uint64{0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<63 - 1}}},
	{u8, []uint8{0, 127, 128, 255}, []any{[]uint8{0, 127, 128, 255},
		[]uint16{0, 127, 128, 255}, []uint32{0, 127, 128, 255}, []uint64{0, 127, 128, 255}, []int16{0, 127, 128, 255},
		[]int32{0, 127, 128, 255}, []int64{0, 127, 128, 255}, []float32{0, 127, 128, 255},
		[]float64{0, 127, 128, 255}, []half{0, 0x57f0, 0x5800, 0x5bf8}, []bfloat{0, 0x42fe, 0x4300, 0x437f}}},
	{arrow.PrimitiveTypes.Uint16, []uint16{0, 255, 256, 65535}, []any{[]uint8{0, 255}, []uint16{0, 255, 256, 65535},
		[]uint32{0, 255, 256, 65535}, []uint64{0, 255, 256, 65535}, []int32{0, 255, 256, 65535},
		[]int64{0, 255, 256, 65535}, []float32{0, 255, 256, 65535}, []float64{0, 255, 256, 65535}}},
	{arrow.PrimitiveTypes.Uint32, []uint32{0, 255, 256, 65535, 65536, 1<<32 - 1}, []any{[]uint8{0, 255},
		[]uint16{0, 255, 256, 65535}, []uint32{0, 255, 256, 65535, 65536, 1<<32 - 1},
		[]uint64{0, 255, 256, 65535, 65536, 1<<32 - 1}, []int64{0, 255, 256, 65535, 65536, 1<<32 - 1},
		[]float64{0, 255, 256, 65535, 65536, 1<<32 - 1}}},
	{arrow.PrimitiveTypes.Uint64, []uint64{0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<64 - 1}, []any{
		[]uint8{0, 255}, []uint16{0, 255, 256, 65535}, []uint32{0, 255, 256, 65535, 65536, 1<<32 - 1},
		[]uint64{0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<64 - 1}}},
	{decimal, []int128{{0, 0}, {255, 0}, {256, 0}, {65535, 0}, {65536, 0}, {1<<32 - 1, 0}, {1 << 32, 0},
		{1<<64 - 1, 0}, {0, 1}, {1<<64 - 1, 1<<64 - 1}}, []any{ // the last two are 2^64 and -1
		[]uint8{0, 255}, []uint16{0, 255, 256, 65535}, []uint32{0, 255, 256, 65535, 65536, 1<<32 - 1},
		[]uint64{0, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<64 - 1}}},
	{arrow.FixedWidthTypes.Float16, []half{0, 0x8000, 1, 0x3ff, 0x400, 0x7bff, 0x7c00, 0xfc00, 0x7e01}, []any{
		[]half{0, 0x8000, 1, 0x3ff, 0x400, 0x7bff, 0x7c00, 0xfc00, 0x7e01},
		[]float32{0, float32(minusZero), 0x1p-24, 0x3ffp-24, 0x1p-14, 65504, float32(infinite), float32(-infinite),
			math.Float32frombits(0x7fc02000)},
		[]float64{0, minusZero, 0x1p-24, 0x3ffp-24, 0x1p-14, 65504, infinite, -infinite,
			math.Float64frombits(0x7ff8040000000000)}}},
	// Ties go to the even neighbour; from 65520 a number is infinite as a float16, from 0x1.ffp127 as a bfloat16.
	{f32, []float32{0, float32(minusZero), 0x1p-149, 0x1p-24, 0x1p-25, 0x3p-25, 1 + 0x1p-11, 1 + 0x3p-11, 65519, 65520,
		0x1.fep127, -0x1.ffp127, math.MaxFloat32, float32(infinite), float32(-infinite), nan}, []any{
		[]float32{0, float32(minusZero), 0x1p-149, 0x1p-24, 0x1p-25, 0x3p-25, 1 + 0x1p-11, 1 + 0x3p-11, 65519, 65520,
			0x1.fep127, -0x1.ffp127, math.MaxFloat32, float32(infinite), float32(-infinite), nan},
		[]float64{0, minusZero, 0x1p-149, 0x1p-24, 0x1p-25, 0x3p-25, 1 + 0x1p-11, 1 + 0x3p-11, 65519, 65520,
			0x1.fep127, -0x1.ffp127, math.MaxFloat32, infinite, -infinite, math.Float64frombits(0x7ff8000020000000)},
		[]half{0, 0x8000, 0, 1, 0, 2, 0x3c00, 0x3c02, 0x7bff, 0x7c00, 0xfc00, 0x7e00},
		[]bfloat{0, 0x8000, 0, 0x3380, 0x3300, 0x33c0, 0x3f80, 0x3f80, 0x4780, 0x4780, 0x7f7f, 0x7f80, 0xff80,
			0x7fc0}}},
	{f64, []float64{0, minusZero, 5e-324, 0x1p-149, 0x1p-150, math.MaxFloat32, 0x1.ffffffp127, -math.MaxFloat64,
		infinite, math.Float64frombits(0x7ff8000020000000)}, []any{
		[]float64{0, minusZero, 5e-324, 0x1p-149, 0x1p-150, math.MaxFloat32, 0x1.ffffffp127, -math.MaxFloat64, infinite,
			math.Float64frombits(0x7ff8000020000000)},
		[]float32{0, float32(minusZero), 0, 0x1p-149, 0, math.MaxFloat32, float32(infinite), float32(-infinite),
			float32(infinite), nan}}},
	{boolean, `true,false,true,true`, []any{[]bool{true, false, true, true}}},
	{str, `"","ß\u0000"`, []any{[]string{"", "ß\x00"}}},
	{arrow.BinaryTypes.LargeString, `"","ß"`, []any{[]string{"", "ß"}}},
	{arrow.BinaryTypes.StringView, `"","longer than 12 bytes"`, []any{[]string{"", "longer than 12 bytes"}}},
	{blob, blobs("", "\xff\x00"), []any{[]string{"", "\xff\x00"}}},
	{arrow.BinaryTypes.BinaryView, blobs("", "\xff longer than 12"), []any{[]string{"", "\xff longer than 12"}}},
	{&arrow.FixedSizeBinaryType{ByteWidth: 3}, blobs("abc", "\x00\xff\x00"), []any{[]string{"abc", "\x00\xff\x00"}}},
}

func list(t arrow.DataType) arrow.DataType { return arrow.ListOf(t) }

// words returns the type of a dictionary.
func words(index, value arrow.DataType) arrow.DataType {
	return &arrow.DictionaryType{IndexType: index, ValueType: value}
}

// blobs returns binary cells as JSON; "null" is a null.
func blobs(cells ...string) string {
	for i, cell := range cells {
		if cell != "null" {
			cells[i] = strconv.Quote(base64.StdEncoding.EncodeToString([]byte(cell)))
		}
	}
	return strings.Join(cells, ",")
}

// column returns an array of the elements of a slice, or of the JSON values of a text.
func column(t *testing.T, mem memory.Allocator, dtype arrow.DataType, elements any) arrow.Array {
	t.Helper()
	text, ok := elements.(string)
	if !ok {
		data, err := binary.Append(nil, binary.LittleEndian, elements)
		if err != nil {
			t.Fatal(err)
		}
		n := len(data) / dtype.(arrow.FixedWidthDataType).Bytes()
		return fixedArray(dtype, n, nil, data, 0)
	}
	column, _, err := array.FromJSON(mem, dtype, strings.NewReader("["+text+"]"), array.WithUseNumber())
	if err != nil {
		t.Fatal(err)
	}
	return column
}

// record returns a record batch of one column from JSON.
func record(t *testing.T, mem memory.Allocator, name string, dtype arrow.DataType, rows string) arrow.Record {
	t.Helper()
	return one(name, column(t, mem, dtype, rows))
}

// dirty is an allocator whose memory is not zeroed, like offheap's.
type dirty struct{ *memory.GoAllocator }

func (d dirty) Allocate(size int) []byte { return bytes.Repeat([]byte{0xa5}, size) }

// checkedMemory returns such an allocator; the test fails unless all of its memory is given back.
func checkedMemory(t *testing.T) *memory.CheckedAllocator {
	mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
	t.Cleanup(func() { mem.AssertSize(t, 0) })
	return mem
}

// feed makes the tensors of a record batch of one column, without the rows of skip, and says which rows are in them.
func feed(t *testing.T, mem memory.Allocator, rec arrow.Record, input savedmodel.Spec, entry protocol.Input,
	skip ...int) (*Rows, []Feed, error) {
	t.Helper()
	binding := bindOne(t, input, entry, rec.Schema().Field(0))
	if err := binding.Check(rec); err != nil {
		t.Fatal(err)
	}
	rows := NewRows(int(rec.NumRows()))
	binding.Nulls(rec, rows, false)
	for _, row := range skip {
		rows.Null(row)
	}
	feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
	return rows, feeds, err
}

// TestElements converts edge values to each dtype that a type feeds; to the others, it is refused.
func TestElements(t *testing.T) {
	for _, c := range leafTypes {
		fed := map[savedmodel.DType]any{}
		for _, want := range c.wants {
			fed[tensorOf(want).DType] = want
		}
		mem := checkedMemory(t)
		rec := one("c", column(t, mem, c.column, c.elements))
		for _, dtype := range outDTypes {
			input := spec("x", dtype, -1)
			if fed[dtype] == nil {
				_, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{input}}, rec.Schema())
				expect.Fault(t, err, fault.BadRequest, `"x" `+dtype.String(), c.column.Name())
				continue
			}
			nothing := record(t, mem, "c", c.column, "")
			if err := bindOne(t, input, protocol.Input{}, rec.Schema().Field(0)).Check(nothing); err != nil {
				t.Errorf("no rows of %s: %v", c.column, err)
			}
			nothing.Release()
			rows, feeds, err := feed(t, mem, rec, input, protocol.Input{})
			if err != nil {
				t.Fatalf("%s to %s: %v", c.column, dtype, err)
			}
			if want := tensorOf(fed[dtype]); !sameValue(feeds[0].Value, want) || int64(rows.Kept()) != want.Rows() {
				t.Errorf("%s to %s: %v %x %q, want %x", c.column, dtype, feeds[0].Value.Shape, feeds[0].Value.Data,
					feeds[0].Value.Strings, want.Data)
			}
			ReleaseFeeds(feeds)
		}
		rec.Release()
	}
}

// sameValue compares two values, floats by their bits.
func sameValue(a, b Value) bool {
	return a.DType == b.DType && slices.Equal(a.Shape, b.Shape) && bytes.Equal(a.Data, b.Data) &&
		slices.EqualFunc(a.Strings, b.Strings, bytes.Equal)
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

func spec(name string, dtype savedmodel.DType, shape ...int64) savedmodel.Spec {
	return savedmodel.Spec{Name: name, Tensor: name + ":0", DType: dtype, Shape: shape}
}

// newPlan makes the plan of a signature, which specs reads.
func newPlan(t *testing.T, inputs, outputs string, options Options) *Plan {
	t.Helper()
	plan, err := NewPlan(savedmodel.Signature{Inputs: specs(inputs), Outputs: specs(outputs)}, options)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

// specs reads tensors such as "x float32 -1 4, n int32 -1"; "?" is an unknown rank.
func specs(text string) (list []savedmodel.Spec) {
	for one := range strings.SplitSeq(text, ", ") {
		words := strings.Fields(one)
		if len(words) == 0 {
			continue
		}
		s := spec(words[0], 0)
		for dtype := range savedmodel.DType(64) {
			if dtype.String() == words[1] {
				s.DType = dtype
			}
		}
		for _, word := range words[2:] {
			d, err := strconv.ParseInt(word, 10, 64)
			if s.UnknownRank = err != nil; err == nil {
				s.Shape = append(s.Shape, d)
			}
		}
		list = append(list, s)
	}
	return list
}

// TestLists makes tensors of lists of all kinds, padded ones, dictionaries and raw cells: of whole columns, of slices
// of longer ones, and without the first row that has no null.
func TestLists(t *testing.T) {
	type dims []int64
	null := list(arrow.Null)
	for name, c := range map[string]struct {
		column arrow.DataType
		rows   string // with null at any depth: left out
		input  string
		entry  string // "raw", or what to pad with
		shape  dims   // of a row
		want   any
	}{
		"numbers":     {i32, `1,null,3`, "int32 -1", "", nil, []int32{1, 3}},
		"bools":       {boolean, `true,null,false,true`, "bool -1", "", nil, []bool{true, false, true}},
		"texts":       {str, `"a",null,"ß"`, "string -1", "", nil, []string{"a", "ß"}},
		"lists":       {list(i32), `[1,2],null,[3,4],[null,5]`, "int32 -1 2", "", dims{2}, []int32{1, 2, 3, 4}},
		"large lists": {arrow.LargeListOf(i8), `[1,2],[3,4]`, "int8 -1 -1", "", dims{2}, []int8{1, 2, 3, 4}},
		"list views":  {arrow.ListViewOf(f32), `[1],null,[2]`, "float32 -1 1", "", dims{1}, []float32{1, 2}},
		"large views": {arrow.LargeListViewOf(str), `["a"],["b"]`, "string -1 1", "", dims{1}, []string{"a", "b"}},
		"fixed size": {arrow.FixedSizeListOf(2, i8), `[1,2],null,[3,4]`, "int8 -1 -1", "", dims{2},
			[]int8{1, 2, 3, 4}},
		"bools inside": {list(boolean), `[true,false],[false,true]`, "bool -1 2", "", dims{2},
			[]bool{true, false, false, true}},
		"converted":    {list(f64), `[1],[2]`, "float32 -1 1", "", dims{1}, []float32{1, 2}},
		"unknown rank": {list(list(i8)), `[[1],[2]],[[3],[4]]`, "int8 ?", "", dims{2, 1}, []int8{1, 2, 3, 4}},
		"null anywhere": {list(list(i8)), `[[1]],[null],null,[[null]],[[2]]`, "int8 -1 1 1", "", dims{1, 1},
			[]int8{1, 2}},
		"3 levels": {list(arrow.LargeListOf(arrow.FixedSizeListOf(2, i8))), `[[[1,2]],[[3,4]]],[[[5,6]],[[7,8]]]`,
			"int8 -1 -1 1 2", "", dims{2, 1, 2}, []int8{1, 2, 3, 4, 5, 6, 7, 8}},
		"empty":         {list(i64), `[],[]`, "uint8 -1 -1", "", dims{0}, []uint8{}},
		"empty inside":  {list(list(f32)), `[[],[]],[[],[]]`, "float32 -1 -1 -1", "", dims{2, 0}, []float32{}},
		"empty outside": {list(list(f32)), `[],[]`, "float32 -1 -1 3", "", dims{0, 3}, []float32{}},
		"padded":        {list(i8), `[1],[],[2,3,4]`, "int8 -1 -1", "7", dims{3}, []int8{1, 7, 7, 7, 7, 7, 2, 3, 4}},
		"padded size": {list(f32), `[1],[],[2,2]`, "float16 -1 2", "0.1", dims{2},
			[]half{0x3c00, 0x2e66, 0x2e66, 0x2e66, 0x4000, 0x4000}},
		"padded twice": {list(list(i16)), `[[1],[2,3]],[[]],[[4],[],[5,6]]`, "uint8 -1 -1 -1", "9", dims{3, 2},
			[]uint8{1, 9, 2, 3, 9, 9, 9, 9, 9, 9, 9, 9, 4, 9, 9, 9, 5, 6}},
		"padded int64": {list(i64), `[9223372036854775807],[]`, "int64 -1 1", "-9223372036854775808", dims{1},
			[]int64{1<<63 - 1, -1 << 63}},
		"padded uint64": {list(decimal), `["1"],[]`, "uint64 -1 1", "18446744073709551615", dims{1},
			[]uint64{1, 1<<64 - 1}},
		"padded bfloat": {list(f32), `[1],[]`, "bfloat16 -1 1", "1.00390625", dims{1}, []bfloat{0x3f80, 0x3f80}},
		"padded double": {list(f64), `[1],[]`, "float64 -1 1", "0.1", dims{1}, []float64{1, 0.1}},
		"padded bools":  {list(boolean), `[false],[]`, "bool -1 1", "true", dims{1}, []bool{false, true}},
		"padded texts":  {list(str), `["a"],["b","c"]`, "string -1 2", `"p"`, dims{2}, []string{"a", "p", "b", "c"}},
		"words":         {words(i8, i32), `3,1,null,3`, "int64 -1", "", nil, []int64{3, 1, 3}},
		"words cast":    {list(words(i8, i64)), `[1,2],[255,2]`, "uint8 -1 2", "", dims{2}, []uint8{1, 2, 255, 2}},
		"words inside": {list(words(i32, str)), `["a","b"],[null,"a"],["b","a"]`, "string -1 2", "", dims{2},
			[]string{"a", "b", "b", "a"}},
		"words padded": {arrow.ListViewOf(words(i64, i8)), `[1],[],[1,2]`, "int8 -1 2", "7", dims{2},
			[]int8{1, 7, 7, 7, 1, 2}},
		"raw": {blob, blobs("\x01\x00\x02\x00", "null", "\x03\x00\x04\x00"), "int16 -1 2 1", "raw", dims{2, 1},
			[]int16{1, 2, 3, 4}},
		"raw large": {arrow.BinaryTypes.LargeBinary, blobs("\xff", "\x00"), "uint8 -1 1", "raw", dims{1},
			[]uint8{255, 0}},
		"raw views": {arrow.BinaryTypes.BinaryView, blobs("\x00\x01", "\x01\x00"), "bool -1 2", "raw", dims{2},
			[]bool{false, true, true, false}},
		"raw fixed": {&arrow.FixedSizeBinaryType{ByteWidth: 2}, blobs("\x80\x3f", "null", "\xc1\x7f"), "bfloat16 -1 1",
			"raw", dims{1}, []bfloat{0x3f80, 0x7fc1}},
		"nulls":         {null, `[],[null],[]`, "float32 -1 -1", "", dims{0}, []float32{}},
		"nulls, deeper": {null, `[],[null],[]`, "string -1 -1 -1", "", dims{0, 0}, []string{}},
		"nulls, padded": {null, `[],[null],[]`, "uint8 -1 2", "5", dims{2}, []uint8{5, 5, 5, 5}},
		"nulls, text":   {null, `[],[null],[]`, "string -1 1 2", `"5"`, dims{1, 2}, []string{"5", "5", "5", "5"}},
		"nulls, bools":  {null, `[],[null],[]`, "bool -1 2 1", "true", dims{2, 1}, []bool{true, true, true, true}},
	} {
		t.Run(name, func(t *testing.T) {
			mem := checkedMemory(t)
			whole := record(t, mem, "c", c.column, c.rows)
			long := record(t, mem, "c", c.column, c.rows+","+c.rows+","+c.rows)
			slice := long.NewSlice(whole.NumRows(), 2*whole.NumRows())
			want, input, entry := tensorOf(c.want), specs("x " + c.input)[0], protocol.Input{Pad: []byte(c.entry)}
			if c.entry == "raw" {
				entry = protocol.Input{Encoding: c.entry}
			} else if c.entry == "" {
				entry.Pad = nil
			}
			for way, rec := range map[string]arrow.Record{"whole": whole, "slice": slice} {
				rows, feeds, err := feed(t, mem, rec, input, entry)
				if err != nil {
					t.Fatal(way, err)
				}
				kept := rows.Positions()
				want.Shape = append([]int64{int64(len(kept))}, c.shape...)
				_, less, err := feed(t, mem, rec, input, entry, kept[0])
				if err != nil {
					t.Fatal(way, err)
				}
				var others []int
				for i := 1; i < len(kept); i++ {
					others = append(others, i)
				}
				for got, want := range map[*Value]Value{&feeds[0].Value: want, &less[0].Value: want.Take(others, mem)} {
					if !sameValue(*got, want) {
						t.Errorf("%s: %v %v %q, want %v %v", way, got.Shape, got.Data, got.Strings, want.Shape,
							want.Data)
					}
					want.Release()
				}
				ReleaseFeeds(feeds)
				ReleaseFeeds(less)
			}
			for _, rec := range []arrow.Record{whole, long, slice} {
				rec.Release()
			}
		})
	}
}

// TestDictionaries has dictionaries of all types of indices and values, with nulls in both.
func TestDictionaries(t *testing.T) {
	for _, index := range []arrow.DataType{i8, i16, i32, i64, u8, arrow.PrimitiveTypes.Uint16,
		arrow.PrimitiveTypes.Uint32, arrow.PrimitiveTypes.Uint64} {
		for _, c := range []struct {
			value arrow.DataType
			words string
			want  any
		}{
			{i64, "7,null,255", []uint8{255, 7}}, {decimal, `"7",null,"255"`, []uint16{255, 7}},
			{f32, "7,null,-1", []half{0xbc00, 0x4700}}, {boolean, "true,null,false", []bool{false, true}},
			{arrow.FixedWidthTypes.Float16, "7,null,-1", []float32{-1, 7}}, {f64, "7,null,0.5", []float64{0.5, 7}},
			{str, `"b",null,"a"`, []string{"a", "b"}}, {arrow.BinaryTypes.StringView, `"b",null,"a"`,
				[]string{"a", "b"}},
			{blob, blobs("b", "null", "a"), []string{"a", "b"}},
		} {
			mem := checkedMemory(t)
			indices, values := column(t, mem, index, "0,2,1,null,0"), column(t, mem, c.value, c.words)
			whole := one("c", array.NewDictionaryArray(words(index, c.value), indices, values))
			indices.Release()
			values.Release()
			slice := whole.NewSlice(1, 5)
			rows, feeds, err := feed(t, mem, slice, spec("x", tensorOf(c.want).DType, -1), protocol.Input{})
			if err != nil || !slices.Equal(rows.Positions(), []int{0, 3}) ||
				!sameValue(feeds[0].Value, tensorOf(c.want)) {
				t.Errorf("%s of %s: %v, %v, %v", index, c.value, rows.Positions(), feeds, err)
			}
			ReleaseFeeds(feeds)
			slice.Release()
			whole.Release()
		}
	}
}

// TestLengths gives the lengths of padded lists to an input of each dtype of whole numbers.
func TestLengths(t *testing.T) {
	for _, want := range []any{[]int8{1, 0, 3}, []int16{1, 0, 3}, []int32{1, 0, 3}, []int64{1, 0, 3}, []uint8{1, 0, 3},
		[]uint16{1, 0, 3}, []uint32{1, 0, 3}, []uint64{1, 0, 3}} {
		mem := checkedMemory(t)
		rec := record(t, mem, "c", list(list(i8)), `[[1]],null,[],[[2],[],[3]]`)
		n := tensorOf(want)
		plan := newPlan(t, "x int8 -1 -1 -1, n "+n.DType.String()+" -1", "y float32 -1",
			Options{Inputs: protocol.Inputs{
				{Tensor: "x", Column: "c", Pad: []byte("7"), Lengths: "n"}}})
		binding, err := plan.Bind(rec.Schema())
		if err != nil {
			t.Fatal(err)
		}
		rows := NewRows(4)
		binding.Nulls(rec, rows, true)
		if row, reason, _ := rows.FirstRefused(); row != 1 || reason != `column "c" is null` || rows.Refused() != 1 {
			t.Errorf("row %d of %d is refused for %q", row, rows.Refused(), reason)
		}
		feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
		if err != nil || len(feeds) != 2 || !sameValue(feeds[1].Value, n) || feeds[0].Tensor != "x:0" ||
			feeds[1].Tensor != "n:0" || fmt.Sprint(feeds[0].Value.Shape,
			feeds[0].Value.Data) != "[3 3 1] [1 7 7 7 7 7 2 7 3]" {
			t.Errorf("%s: %v, %v", n.DType, feeds, err)
		}
		ReleaseFeeds(feeds)
		rec.Release()
	}
}

func TestWholeAlignedColumnIsNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "x", list(f32), `[1,2],[3,4],[5,6]`)
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
	plan := newPlan(t, "k int64 -1, p float32 -1 1 1 3, q float32 -1 1 1 3", "y float32 -1",
		Options{Pictures: map[string]PictureTensor{"p": pixel, "q": pixel}})
	k := record(t, mem, "k", i64, "0,1,2,3,4")
	p := record(t, mem, "p", blob, blobs("a", "bad", "null", "d", "e"))
	q := record(t, mem, "q", blob, blobs("v", "w", "x", "bad", "z"))
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

// TestBindNamesColumnAndBothTypes has a column of each kind that cannot feed an input.
func TestBindNamesColumnAndBothTypes(t *testing.T) {
	date, stamp, price := arrow.PrimitiveTypes.Date32, arrow.FixedWidthTypes.Timestamp_us,
		&arrow.Decimal128Type{Precision: 10, Scale: 2}
	refused := func(input string, field arrow.Field, texts string) {
		t.Helper()
		field.Name = "c"
		_, err := bindAll(savedmodel.Signature{Inputs: specs(input)}, arrow.NewSchema([]arrow.Field{field}, nil))
		expect.Fault(t, err, fault.BadRequest, strings.Split(texts, "|")...)
	}
	for _, c := range []struct {
		input  string
		column arrow.DataType
		texts  string
	}{
		{"x float32 -1 4", list(str), `"x" float32 [?,4]|column "c"|list<item: utf8|wants elements of float32`},
		{"x int32 -1", i64, `"x" int32 [?]|column "c" of int64|wants elements of int32`},
		{"x float32 -1", i32, `"x" float32 [?]|int32|wants elements of float32`},
		{"x float16 -1", f64, "float64|wants elements of float16"},
		{"x float32 -1 4", f32, `"x" float32 [?,4]|1 level of list|column "c" is float32`},
		{"x float32 -1", list(f32), "0 levels|list<item: float32"},
		{"x float32 -1 4", arrow.FixedSizeListOf(3, f32),
			`"x" float32 [?,4]|fixed_size_list|3 elements at dimension 1`},
		{"x int32 -1", date, "date32|wants elements of int32"},
		{"x int64 -1 -1 -1", list(list(date)), "date32|wants elements of int64"},
		{"x int64 -1", stamp, "timestamp[us|wants elements of int64"},
		{"x string -1", stamp, "timestamp[us|wants elements of string"},
		{"x int64 -1", arrow.FixedWidthTypes.Time64ns, "time64|wants elements of int64"},
		{"x int64 -1", arrow.FixedWidthTypes.Duration_us, "duration|wants elements of int64"},
		{"x float64 -1", price, "decimal|wants elements of float64"},
		{"x uint64 -1", price, "decimal|wants elements of uint64"},
		{"x float32 -1 2", blob, `float32|binary|"encoding":"raw"`},
		{"x int32 -1", words(i8, i64), "dictionary|wants elements of int32"},
		{"x float32 -1 -1", arrow.MapOf(str, f32), "map<|wants elements of float32"},
		{"x float32 -1", arrow.StructOf(arrow.Field{Name: "a\x1b f", Type: f32}),
			`struct<a\x1b f|wants elements of float32`},
		{"x float32 -1", arrow.SparseUnionOf([]arrow.Field{{Name: "f", Type: f32}}, []int8{0}),
			"union|wants elements of float32"},
		{"x float32 -1", arrow.RunEndEncodedOf(i32, f32), "run_end_encoded|wants elements of float32"},
		{"x int64 -1", arrow.FixedWidthTypes.MonthInterval, "month_interval|wants elements of int64"},
		{"x string -1", &arrow.FixedSizeBinaryType{}, "fixed_size_binary[0]"},
		{"x resource -1", f32, "resource|float32|no column can feed"},
		{"x int64 -1 -1", vectorType, `"x" int64 [?,?]|column "c" of Spark vectors|send lists`},
		{"x float64 -1", vectorType, "2 dimensions|send lists"},
	} {
		refused(c.input, arrow.Field{Type: c.column}, c.texts)
	}
	for _, c := range []struct {
		input       string
		size        int32
		about, want string
	}{ // fixed-shape tensors
		{"x float32 -1 3 2", 6, `{"shape":[2,3]}`, "2 elements at dimension 1"},
		{"x float32 -1 6", 6, `{"shape":[2,3]}`, "1 level of list"},
		{"x float32 -1 3 2", 6, `{"shape":[2,4]}`, "shape [2 4]|6 elements"},
		{"x float32 -1 3 2", 6, `{"shape":[4294967296,4294967296]}`, "6 elements"},
		{"x float32 -1 2 3", 6, `{"shape":[2,3],"permutation":[1,0]}`, "permutation [1 0]"},
		{"x float32 -1 2 3", 6, `{}`, "metadata|cannot be read"},
		{"x float32 ?", 1, `{"shape":[1` + strings.Repeat(",1", MaxRank-1) + `]}`,
			`input "x"|65 dimensions|64 at most`},
	} {
		refused(c.input, arrow.Field{Type: arrow.FixedSizeListOf(c.size, f32), Metadata: arrow.NewMetadata(
			[]string{extensionName, extensionMetadata}, []string{"arrow.fixed_shape_tensor", c.about})}, c.want)
	}
	two := savedmodel.Signature{Inputs: specs("a float32 -1, b float32 -1")}
	for names, texts := range map[string]string{"az": `input "b"|column "b"|not|"a", "z"`,
		"aab": `column "a"|2 times`} {
		var fields []arrow.Field
		for _, name := range names {
			fields = append(fields, arrow.Field{Name: string(name), Type: f32})
		}
		_, err := bindAll(two, arrow.NewSchema(fields, nil))
		expect.Fault(t, err, fault.BadRequest, strings.Split(texts, "|")...)
	}
}

func TestNewPlanRefuses(t *testing.T) {
	dense := Options{Layout: protocol.LayoutTensor}
	pictures := func(name string, dims ...int64) Options {
		return Options{Pictures: map[string]PictureTensor{name: {savedmodel.Float32, append([]int64{-1}, dims...)}}}
	}
	many := strings.Repeat(" 1", MaxRank)
	mapped := func(mapping any, tensor, text string) {
		if text == "" {
			return
		}
		if text[0] != '{' {
			text = fmt.Sprintf(`{%q:{"column":"c",%s}}`, tensor, text)
		}
		if err := json.Unmarshal([]byte(text), mapping); err != nil {
			t.Error(err)
		}
	}
	for name, c := range map[string]struct {
		inputs, outputs string // "x float32 -1 4" and "y float32 -1", unless given
		in, out         string // what the mapping says of x and y besides the column, or the whole of it
		options         Options
		texts           string
	}{
		"unknown input":  {in: `{"nope":"c"}`, texts: `no input "nope"|"x" float32 [?,4]`},
		"input left out": {in: `{}`, texts: `input "x" is not mapped`},
		"unknown output": {out: `{"nope":"c"}`, texts: `no output "nope"|"y" float32 [?]`},
		"no output":      {out: `{}`, texts: "no output is requested"},
		"two outputs, one name": {outputs: "y float32 -1, z int64 -1", out: `{"y":"c","z":"c"}`,
			texts: `"c"|error_column`},
		"error column in use": {options: Options{ErrorColumn: "y"}, texts: `"y"|error_column`},
		"output not per row":  {outputs: "y float32", texts: `output "y"|float32|first dimension must be the batch`},
		"output of no rank": {outputs: "y float32 ?",
			texts: `output "y"|unknown rank|"outputs":{"y":{"column":"y","shape":[-1,-1]}}`},
		"output of no type":    {outputs: "y dtype(8) -1", texts: `output "y"|dtype(8)`},
		"no input":             {inputs: " ", texts: "no input"},
		"input without batch":  {inputs: "x float32", texts: `"x" float32 []|no batch dimension`},
		"input of fixed batch": {inputs: "x float32 8 4", texts: `"x" float32 [8,4]|no batch dimension`},
		"encoding":             {in: `"encoding":"base64"`, texts: `input "x"|"base64"|"raw"`},
		"raw strings": {inputs: "x string -1 4", in: `"encoding":"raw"`,
			texts: `"x" string [?,4]|no fixed size`},
		"raw of open shape": {inputs: "x float32 -1 4 -1", in: `"encoding":"raw"`,
			texts: `"x" float32 [?,4,?]|must be known`},
		"raw with pad":  {in: `"encoding":"raw","pad":0`, texts: "leave pad and lengths out"},
		"pad of rank 1": {inputs: "x float32 -1", in: `"pad":0`, texts: `"x" float32 [?]|cannot have pad`},
		"pad of text":   {in: `"pad":"0"`, texts: `"x" float32 [?,4]|a number for float32`},
		"pad of null": {options: Options{Inputs: protocol.Inputs{{Tensor: "x", Column: "c",
			Pad: []byte("null")}}}, texts: "a number for float32"},
		"pad of list":       {in: `"pad":[0]`, texts: "a number for float32"},
		"pad too large":     {inputs: "x int8 -1 4", in: `"pad":128`, texts: "from -128 to 127|int8"},
		"pad negative":      {inputs: "x uint8 -1 4", in: `"pad":-1`, texts: "0 to 255"},
		"pad infinite":      {inputs: "x float16 -1 4", in: `"pad":65520`, texts: "in range for float16"},
		"pad for bool":      {inputs: "x bool -1 4", in: `"pad":0`, texts: "true or false for bool"},
		"pad for text":      {inputs: "x string -1 4", in: `"pad":0`, texts: "a string for string"},
		"lengths of nobody": {in: `"lengths":"n"`, texts: `no input "n"`},
		"lengths of itself": {in: `"lengths":"x"`, texts: `input "x" is fed twice`},
		"lengths in floats": {inputs: "n float32 -1, x float32 -1 4", in: `"lengths":"n"`,
			texts: `"n" float32 [?]|whole numbers of rank 1`},
		"lengths in lists": {inputs: "n int32 -1 -1, x float32 -1 4", in: `"lengths":"n"`,
			texts: `"n" int32 [?,?]|rank 1`},
		"picture with pad": {inputs: "x float32 -1 8 8 3", in: `"pad":0`, options: pictures("x", 8, 8, 3),
			texts: "preprocess|pad"},
		"output of fixed batch": {outputs: "y float32 3 4", texts: `"y" float32 [3,4]|must be the batch`},
		"output of type int":    {out: `"type":"int"`, texts: `"int"|"utf8"`},
		"numbers as utf8":       {out: `"type":"utf8"`, texts: `"y" float32 [?]|strings`},
		"shape without batch":   {out: `"shape":[3]`, texts: "[3]|-1 for the rows"},
		"shape of other rank":   {out: `"shape":[-1, 3]`, texts: `"y" float32 [?]|[?,3]`},
		"shape of other size":   {outputs: "y float32 -1 4", out: `"shape":[-1, 3]`, texts: `"y" float32 [?,4]|[?,3]`},
		"open tensor": {outputs: "y float32 -1 4 -1", options: dense,
			texts: `"y" float32 [?,4,?]|"outputs":{"y":{"column":"y","shape":[-1,4,SIZE]}}`},
		"empty tensor":              {outputs: "y float32 -1 0", options: dense, texts: "from 1 to"},
		"huge tensor":               {outputs: "y float32 -1 1048576 1048576", options: dense, texts: "from 1 to"},
		"input of many dimensions":  {inputs: "x float32 -1" + many, texts: `input "x" has 65 dimensions|64 at most`},
		"output of many dimensions": {outputs: "y float32 -1" + many, texts: `output "y" has 65 dimensions|64 at most`},
		"shape of many dimensions": {outputs: "y float32 ?",
			out:   `"shape":[-1` + strings.ReplaceAll(many, " ", ",") + `]`,
			texts: `output "y" has 65 dimensions|64 at most`},
		"unknown picture":       {options: pictures("nope", 1, 1, 3), texts: `no input "nope"`},
		"picture of wrong rank": {options: pictures("x", 1, 1, 3), texts: `makes float32 [?,1,1,3]|"x" float32 [?,4]`},
		"picture of wrong size": {inputs: "x float32 -1 8 8 3", options: pictures("x", 1, 1, 3),
			texts: `makes float32 [?,1,1,3]|"x" float32 [?,8,8,3]`},
		"picture of wrong type": {inputs: "x uint8 -1 1 1 3", options: pictures("x", 1, 1, 3),
			texts: `makes float32 [?,1,1,3]|"x" uint8 [?,1,1,3]`},
	} {
		t.Run(name, func(t *testing.T) {
			signature := savedmodel.Signature{Inputs: specs(cmp.Or(c.inputs, "x float32 -1 4")),
				Outputs: specs(cmp.Or(c.outputs, "y float32 -1"))}
			mapped(&c.options.Inputs, "x", c.in)
			mapped(&c.options.Outputs, "y", c.out)
			_, err := NewPlan(signature, c.options)
			expect.Fault(t, err, fault.BadRequest, strings.Split(c.texts, "|")...)
		})
	}
	plan := newPlan(t, "p float32 -1 8 8 3", "y float32 -1", pictures("p", 8, 8, 3))
	for _, c := range []struct {
		column arrow.DataType
		texts  string
	}{
		{str, `input "p"|binary|column "c" is utf8`},
		{arrow.StructOf(arrow.Field{Name: "height", Type: i32}), `input "p"|Spark's image struct|column "c" is struct`},
		{arrow.StructOf(imageFields("height", i64)...), `input "p"|Spark's image struct|column "c" is struct`},
		{arrow.StructOf(imageFields("data", str)...), `input "p"|Spark's image struct|column "c" is struct`},
	} {
		_, err := plan.Bind(arrow.NewSchema([]arrow.Field{{Name: "c", Type: c.column}}, nil))
		expect.Fault(t, err, fault.BadRequest, strings.Split(c.texts, "|")...)
	}
}

// TestValuesRefuse has a bad row or batch of each kind: a row leaves with a reason and the others stay; a batch is a
// fault.
func TestValuesRefuse(t *testing.T) {
	plain, pad, raw := protocol.Input{}, protocol.Input{Pad: []byte("0")}, protocol.Input{Encoding: "raw"}
	long := "[" + strings.Repeat("1,", 1<<15-1) + "1]" + strings.Repeat(",[]", 1<<14-1)
	for name, c := range map[string]struct {
		input   string
		entry   protocol.Input
		column  arrow.DataType
		rows    string
		refused map[int]string
		kind    fault.Kind
		fault   string
	}{
		"wrong length": {"x float32 -1 2", plain, list(f32), `[1,2],[1],[]`, map[int]string{
			1: "a list of 1 elements at dimension 1, want 2", 2: "a list of 0 elements at dimension 1, want 2"}, 0, ""},
		"inner length": {"x float32 -1 1 2", plain, list(list(f32)), `[[1,2]],[[1]]`,
			map[int]string{1: "a list of 1 elements at dimension 2, want 2"}, 0, ""},
		"too long to pad": {"x float32 -1 2", pad, list(f32), `[1,2,3],[1]`,
			map[int]string{0: "a list of 3 elements at dimension 1, want 2 at most"}, 0, ""},
		"out of range": {"x uint8 -1", plain, i64, `255,256,-1`, map[int]string{
			1: "a value is outside uint8, 0 to 255", 2: "a value is outside uint8, 0 to 255"}, 0, ""},
		"word out of range": {"x uint8 -1 1", plain, list(words(i8, i64)), `[1],[256]`,
			map[int]string{1: "a value is outside uint8, 0 to 255"}, 0, ""},
		"decimal out of range": {"x uint64 -1", plain, decimal, `"18446744073709551615","18446744073709551616"`,
			map[int]string{1: "a value is outside uint64, 0 to 18446744073709551615"}, 0, ""},
		"uint64 out of range": {"x uint32 -1", plain, arrow.PrimitiveTypes.Uint64, "4294967295,4294967296",
			map[int]string{1: "a value is outside uint32, 0 to 4294967295"}, 0, ""},
		"int32 out of range": {"x uint16 -1", plain, i32, "65535,65536",
			map[int]string{1: "a value is outside uint16, 0 to 65535"}, 0, ""},
		"bfloat overflows": {"x bfloat16 -1", plain, f32, `1,3.4028234e38,"-Inf"`,
			map[int]string{1: "a value is outside bfloat16, -3.39e38 to 3.39e38"}, 0, ""},
		"half overflows": {"x float16 -1", plain, f32, `65519,65520,"Inf"`,
			map[int]string{1: "a value is outside float16, -65504 to 65504"}, 0, ""},
		"raw size": {"x float32 -1 2", raw, blob, blobs("12345678", "1234", ""),
			map[int]string{1: "a raw cell of 4 bytes, want 8", 2: "a raw cell of 0 bytes, want 8"}, 0, ""},
		"raw bool": {"x bool -1 2", raw, blob, blobs("\x00\x01", "\x00\x02"),
			map[int]string{1: "a raw bool is a byte other than 0 and 1"}, 0, ""},
		"all rows": {"x float32 -1 2", plain, list(f32), `[1]`,
			map[int]string{0: "a list of 1 elements at dimension 1, want 2"}, 0, ""},
		"too long to count": {"x int8 -1 -1, n int8 -1", protocol.Input{Lengths: "n"}, list(i8),
			`[0],[0` + strings.Repeat(",0", 127) + `]`,
			map[int]string{1: "a list of 128 elements, more than the input of lengths can count"}, 0, ""},

		"ragged lists": {"x float32 -1 -1", plain, list(f32), `[1],[1,2]`, nil, fault.BadRequest,
			`"x" float32 [?,?]|column "c"|lists of 1 and of 2 elements|dimension 1|"pad"`},
		"padding is huge": {"x float32 -1 -1", pad, list(f32), long, nil, fault.Exhausted,
			`"x" float32 [?,?]|column "c"|1024 MiB|fewer rows`},
		"raw not binary": {"x float32 -1 2", raw, str, ``, nil, fault.BadRequest,
			`"x" float32 [?,2]|binary column|column "c" is utf8`},
		"raw fixed size": {"x float32 -1 2", raw, &arrow.FixedSizeBinaryType{ByteWidth: 4}, ``, nil, fault.BadRequest,
			"8 bytes|fixed_size_binary[4]"},
	} {
		t.Run(name, func(t *testing.T) {
			mem := checkedMemory(t)
			rec := record(t, mem, "c", c.column, c.rows)
			defer rec.Release()
			c.entry.Tensor, c.entry.Column = "x", "c"
			binding, err := newPlan(t, c.input, "y float32 -1",
				Options{Inputs: protocol.Inputs{c.entry}}).Bind(rec.Schema())
			rows := NewRows(int(rec.NumRows()))
			if err == nil {
				var feeds []Feed
				feeds, err = binding.Values(t.Context(), rec, rows, nil, mem)
				if err == nil && (len(feeds) > 0) != (rows.Kept() > 0) {
					t.Errorf("%d feeds of %d rows", len(feeds), rows.Kept())
				}
				for _, feed := range feeds {
					if feed.Value.Rows() != int64(rows.Kept()) {
						t.Errorf("%d rows of %d kept", feed.Value.Rows(), rows.Kept())
					}
				}
				ReleaseFeeds(feeds)
			}
			if c.fault != "" {
				expect.Fault(t, err, c.kind, strings.Split(c.fault, "|")...)
			} else if err != nil {
				t.Error(err)
			}
			for row := range rows.Len() {
				want, bad := c.refused[row]
				if reason, ok := rows.reason(row); ok != bad || bad && reason != `column "c": `+want {
					t.Errorf("row %d is refused for %q, want %q", row, reason, want)
				}
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
