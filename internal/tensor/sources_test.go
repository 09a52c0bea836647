// Tests of raw cells, Spark vectors, fixed-shape tensors and dictionaries as columns of an input.

package tensor

import (
	"fmt"
	"slices"
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

// bindOne binds a column of the given metadata to one input.
func bindOne(t *testing.T, input savedmodel.Spec, entry protocol.Input, field arrow.Field) *Binding {
	t.Helper()
	entry.Tensor, entry.Column = input.Name, field.Name
	plan, err := NewPlan(savedmodel.Signature{Inputs: []savedmodel.Spec{input}, Outputs: anyInput},
		Options{Inputs: protocol.Inputs{entry}})
	if err != nil {
		t.Fatal(err)
	}
	binding, err := plan.Bind(arrow.NewSchema([]arrow.Field{field}, nil))
	if err != nil {
		t.Fatal(err)
	}
	return binding
}

// one returns a record batch of one column, which it takes over.
func one(name string, column arrow.Array) arrow.Record {
	defer column.Release()
	return array.NewRecord(arrow.NewSchema([]arrow.Field{{Name: name, Type: column.DataType(), Nullable: true}}, nil),
		[]arrow.Array{column}, int64(column.Len()))
}

// TestRawCells has cells of all binary types: null ones, those of another size, and booleans that are none.
func TestRawCells(t *testing.T) {
	cells := []any{"\x00\x01\x00\x01", nil, "\x01\x01\x01\x01", "\x00\x01\x02\x00"}
	for _, column := range []arrow.DataType{arrow.BinaryTypes.Binary, arrow.BinaryTypes.LargeBinary,
		arrow.BinaryTypes.BinaryView, &arrow.FixedSizeBinaryType{ByteWidth: 4}} {
		for dtype, kept := range map[savedmodel.DType][]int{savedmodel.Bool: {0, 2}, savedmodel.Uint8: {0, 2, 3},
			savedmodel.Bfloat16: {0, 2, 3}, savedmodel.Float32: {0, 2, 3}} {
			mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
			rows, n := cells, len(kept)
			if column.ID() != arrow.FIXED_SIZE_BINARY {
				rows = slices.Concat(cells, []any{"\x00", ""})
			}
			rec := record(t, mem, "c", column, rows...)
			size := int64(4 / max(dtype.Size(), 1))
			feeds, state, err := feedsOf(t, rec, mem, protocol.Input{Encoding: "raw"}, spec("x", dtype, -1, size, 1))
			want := []byte("\x00\x01\x00\x01\x01\x01\x01\x01\x00\x01\x02\x00")[:4*n]
			if err != nil || !slices.Equal(state.Positions(), kept) ||
				!holds(feeds[0].Value, []int64{int64(n), size, 1}, want) {
				t.Errorf("%s of %s: rows %v, %v, %v", column, dtype, state.Positions(), feeds, err)
			}
			ReleaseFeeds(feeds)
			rec.Release()
			mem.AssertSize(t, 0)
		}
	}
}

func TestRawCellsInSequenceAreNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	for _, column := range []arrow.DataType{arrow.BinaryTypes.Binary, &arrow.FixedSizeBinaryType{ByteWidth: 8}} {
		rec := record(t, mem, "c", column, "12345678", "abcdefgh", "ABCDEFGH")
		binding := bindOne(t, spec("x", savedmodel.Float32, -1, 2), protocol.Input{Encoding: "raw"},
			rec.Schema().Field(0))
		buffers := rec.Column(0).Data().Buffers()
		bytes := buffers[len(buffers)-1].Bytes()
		slice := rec.NewSlice(1, 3)
		feeds, err := binding.Values(t.Context(), slice, NewRows(2), nil, mem)
		if err != nil {
			t.Fatal(err)
		}
		holed := NewRows(3)
		holed.Null(1)
		copied, err := binding.Values(t.Context(), rec, holed, nil, mem)
		if err != nil {
			t.Fatal(err)
		}
		rec.Release()
		slice.Release() // the values hold what they view
		if got := feeds[0].Value.Data; unsafe.SliceData(got) != &bytes[8] || string(got) != "abcdefghABCDEFGH" {
			t.Errorf("%s: %q was copied", column, got)
		}
		if got := copied[0].Value.Data; string(got) != "12345678ABCDEFGH" {
			t.Errorf("%s: a selection is %q", column, got)
		}
		ReleaseFeeds(feeds)
		ReleaseFeeds(copied)
	}
}

