package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/float16"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// The oracle works on plain Go values, a row at a time: nil is a null, []any a list, and an element is an
// int64, a float64, a bool or a string.

// leafTypes lists, for each element type of a column, the tensor types that it feeds.
var leafTypes = map[arrow.DataType][]savedmodel.DType{
	arrow.PrimitiveTypes.Int8:        {savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64, savedmodel.Float32, savedmodel.Float64},
	arrow.PrimitiveTypes.Int16:       {savedmodel.Int16, savedmodel.Int32, savedmodel.Int64, savedmodel.Float32, savedmodel.Float64},
	arrow.PrimitiveTypes.Int32:       {savedmodel.Int32, savedmodel.Int64, savedmodel.Float64},
	arrow.PrimitiveTypes.Int64:       {savedmodel.Int64},
	arrow.PrimitiveTypes.Uint8:       {savedmodel.Uint8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64, savedmodel.Float32, savedmodel.Float64},
	arrow.PrimitiveTypes.Uint16:      {savedmodel.Uint16, savedmodel.Int32, savedmodel.Int64, savedmodel.Float32, savedmodel.Float64},
	arrow.PrimitiveTypes.Uint32:      {savedmodel.Uint32, savedmodel.Int64, savedmodel.Float64},
	arrow.PrimitiveTypes.Uint64:      {savedmodel.Uint64},
	arrow.FixedWidthTypes.Float16:    {savedmodel.Float16},
	arrow.PrimitiveTypes.Float32:     {savedmodel.Float32, savedmodel.Float64},
	arrow.PrimitiveTypes.Float64:     {savedmodel.Float64, savedmodel.Float32},
	arrow.FixedWidthTypes.Boolean:    {savedmodel.Bool},
	arrow.BinaryTypes.String:         {savedmodel.String},
	arrow.BinaryTypes.LargeString:    {savedmodel.String},
	arrow.BinaryTypes.Binary:         {savedmodel.String},
	arrow.BinaryTypes.LargeBinary:    {savedmodel.String},
	arrow.PrimitiveTypes.Date32:      nil,
	arrow.FixedWidthTypes.Duration_s: nil,
}

// leaves are the keys of leafTypes in a fixed order, so that a seed means one case.
var leaves = func() []arrow.DataType {
	var list []arrow.DataType
	for leaf, dtypes := range leafTypes {
		if dtypes != nil {
			list = append(list, leaf)
		}
	}
	slices.SortFunc(list, func(a, b arrow.DataType) int { return strings.Compare(a.String(), b.String()) })
	return list
}()

// level is one list around the elements of a column.
type level struct {
	kind int // 0 list, 1 large list, 2 fixed-size list
	size int // of every row that takes part
}

func (l level) around(t arrow.DataType) arrow.DataType {
	switch l.kind {
	case 0:
		return arrow.ListOf(t)
	case 1:
		return arrow.LargeListOf(t)
	}
	return arrow.FixedSizeListOf(int32(l.size), t)
}

// element draws one element that the type can hold exactly.
func element(r *rand.Rand, leaf arrow.DataType) any {
	switch leaf.ID() {
	case arrow.BOOL:
		return r.IntN(2) == 1
	case arrow.STRING, arrow.LARGE_STRING, arrow.BINARY, arrow.LARGE_BINARY:
		return strings.Repeat("ß", r.IntN(4)) + fmt.Sprint(r.IntN(100))
	case arrow.FLOAT16:
		return float64(r.IntN(2048)) / 8
	case arrow.FLOAT32:
		return float64(math.Float32frombits(uint32(r.Uint32()&0x7effffff) | uint32(r.IntN(2))<<31))
	case arrow.FLOAT64:
		return (r.Float64() - 0.5) * 1e6
	}
	bits := leaf.(arrow.FixedWidthDataType).BitWidth()
	if strings.HasPrefix(leaf.Name(), "uint") {
		return int64(r.Uint64() >> max(64-bits, 1))
	}
	return int64(r.Uint64()) >> (64 - bits)
}

