// Tests of raw cells, Spark vectors, fixed-shape tensors and dictionaries as columns of an input.

package tensor

import (
	"fmt"
	"math/rand/v2"
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

// TestRawAgreesWithCells compares raw cells of all binary types with their concatenation.
func TestRawAgreesWithCells(t *testing.T) {
	columns := []arrow.DataType{arrow.BinaryTypes.Binary, arrow.BinaryTypes.BinaryView,
		&arrow.FixedSizeBinaryType{ByteWidth: 12}}
	dtypes := []savedmodel.DType{savedmodel.Bool, savedmodel.Uint8, savedmodel.Bfloat16, savedmodel.Int32,
		savedmodel.Float32}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		column, dtype := columns[r.IntN(len(columns))], dtypes[r.IntN(len(dtypes))]
		n, size := 1+r.IntN(9), int64(12/dtype.Size())
		var rows []any
		var want []byte
		var kept []int
		for row := range n {
			cell := make([]byte, 12)
			for i := range cell {
				cell[i] = byte(r.IntN(2))
			}
			bad := false
			switch choice := r.IntN(8); {
			case choice == 0:
				rows = append(rows, nil)
				continue
			case choice == 1 && column.ID() != arrow.FIXED_SIZE_BINARY:
				cell, bad = cell[:r.IntN(12)], true
			case choice == 2:
				cell[r.IntN(12)], bad = 2, dtype == savedmodel.Bool
			}
			rows = append(rows, string(cell))
			if !bad {
				want, kept = append(want, cell...), append(kept, row)
			}
		}
		rec := record(t, mem, "c", column, rows...)
		binding := bindOne(t, spec("x", dtype, -1, size, 1), protocol.Input{Encoding: "raw"},
			rec.Schema().Field(0))
		if err := binding.Check(rec); err != nil {
			t.Fatal(err)
		}
		state := NewRows(n)
		binding.Nulls(rec, state, false)
		if state.Kept() > 0 {
			feeds, err := binding.Values(t.Context(), rec, state, nil, mem)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if len(kept) > 0 && (string(feeds[0].Value.Data) != string(want) ||
				!slices.Equal(feeds[0].Value.Shape, []int64{int64(len(kept)), size, 1})) {
				t.Fatalf("seed %d, %s of %s: %v %v, want %v", seed, column, dtype, feeds[0].Value.Shape,
					feeds[0].Value.Data, want)
			}
			ReleaseFeeds(feeds)
		}
		if !slices.Equal(state.Positions(), kept) {
			t.Fatalf("seed %d: rows %v took part, want %v", seed, state.Positions(), kept)
		}
		rec.Release()
		mem.AssertSize(t, 0)
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

// TestVectorsAgreeWithRows compares sparse and dense vectors, good and bad ones, with an oracle that walks the rows.
func TestVectorsAgreeWithRows(t *testing.T) {
	refusals := 0
	for seed := range uint64(600) {
		r := rand.New(rand.NewPCG(seed, 4))
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		n, size, before := r.IntN(10), r.IntN(5), r.IntN(2)
		input := spec("x", []savedmodel.DType{savedmodel.Float32, savedmodel.Float64}[r.IntN(2)], -1,
			[]int64{-1, int64(size)}[r.IntN(2)])
		b := array.NewBuilder(mem, vectorType).(*array.StructBuilder)
		var kept []int
		var nulls []bool
		var want []byte
		put := func(kind, length any, indices, values any) {
			b.Append(true)
			for i, v := range []any{kind, length, indices, values} {
				appendValue(b.FieldBuilder(i), v)
			}
		}
		for row := -before; row < n; row++ {
			dense := make([]any, size)
			indices, values := []any{}, []any{}
			for i := range dense {
				if dense[i] = 0.0; r.IntN(2) == 0 {
					dense[i] = float64(r.IntN(100))
					indices, values = append(indices, int64(i)), append(values, dense[i])
				}
			}
			null, bad := false, false
			switch r.IntN(12) {
			case 0:
				b.AppendNull()
				null = true
			case 1:
				put(int64(2), nil, nil, dense)
				bad = true
			case 2:
				put(int64(0), int64(size), append(indices, int64(size)), append(values, 1.0))
				bad = true
			case 3:
				put(int64(0), int64(size), append([]any{int64(-1)}, indices...), append(values, 1.0))
				bad = true
			case 4:
				put(int64(0), int64(size), append(indices, int64(0), int64(0)), append(values, 1.0, 1.0))
				bad = true
			case 5:
				put(int64(0), int64(size), indices, append(values, 1.0))
				bad = true
			case 6:
				put(int64(1), nil, nil, append(dense, nil))
				null = true
			case 7:
				put(int64(0), nil, indices, values)
				null = true
			case 8:
				put(nil, nil, nil, dense)
				null = true
			case 9, 10:
				put(int64(0), int64(size), indices, values)
			default:
				put(int64(1), nil, nil, dense)
			}
			if row >= 0 {
				nulls = append(nulls, null)
				if !null && !bad {
					kept = append(kept, row)
					want, _ = appendTensor(want, nil, dense, input.DType)
				}
				if bad {
					refusals++
				}
			}
		}
		whole := b.NewArray()
		rec := one("c", array.NewSlice(whole, int64(before), int64(before+n)))
		whole.Release()
		b.Release()
		binding := bindOne(t, input, protocol.Input{}, rec.Schema().Field(0))
		if err := binding.Check(rec); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		rows := NewRows(n)
		binding.Nulls(rec, rows, false)
		for row, null := range nulls {
			if (rows.state[row] == rowNull) != null {
				t.Fatalf("seed %d: row %d is null: %t", seed, row, null)
			}
		}
		if rows.Kept() > 0 {
			feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if len(kept) > 0 && (string(feeds[0].Value.Data) != string(want) ||
				!slices.Equal(feeds[0].Value.Shape, []int64{int64(len(kept)), int64(size)})) {
				t.Fatalf("seed %d: %v %v, want %v", seed, feeds[0].Value.Shape, feeds[0].Value.Data, want)
			}
			ReleaseFeeds(feeds)
		}
		if !slices.Equal(rows.Positions(), kept) {
			t.Fatalf("seed %d: rows %v took part, want %v: %v", seed, rows.Positions(), kept, rows.texts)
		}
		rec.Release()
		mem.AssertSize(t, 0)
	}
	if refusals < 100 {
		t.Errorf("%d refused rows are too few", refusals)
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