// TestVectors has dense and sparse vectors, whole ones with a null somewhere, and those that cannot be.
func TestVectors(t *testing.T) {
	sparse, dense := int64(0), int64(1)
	indices := func(at ...int64) (list []any) {
		for _, i := range at {
			list = append(list, i)
		}
		return list
	}
	const fits, null, bad = 0, 1, 2
	vectors := []struct {
		parts []any // type, size, indices, values
		state int
	}{
		{[]any{dense, nil, nil, []any{1.0, 2.0, 3.0}}, fits},
		{nil, null},
		{[]any{sparse, int64(3), indices(0, 2), []any{1.5, -2.0}}, fits},
		{[]any{sparse, int64(3), []any{}, []any{}}, fits},
		{[]any{dense, nil, nil, []any{1.0, nil, 3.0}}, null},
		{[]any{sparse, nil, indices(0), []any{1.0}}, null},
		{[]any{nil, nil, nil, []any{1.0, 2.0, 3.0}}, null},
		{[]any{int64(2), nil, nil, []any{1.0, 2.0, 3.0}}, bad},
		{[]any{sparse, int64(3), indices(3), []any{1.0}}, bad},
		{[]any{sparse, int64(3), indices(-1), []any{1.0}}, bad},
		{[]any{sparse, int64(3), indices(1, 1), []any{1.0, 1.0}}, bad},
		{[]any{sparse, int64(3), indices(2, 1), []any{1.0, 1.0}}, bad},
		{[]any{sparse, int64(3), indices(1), []any{1.0, 1.0}}, bad},
		{[]any{dense, nil, nil, []any{0.0, 0.0, 0.1}}, fits},
	}
	for _, size := range []int64{-1, 3} {
		for dtype, want := range map[savedmodel.DType]any{
			savedmodel.Float32: []float32{1, 2, 3, 1.5, 0, -2, 0, 0, 0, 0, 0, 0.1},
			savedmodel.Float64: []float64{1, 2, 3, 1.5, 0, -2, 0, 0, 0, 0, 0, 0.1}} {
			mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
			b := array.NewBuilder(mem, vectorType).(*array.StructBuilder)
			var kept []int
			for i := -1; i < len(vectors); i++ { // the first one is sliced off
				v := vectors[max(i, 0)]
				if v.parts == nil {
					b.AppendNull()
				} else {
					b.Append(true)
				}
				for field, part := range v.parts {
					appendValue(b.FieldBuilder(field), part)
				}
				if i >= 0 && v.state == fits {
					kept = append(kept, i)
				}
			}
			whole := b.NewArray()
			b.Release()
			rec := one("c", array.NewSlice(whole, 1, int64(whole.Len())))
			whole.Release()
			feeds, rows, err := feedsOf(t, rec, mem, protocol.Input{}, spec("x", dtype, -1, size))
			if err != nil || !slices.Equal(rows.Positions(), kept) || !holds(feeds[0].Value, []int64{4, 3}, want) {
				t.Errorf("%s [?,%d]: rows %v, %v, %v", dtype, size, rows.Positions(), feeds, err)
			}
			for i, v := range vectors {
				if _, refused := rows.reason(i); refused != (v.state == bad) ||
					(rows.state[i] == rowNull) != (v.state == null) {
					t.Errorf("vector %d: state %d, want %d", i, rows.state[i], v.state)
				}
			}
			ReleaseFeeds(feeds)
			rec.Release()
			mem.AssertSize(t, 0)
		}
	}
}

