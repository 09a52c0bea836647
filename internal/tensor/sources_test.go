// Tests of raw cells, Spark vectors, list views and fixed-shape tensors as columns of an input.

package tensor

import (
	"fmt"
	"slices"
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

func TestRawCellsInSequenceAreNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	for _, column := range []arrow.DataType{blob, &arrow.FixedSizeBinaryType{ByteWidth: 8}} {
		rec := record(t, mem, "c", column, blobs("12345678", "abcdefgh", "ABCDEFGH"))
		buffers := rec.Column(0).Data().Buffers()
		bytes := buffers[len(buffers)-1].Bytes()
		slice := rec.NewSlice(1, 3)
		input, entry := spec("x", savedmodel.Float32, -1, 2), protocol.Input{Encoding: "raw"}
		_, feeds, err := feed(t, mem, slice, input, entry)
		if err != nil {
			t.Fatal(err)
		}
		_, copied, err := feed(t, mem, rec, input, entry, 1)
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

// TestVectors has sparse and dense vectors, nulls in each of their fields, and bad ones.
func TestVectors(t *testing.T) {
	cells := []struct{ vector, refused string }{ // "null" is left out
		{`{"type":0,"size":3,"indices":[0,2],"values":[1,2]}`, ""}, {`{"type":1,"values":[3,4,5]}`, ""},
		{`{"type":0,"size":3,"indices":[],"values":[]}`, ""}, {`{"type":1,"values":[-0,1e300,1e-300]}`, ""},
		{`null`, "null"}, {`{"type":null,"values":[1,2,3]}`, "null"}, {`{"type":1,"values":[1,2,null]}`, "null"},
		{`{"type":1}`, "null"}, {`{"type":0,"indices":[0],"values":[1]}`, "null"},
		{`{"type":0,"size":3,"values":[1]}`, "null"}, {`{"type":0,"size":3,"indices":[null],"values":[1]}`, "null"},
		{`{"type":2,"values":[1,2,3]}`, "a vector that is neither sparse (type 0) nor dense (type 1)"},
		{`{"type":0,"size":3,"indices":[3],"values":[1]}`, "of 3 elements whose indices do not ascend within it"},
		{`{"type":0,"size":3,"indices":[-1],"values":[1]}`, "of 3 elements whose indices do not ascend within it"},
		{`{"type":0,"size":3,"indices":[1,1],"values":[1,2]}`, "of 3 elements whose indices do not ascend within it"},
		{`{"type":0,"size":3,"indices":[0],"values":[1,2]}`, "a sparse vector with 1 indices and 2 values"},
	}
	var rows []string
	for _, cell := range cells {
		rows = append(rows, cell.vector)
	}
	for _, want := range []any{
		[]float64{1, 0, 2, 3, 4, 5, 0, 0, 0, minusZero, 1e300, 1e-300},
		[]float32{1, 0, 2, 3, 4, 5, 0, 0, 0, float32(minusZero), float32(infinite), 0},
	} {
		for _, dims := range [][]int64{{-1, -1}, {-1, 3}} {
			mem := checkedMemory(t)
			long := record(t, mem, "c", vectorType, rows[0]+","+strings.Join(rows, ","))
			rec := long.NewSlice(1, long.NumRows())
			kept, feeds, err := feed(t, mem, rec, spec("x", tensorOf(want).DType, dims...), protocol.Input{})
			tensor := tensorOf(want)
			tensor.Shape = []int64{4, 3}
			if err != nil || !sameValue(feeds[0].Value, tensor) {
				t.Fatalf("%v, %v", feeds, err)
			}
			for row, cell := range cells {
				reason, refused := kept.reason(row)
				if (cell.refused == "null") != (kept.state[row] == rowNull) ||
					refused && (cell.refused == "" || !strings.Contains(reason, cell.refused)) {
					t.Errorf("%s: state %d, %q, want %q", cell.vector, kept.state[row], reason, cell.refused)
				}
			}
			ReleaseFeeds(feeds)
			rec.Release()
			long.Release()
		}
	}
}

func TestVectorLengths(t *testing.T) {
	mem := checkedMemory(t)
	rec := record(t, mem, "c", vectorType, `{"type":1,"values":[1,1]},{"type":1,"values":[1,1,1]}`)
	defer rec.Release()
	_, _, err := feed(t, mem, rec, spec("x", savedmodel.Float64, -1, -1), protocol.Input{})
	expect.Fault(t, err, fault.BadRequest, `"x" float64 [?,?]`, `column "c"`, "vectors of 2 and of 3 elements")
	rows, feeds, err := feed(t, mem, rec, spec("x", savedmodel.Float64, -1, 3), protocol.Input{})
	if err != nil || rows.texts[0] != `column "c": a vector of 2 elements, want 3` || rows.Kept() != 1 {
		t.Errorf("%v, %v", rows.texts, err)
	}
	ReleaseFeeds(feeds)
}

// TestListViewsInAnyOrder takes views that overlap and go backwards.
func TestListViewsInAnyOrder(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	b := array.NewBuilder(mem, arrow.ListViewOf(i8)).(*array.ListViewBuilder)
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
	_, feeds, err := feed(t, mem, rec, spec("x", savedmodel.Int8, -1, -1), protocol.Input{})
	if err != nil || fmt.Sprint(feeds[0].Value.Shape, feeds[0].Value.Data) != "[3 2] [2 3 0 1 1 2]" {
		t.Errorf("%v, %v", feeds, err)
	}
	ReleaseFeeds(feeds)
}

// TestFixedShapeTensorsAreNotCopied reads the shape from the field's metadata.
func TestFixedShapeTensorsAreNotCopied(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rec := record(t, mem, "c", arrow.FixedSizeListOf(6, f32), "[1,2,3,4,5,6],[1,2,3,4,5,6]")
	defer rec.Release()
	field := rec.Schema().Field(0)
	field.Metadata = arrow.NewMetadata([]string{extensionName, extensionMetadata},
		[]string{"arrow.fixed_shape_tensor", `{"shape":[2,3],"dim_names":["a","b"],"permutation":[0,1]}`})
	for _, input := range []string{"x float32 -1 -1 3", "x float32 ?"} {
		feeds, err := bindOne(t, specs(input)[0], protocol.Input{}, field).Values(t.Context(), rec, NewRows(2), nil,
			mem)
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

// TestStringsHoldTheirColumn reads strings after the record batch was released.
func TestStringsHoldTheirColumn(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	rec := record(t, mem, "c", str, `"one","two"`)
	_, feeds, err := feed(t, mem, rec, spec("x", savedmodel.String, -1), protocol.Input{})
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