// value draws one row below the given levels. A row that is not regular may hold nulls, and lists of any length.
func value(r *rand.Rand, levels []level, leaf arrow.DataType, regular bool) any {
	if !regular && r.IntN(4) == 0 {
		return nil
	}
	if len(levels) == 0 {
		return element(r, leaf)
	}
	size := levels[0].size
	if !regular && levels[0].kind != 2 {
		size = r.IntN(4)
	}
	list := make([]any, size)
	for i := range list {
		list[i] = value(r, levels[1:], leaf, regular)
	}
	return list
}

// dirty is an allocator whose memory is not zeroed, as that of offheap.
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

func hasNull(v any) bool {
	list, isList := v.([]any)
	return v == nil || isList && slices.ContainsFunc(list, hasNull)
}

func appendValue(b array.Builder, v any) {
	if v == nil {
		b.AppendNull()
		return
	}
	if list, ok := v.([]any); ok {
		lists := b.(array.ListLikeBuilder)
		lists.Append(true)
		for _, e := range list {
			appendValue(lists.ValueBuilder(), e)
		}
		return
	}
	switch b := b.(type) {
	case *array.Int8Builder:
		b.Append(int8(v.(int64)))
	case *array.Int16Builder:
		b.Append(int16(v.(int64)))
	case *array.Int32Builder:
		b.Append(int32(v.(int64)))
	case *array.Int64Builder:
		b.Append(v.(int64))
	case *array.Uint8Builder:
		b.Append(uint8(v.(int64)))
	case *array.Uint16Builder:
		b.Append(uint16(v.(int64)))
	case *array.Uint32Builder:
		b.Append(uint32(v.(int64)))
	case *array.Uint64Builder:
		b.Append(uint64(v.(int64)))
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
	default:
		panic(fmt.Sprintf("no way to append to %T", b))
	}
}

// appendTensor appends the elements of a row as a tensor of dtype holds them.
func appendTensor(data []byte, texts [][]byte, v any, dtype savedmodel.DType) ([]byte, [][]byte) {
	if list, ok := v.([]any); ok {
		for _, e := range list {
			data, texts = appendTensor(data, texts, e, dtype)
		}
		return data, texts
	}
	switch v := v.(type) {
	case string:
		return data, append(texts, []byte(v))
	case bool:
		if v {
			return append(data, 1), texts
		}
		return append(data, 0), texts
	}
	number, isInt := v.(int64)
	float, _ := v.(float64)
	if isInt {
		float = float64(number)
	}
	le := binary.LittleEndian
	switch dtype {
	case savedmodel.Float16:
		data = le.AppendUint16(data, float16.New(float32(float)).Uint16())
	case savedmodel.Float32:
		data = le.AppendUint32(data, math.Float32bits(float32(float)))
	case savedmodel.Float64:
		data = le.AppendUint64(data, math.Float64bits(float))
	default:
		data = append(data, le.AppendUint64(nil, uint64(number))[:dtype.Size()]...)
	}
	return data, texts
}