// vectorsOf builds dense vectors of the given lengths.
func vectorsOf(mem memory.Allocator, lengths ...int) arrow.Record {
	b := array.NewBuilder(mem, vectorType).(*array.StructBuilder)
	defer b.Release()
	for _, n := range lengths {
		b.Append(true)
		appendValue(b.FieldBuilder(0), int64(1))
		appendValue(b.FieldBuilder(1), nil)
		appendValue(b.FieldBuilder(2), nil)
		appendValue(b.FieldBuilder(3), slices.Repeat([]any{1.0}, n))
	}
	return one("c", b.NewArray())
}

func TestVectorLengths(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := vectorsOf(mem, 2, 3)
	defer rec.Release()
	_, err := bindOne(t, spec("x", savedmodel.Float64, -1, -1), protocol.Input{}, rec.Schema().Field(0)).
		Values(t.Context(), rec, NewRows(2), nil, mem)
	expect.Fault(t, err, fault.BadRequest, `"x" float64 [?,?]`, `column "c"`, "vectors of 2 and of 3 elements")
	rows := NewRows(2)
	feeds, err := bindOne(t, spec("x", savedmodel.Float64, -1, 3), protocol.Input{}, rec.Schema().Field(0)).
		Values(t.Context(), rec, rows, nil, mem)
	if err != nil || rows.texts[0] != `column "c": a vector of 2 elements, want 3` || rows.Kept() != 1 {
		t.Errorf("%v, %v", rows.texts, err)
	}
	ReleaseFeeds(feeds)
}

// TestListViewsInAnyOrder takes views that overlap and go backwards.
func TestListViewsInAnyOrder(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	b := array.NewBuilder(mem, arrow.ListViewOf(arrow.PrimitiveTypes.Int8)).(*array.ListViewBuilder)
	defer b.Release()
	for i := range int8(4) {
		b.ValueBuilder().(*array.Int8Builder).Append(i)
	}
	b.AppendDimensions(2, 2)
	b.AppendDimensions(0, 2)
	b.AppendNull()
	b.AppendDimensions(1, 2)
	rec := one("c", b.NewArray())
	defer rec.Release()
	binding := bindOne(t, spec("x", savedmodel.Int8, -1, -1), protocol.Input{}, rec.Schema().Field(0))
	if err := binding.Check(rec); err != nil {
		t.Fatal(err)
	}
	rows := NewRows(4)
	binding.Nulls(rec, rows, false)
	feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
	if err != nil || fmt.Sprint(feeds[0].Value.Shape, feeds[0].Value.Data) != "[3 2] [2 3 0 1 1 2]" {
		t.Errorf("%v, %v", feeds, err)
	}
	ReleaseFeeds(feeds)
}

// TestFixedShapeTensorsAreNotCopied reads the shape from the field's metadata.
func TestFixedShapeTensorsAreNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "c", arrow.FixedSizeListOf(6, arrow.PrimitiveTypes.Float32),
		[]any{1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, []any{1.0, 2.0, 3.0, 4.0, 5.0, 6.0})
	defer rec.Release()
	field := rec.Schema().Field(0)
	field.Metadata = arrow.NewMetadata([]string{"ARROW:extension:name", "ARROW:extension:metadata"},
		[]string{"arrow.fixed_shape_tensor", `{"shape":[2,3],"dim_names":["a","b"],"permutation":[0,1]}`})
	for _, input := range []savedmodel.Spec{spec("x", savedmodel.Float32, -1, -1, 3),
		{Name: "x", DType: savedmodel.Float32, UnknownRank: true}} {
		feeds, err := bindOne(t, input, protocol.Input{}, field).Values(t.Context(), rec, NewRows(2), nil, mem)
		if err != nil {
			t.Fatal(err)
		}
		child := rec.Column(0).(*array.FixedSizeList).ListValues().Data().Buffers()[1].Bytes()
		if got := feeds[0].Value; !slices.Equal(got.Shape, []int64{2, 2, 3}) ||
			unsafe.SliceData(got.Data) != &child[0] || len(got.Data) != 48 {
			t.Errorf("%v of %d bytes", got.Shape, len(got.Data))
		}
		ReleaseFeeds(feeds)
	}
}