// TestValuesAgreeWithRows compares Values on random columns, types, slices, nulls and selections with an oracle that
// walks the rows one by one.
func TestValuesAgreeWithRows(t *testing.T) {
	for seed := range uint64(1500) {
		r := rand.New(rand.NewPCG(seed, 1))
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		n, before, after := r.IntN(12), r.IntN(3), r.IntN(3)
		irregular := make([]bool, before+n+after) // rows that do not take part
		refused := make([]bool, n)
		for i := range irregular {
			irregular[i] = i < before || i >= before+n || r.IntN(4) == 0
		}
		if r.IntN(3) == 0 { // the fast way: all rows take part
			clear(irregular[before : before+n])
		}

		var signature savedmodel.Signature
		var fields []arrow.Field
		var columns []arrow.Array
		type want struct {
			rows   []any
			levels []level
			spec   savedmodel.Spec
		}
		var wants []want
		for i := range 1 + r.IntN(3) {
			leaf := leaves[r.IntN(len(leaves))]
			if leaf.ID() == arrow.LARGE_BINARY { // no builder of its own
				leaf = arrow.BinaryTypes.Binary
			}
			dtypes := leafTypes[leaf]
			spec := savedmodel.Spec{Name: fmt.Sprintf("in%d", i), Tensor: fmt.Sprintf("t%d:0", i), DType: dtypes[r.IntN(len(dtypes))], Shape: []int64{-1}}
			levels := make([]level, r.IntN(4))
			column := leaf
			for j := range levels {
				levels[j] = level{kind: r.IntN(3), size: r.IntN(4)}
				if levels[j].kind == 2 {
					levels[j].size++ // Arrow has no fixed-size list of 0
				}
				spec.Shape = append(spec.Shape, []int64{-1, int64(levels[j].size)}[r.IntN(2)])
			}
			for j := len(levels) - 1; j >= 0; j-- {
				column = levels[j].around(column)
			}
			if r.IntN(8) == 0 {
				spec.Shape, spec.UnknownRank = nil, true
			}
			b := array.NewBuilder(mem, column)
			w := want{levels: levels, spec: spec}
			for row, odd := range irregular {
				v := value(r, levels, leaf, !odd)
				w.rows = append(w.rows, v)
				appendValue(b, v)
				if in := row - before; in >= 0 && in < n && odd && !hasNull(v) {
					refused[in] = true // taken out for a reason of its own, like a picture that cannot be decoded
				}
			}
			w.rows = w.rows[before : before+n]
			whole := b.NewArray()
			columns = append(columns, array.NewSlice(whole, int64(before), int64(before+n)))
			whole.Release()
			b.Release()
			signature.Inputs = append(signature.Inputs, spec)
			fields = append(fields, arrow.Field{Name: spec.Name, Type: column, Nullable: true})
			wants = append(wants, w)
		}
		rec := array.NewRecord(arrow.NewSchema(fields, nil), columns, int64(n))
		for _, column := range columns {
			column.Release()
		}

		binding, err := bindAll(signature, rec.Schema())
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := binding.Check(rec); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		rows := NewRows(n)
		binding.Nulls(rec, rows, r.IntN(2) == 0)
		var kept []int
		for row := range n {
			null := slices.ContainsFunc(wants, func(w want) bool { return hasNull(w.rows[row]) })
			if (rows.state[row] != rowKept) != null {
				t.Fatalf("seed %d, row %d: state %d, but null is %t", seed, row, rows.state[row], null)
			}
			if refused[row] {
				rows.Refuse(row, "for the test")
			} else if !null {
				kept = append(kept, row)
			}
		}
		if rows.Kept() != len(kept) || !slices.Equal(rows.Positions(), kept) {
			t.Fatalf("seed %d: kept %v, want %v", seed, rows.Positions(), kept)
		}
		if len(kept) > 0 {
			feeds, err := binding.Values(rec, rows, nil, mem)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			for i, w := range wants {
				got := feeds[i].Value
				var data []byte
				var texts [][]byte
				for _, row := range kept {
					data, texts = appendTensor(data, texts, w.rows[row], w.spec.DType)
				}
				shape := []int64{int64(len(kept))}
				empty := false
				for j, l := range w.levels {
					size := int64(l.size)
					if empty && l.kind != 2 && (w.spec.UnknownRank || w.spec.Shape[j+1] < 0) {
						size = 0 // nobody can know
					}
					empty = empty || size == 0
					shape = append(shape, size)
				}
				same := slices.EqualFunc(got.Strings, texts, func(a, b []byte) bool { return string(a) == string(b) })
				if feeds[i].Tensor != w.spec.Tensor || got.DType != w.spec.DType || !slices.Equal(got.Shape, shape) || string(got.Data) != string(data) || !same {
					t.Fatalf("seed %d, input %d: %s\n got %v %v %v %q\nwant %v %v %v %q", seed, i, fields[i].Type,
						got.DType, got.Shape, got.Data, got.Strings, w.spec.DType, shape, data, texts)
				}
			}
			ReleaseFeeds(feeds)
		}
		rec.Release()
		mem.AssertSize(t, 0)
	}
}

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
	return array.NewRecord(arrow.NewSchema([]arrow.Field{{Name: name, Type: dtype, Nullable: true}}, nil), []arrow.Array{column}, int64(len(rows)))
}

func spec(name string, dtype savedmodel.DType, shape ...int64) savedmodel.Spec {
	return savedmodel.Spec{Name: name, Tensor: name + ":0", DType: dtype, Shape: shape}
}

func TestWholeAlignedColumnIsNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "x", arrow.ListOf(arrow.PrimitiveTypes.Float32), []any{1.0, 2.0}, []any{3.0, 4.0}, []any{5.0, 6.0})
	defer rec.Release()
	address := unsafe.SliceData(rec.Column(0).(*array.List).ListValues().Data().Buffers()[1].Bytes())
	binding, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 2)}}, rec.Schema())
	if err != nil {
		t.Fatal(err)
	}
	take := func(rec arrow.Record, skip ...int) Value {
		t.Helper()
		rows := NewRows(int(rec.NumRows()))
		for _, row := range skip {
			rows.Null(row)
		}
		feeds, err := binding.Values(rec, rows, nil, mem)
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
	part := take(slice)
	if unsafe.SliceData(part.Data) != (*byte)(unsafe.Add(unsafe.Pointer(address), 8)) {
		t.Error("a slice is not a view of its column")
	}
	holes := take(rec, 1)
	if unsafe.SliceData(holes.Data) == address || len(holes.Data) != 16 {
		t.Error("a selection with a hole must be copied")
	}
	// The buffer outlives the record for as long as a value views it.
	slice.Release()
	for _, v := range []Value{whole, part, holes} {
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

// TestPictures checks that rows whose picture is refused leave every input, and that decoding sees only rows that
// take part.
func TestPictures(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	signature := savedmodel.Signature{
		Inputs:  []savedmodel.Spec{spec("k", savedmodel.Int64, -1), spec("p", savedmodel.Float32, -1, 1, 1, 3), spec("q", savedmodel.Float32, -1, 1, 1, 3)},
		Outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1)},
	}
	plan, err := NewPlan(signature, Options{Pictures: map[string]bool{"p": true, "q": true}})
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
	decode := func(input string, encoded [][]byte, mem memory.Allocator) (Value, map[int]string, error) {
		v := Allocate(savedmodel.Float32, []int64{int64(len(encoded)), 1, 1, 3}, mem)
		failed := map[int]string{}
		for i, e := range encoded {
			if string(e) == "bad" {
				failed[i] = "no picture"
			}
			copy(v.Data[i*12:], strings.Repeat(string(e[:1]), 12))
		}
		return v, failed, nil
	}
	rows := NewRows(5)
	binding.Nulls(rec, rows, false)
	feeds, err := binding.Values(rec, rows, decode, mem)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, feed := range feeds {
		got[feed.Tensor] = string(feed.Value.Data)
	}
	twelve := func(s string) string { return strings.Repeat(s, 12) }
	want := map[string]string{"p:0": twelve("a") + twelve("e"), "q:0": twelve("v") + twelve("z"), "k:0": "\x00\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"}
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
	feeds, err = binding.Values(rec, all, func(_ string, encoded [][]byte, mem memory.Allocator) (Value, map[int]string, error) {
		failed := map[int]string{}
		for i := range encoded {
			failed[i] = "no picture"
		}
		return Allocate(savedmodel.Float32, []int64{int64(len(encoded)), 1, 1, 3}, mem), failed, nil
	}, mem)
	if feeds != nil || err != nil || all.Kept() != 0 {
		t.Errorf("with every picture refused: %d feeds, %d kept, %v", len(feeds), all.Kept(), err)
	}
	calls := 0
	_, err = binding.Values(rec, NewRows(5), func(input string, encoded [][]byte, mem memory.Allocator) (Value, map[int]string, error) {
		if calls++; calls == 2 {
			return Value{}, nil, errors.New("the decoder broke")
		}
		return decode(input, encoded[:0], mem)
	}, mem)
	if err == nil || err.Error() != "the decoder broke" {
		t.Errorf("the decoder's error became %v", err)
	}
}

// wantFault checks that err is a fault of a kind whose sentence holds all the parts.
func wantFault(t *testing.T, err error, kind fault.Kind, parts ...string) {
	t.Helper()
	if got, ok := fault.KindOf(err); !ok || got != kind {
		t.Errorf("kind %d, %t of %v; want %d", got, ok, err, kind)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}

func TestBindNamesColumnAndBothTypes(t *testing.T) {
	list := func(t arrow.DataType) arrow.DataType { return arrow.ListOf(t) }
	f32, str := arrow.PrimitiveTypes.Float32, arrow.BinaryTypes.String
	for name, c := range map[string]struct {
		input  savedmodel.Spec
		column arrow.DataType
		parts  []string
	}{
		"wrong dtype":        {spec("x", savedmodel.Float32, -1, 4), list(str), []string{`"x" float32 [?,4]`, `column "c"`, "list<item: utf8", "cast its elements to float32"}},
		"narrowing":          {spec("x", savedmodel.Int32, -1), arrow.PrimitiveTypes.Int64, []string{`"x" int32 [?]`, `column "c" of int64`, "cast its elements to int32"}},
		"int32 to float32":   {spec("x", savedmodel.Float32, -1), arrow.PrimitiveTypes.Int32, []string{`"x" float32 [?]`, "int32"}},
		"too flat":           {spec("x", savedmodel.Float32, -1, 4), f32, []string{`"x" float32 [?,4]`, "1 level of list", `column "c" is float32`}},
		"too deep":           {spec("x", savedmodel.Float32, -1), list(f32), []string{"0 levels", "list<item: float32"}},
		"fixed size":         {spec("x", savedmodel.Float32, -1, 4), arrow.FixedSizeListOf(3, f32), []string{"dimension 1 to be 4", "fixed_size_list", "[3]"}},
		"date":               {spec("x", savedmodel.Int32, -1), arrow.PrimitiveTypes.Date32, []string{"date32", "int32"}},
		"dtype without type": {spec("x", savedmodel.Resource, -1), f32, []string{"resource", "float32"}},
		"dictionary": {spec("x", savedmodel.String, -1), &arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: str},
			[]string{"dictionary", "string"}},
		"struct": {spec("x", savedmodel.Float32, -1), arrow.StructOf(arrow.Field{Name: "f", Type: f32}), []string{"struct", "float32"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{c.input}}, arrow.NewSchema([]arrow.Field{{Name: "c", Type: c.column}}, nil))
			wantFault(t, err, fault.BadRequest, c.parts...)
		})
	}
	two := savedmodel.Signature{Inputs: []savedmodel.Spec{spec("a", savedmodel.Float32, -1), spec("b", savedmodel.Float32, -1)}}
	_, err := bindAll(two, arrow.NewSchema([]arrow.Field{{Name: "a", Type: f32}, {Name: "z", Type: f32}}, nil))
	wantFault(t, err, fault.BadRequest, `input "b"`, `column "b"`, "not", `"a", "z"`)
	_, err = bindAll(two, arrow.NewSchema([]arrow.Field{{Name: "a", Type: f32}, {Name: "a", Type: f32}, {Name: "b", Type: f32}}, nil))
	wantFault(t, err, fault.BadRequest, `column "a"`, "2 times")
}