// TestNullType has columns and lists of Arrow's null type, such as SQL's NULL and array().
func TestNullType(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	for _, dtype := range []savedmodel.DType{savedmodel.Float32, savedmodel.String, savedmodel.Uint8, savedmodel.Bool} {
		nothing := one("c", array.NewNull(3))
		binding := bindOne(t, spec("x", dtype, -1, 2), protocol.Input{}, nothing.Schema().Field(0))
		rows := NewRows(3)
		if binding.Nulls(nothing, rows, false); rows.Kept() != 0 || binding.Check(nothing) != nil {
			t.Errorf("%s: %d rows of nulls take part", dtype, rows.Kept())
		}
		nothing.Release()

		b := array.NewListBuilder(mem, arrow.Null)
		b.Append(true)
		b.Append(true)
		b.ValueBuilder().AppendNull()
		b.Append(true)
		empty := one("c", b.NewArray())
		b.Release()
		pad := protocol.Input{Pad: []byte("5")}
		switch dtype {
		case savedmodel.String:
			pad.Pad = []byte(`"5"`)
		case savedmodel.Bool:
			pad.Pad = []byte("true")
		}
		for _, c := range []struct {
			input savedmodel.Spec
			entry protocol.Input
			shape []int64
		}{
			{spec("x", dtype, -1, -1), protocol.Input{}, []int64{2, 0}},
			{spec("x", dtype, -1, -1, -1), protocol.Input{}, []int64{2, 0, 0}},
			{spec("x", dtype, -1, 2), pad, []int64{2, 2}},
			{spec("x", dtype, -1, 2, 3), pad, []int64{2, 2, 3}},
		} {
			binding := bindOne(t, c.input, c.entry, empty.Schema().Field(0))
			rows := NewRows(3)
			binding.Nulls(empty, rows, false)
			if err := binding.Check(empty); err != nil {
				t.Fatal(err)
			}
			feeds, err := binding.Values(t.Context(), empty, rows, nil, mem)
			if err != nil || !slices.Equal(rows.Positions(), []int{0, 2}) {
				t.Fatalf("%s: rows %v, %v", dtype, rows.Positions(), err)
			}
			got := feeds[0].Value
			if !slices.Equal(got.Shape, c.shape) || max(len(got.Data)/max(dtype.Size(), 1),
				len(got.Strings)) != int(elements(c.shape)) {
				t.Errorf("%s: shape %v with %d bytes and %d strings, want %v", dtype, got.Shape, len(got.Data),
					len(got.Strings), c.shape)
			}
			ReleaseFeeds(feeds)
		}
		empty.Release()
	}
}

// TestStringsHoldTheirColumn reads strings after the record batch was released.
func TestStringsHoldTheirColumn(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	rec := record(t, mem, "c", arrow.BinaryTypes.String, "one", "two")
	feeds, err := bindOne(t, spec("x", savedmodel.String, -1), protocol.Input{}, rec.Schema().Field(0)).
		Values(t.Context(), rec, NewRows(2), nil, mem)
	if err != nil {
		t.Fatal(err)
	}
	rec.Release()
	if mem.CurrentAlloc() == 0 || string(feeds[0].Value.Strings[1]) != "two" {
		t.Error("the column is gone")
	}
	ReleaseFeeds(feeds)
	mem.AssertSize(t, 0)
}