func TestNewPlanRefuses(t *testing.T) {
	x, y := spec("x", savedmodel.Float32, -1, 4), spec("y", savedmodel.Float32, -1)
	for name, c := range map[string]struct {
		inputs, outputs []savedmodel.Spec
		options         Options
		parts           []string
	}{
		"unknown input":         {options: Options{Inputs: Mapping{{"nope", "c"}}}, parts: []string{`no input "nope"`, `"x" float32 [?,4]`}},
		"input left out":        {options: Options{Inputs: Mapping{}}, parts: []string{`input "x" is not mapped`}},
		"unknown output":        {options: Options{Outputs: Mapping{{"nope", "c"}}}, parts: []string{`no output "nope"`, `"y" float32 [?]`}},
		"no output":             {options: Options{Outputs: Mapping{}}, parts: []string{"no output is asked for"}},
		"two outputs, one name": {outputs: []savedmodel.Spec{y, spec("z", savedmodel.Int64, -1)}, options: Options{Outputs: Mapping{{"y", "c"}, {"z", "c"}}}, parts: []string{`"c"`, "error_column"}},
		"error column in use":   {options: Options{ErrorColumn: "y"}, parts: []string{`"y"`, "error_column"}},
		"output not per row":    {outputs: []savedmodel.Spec{spec("y", savedmodel.Float32)}, parts: []string{`output "y"`, "float32", "first dimension must be the batch"}},
		"output of no rank":     {outputs: []savedmodel.Spec{{Name: "y", DType: savedmodel.Float32, UnknownRank: true}}, parts: []string{`output "y"`, "unknown rank"}},
		"output of no type":     {outputs: []savedmodel.Spec{spec("y", savedmodel.DType(8), -1)}, parts: []string{`output "y"`, "dtype(8)"}},
		"no input":              {inputs: []savedmodel.Spec{}, parts: []string{"no input"}},
		"input without batch":   {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32)}, parts: []string{`"x" float32 []`, "no batch dimension"}},
		"input of fixed batch":  {inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, 8, 4)}, parts: []string{`"x" float32 [8,4]`, "no batch dimension"}},
		"unknown picture":       {options: Options{Pictures: map[string]bool{"nope": true}}, parts: []string{`no input "nope"`}},
		"picture of wrong rank": {options: Options{Pictures: map[string]bool{"x": true}}, parts: []string{"[batch,height,width,3]", `"x" float32 [?,4]`}},
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
			wantFault(t, err, fault.BadRequest, c.parts...)
		})
	}
	plan, err := NewPlan(savedmodel.Signature{Inputs: []savedmodel.Spec{spec("p", savedmodel.Float32, -1, 8, 8, 3)}, Outputs: []savedmodel.Spec{y}}, Options{Pictures: map[string]bool{"p": true}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = plan.Bind(arrow.NewSchema([]arrow.Field{{Name: "c", Type: arrow.BinaryTypes.String}}, nil))
	wantFault(t, err, fault.BadRequest, `input "p"`, "binary", `column "c" is utf8`)
}

func TestValuesRefuseBatches(t *testing.T) {
	lists := arrow.ListOf(arrow.PrimitiveTypes.Float32)
	for name, c := range map[string]struct {
		rec   func(memory.Allocator) arrow.Record
		parts []string
	}{
		"ragged lists": {
			func(mem memory.Allocator) arrow.Record {
				return record(t, mem, "c", lists, []any{1.0}, []any{1.0, 2.0})
			},
			[]string{`"x" float32 [?,4]`, `column "c"`, "lists of 1 and of 2 elements"},
		},
		"wrong length": {
			func(mem memory.Allocator) arrow.Record { return record(t, mem, "c", lists, []any{1.0}, []any{2.0}) },
			[]string{`"x" float32 [?,4]`, `column "c"`, "1 elements at dimension 1, want 4"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
			defer mem.AssertSize(t, 0)
			rec := c.rec(mem)
			defer rec.Release()
			binding, err := bindAll(savedmodel.Signature{Inputs: []savedmodel.Spec{spec("x", savedmodel.Float32, -1, 4)}}, rec.Schema())
			if err != nil {
				t.Fatal(err)
			}
			_, err = binding.Values(rec, NewRows(2), nil, mem)
			wantFault(t, err, fault.BadRequest, c.parts...)
		})
	}
}

// TestCheckFindsLies damages whole columns, one buffer or length at a time.
func TestCheckFindsLies(t *testing.T) {
	f32, i32 := arrow.PrimitiveTypes.Float32, func(v ...int32) []byte { return arrow.Int32Traits.CastToBytes(v) }
	i64 := func(v ...int64) []byte { return arrow.Int64Traits.CastToBytes(v) }
	array4 := func(t arrow.DataType, n int, children []arrow.ArrayData, buffers ...[]byte) *array.Data {
		list := make([]*memory.Buffer, len(buffers))
		for i, b := range buffers {
			if b != nil {
				list[i] = memory.NewBufferBytes(b)
			}
		}
		return array.NewData(t, n, list, children, array.UnknownNullCount, 0)
	}
	four := []arrow.ArrayData{array4(f32, 4, nil, nil, make([]byte, 16))}
	short := []arrow.ArrayData{array4(f32, 4, nil, nil, make([]byte, 12))}
	list, large, fixed := arrow.ListOf(f32), arrow.LargeListOf(f32), arrow.FixedSizeListOf(2, f32)
	text, bigText := arrow.BinaryTypes.String, arrow.BinaryTypes.LargeString
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
