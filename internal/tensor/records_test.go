// Tests of answers: output tensors as columns, their parts, and the rows whose text is not UTF-8.

package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/decimal128"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// anyInput are the inputs of tests in which only outputs matter.
var anyInput = []savedmodel.Spec{spec("x", savedmodel.Float32, -1)}

// read turns one row of a column into plain Go values.
func read(column arrow.Array, row int) any {
	if column.IsNull(row) {
		return nil
	}
	switch c := column.(type) {
	case array.ListLike:
		list := []any{}
		for lo, hi := c.ValueOffsets(row); lo < hi; lo++ {
			list = append(list, read(c.ListValues(), int(lo)))
		}
		return list
	case *array.Float32:
		return c.Value(row)
	case *array.Float64:
		return c.Value(row)
	case *array.Int8:
		return c.Value(row)
	case *array.Int16:
		return c.Value(row)
	case *array.Int32:
		return c.Value(row)
	case *array.Int64:
		return c.Value(row)
	case *array.Uint8: // as the layout list has them
		return int16(c.Value(row))
	case *array.Uint16:
		return int32(c.Value(row))
	case *array.Uint32:
		return int64(c.Value(row))
	case *array.Uint64:
		return decimal128.FromU64(c.Value(row))
	case *array.Decimal128:
		return c.Value(row)
	case *array.Float16:
		return FromHalf(c.Value(row).Uint16())
	case *array.Boolean:
		return c.Value(row)
	case *array.Binary:
		return string(c.Value(row))
	case *array.String:
		return c.Value(row)
	}
	panic(fmt.Sprintf("no way to read %T", column))
}

// flatten returns the elements of nested lists as one.
func flatten(v any) any {
	out := []any{}
	for _, e := range v.([]any) {
		if inner, ok := e.([]any); ok {
			out = append(out, flatten(inner).([]any)...)
		} else {
			out = append(out, e)
		}
	}
	return out
}

// TestRecords has outputs of all types as columns of both layouts, with a null row, a refused one and their reasons.
func TestRecords(t *testing.T) {
	p, half := arrow.PrimitiveTypes, arrow.FixedWidthTypes.Float16
	texts := [][]byte{[]byte("a"), nil, []byte("ß"), []byte("d"), []byte("\xff"),
		[]byte("f"), []byte("g"), []byte("h")}
	decimals := func(list ...uint64) (out []any) {
		for _, v := range list {
			out = append(out, decimal128.FromU64(v))
		}
		return out
	}
	for dtype, c := range map[savedmodel.DType]struct {
		list, tensor arrow.DataType
		elements     any
		want         []any // of the layout list; the layout tensor has the same values
	}{
		savedmodel.Int8:   {p.Int8, p.Int8, []int8{-128, 127}, []any{int8(-128), int8(127)}},
		savedmodel.Int16:  {p.Int16, p.Int16, []int16{-1 << 15, 1}, []any{int16(-1 << 15), int16(1)}},
		savedmodel.Int32:  {p.Int32, p.Int32, []int32{-1 << 31, 1}, []any{int32(-1 << 31), int32(1)}},
		savedmodel.Int64:  {p.Int64, p.Int64, []int64{math.MinInt64, 1}, []any{int64(math.MinInt64), int64(1)}},
		savedmodel.Uint8:  {p.Int16, p.Uint8, []uint8{255, 0}, []any{int16(255), int16(0)}},
		savedmodel.Uint16: {p.Int32, p.Uint16, []uint16{65535, 0}, []any{int32(65535), int32(0)}},
		savedmodel.Uint32: {p.Int64, p.Uint32, []uint32{math.MaxUint32, 0}, []any{int64(math.MaxUint32), int64(0)}},
		savedmodel.Uint64: {&arrow.Decimal128Type{Precision: 20}, p.Uint64, []uint64{math.MaxUint64, 0},
			decimals(math.MaxUint64, 0)},
		savedmodel.Float32:  {p.Float32, p.Float32, []float32{0x1p-149, -1.5}, []any{float32(0x1p-149), float32(-1.5)}},
		savedmodel.Float64:  {p.Float64, p.Float64, []float64{0x1p-1074, -1.5}, []any{0x1p-1074, -1.5}},
		savedmodel.Float16:  {p.Float32, half, []uint16{0x7bff, 1}, []any{float32(65504), float32(0x1p-24)}},
		savedmodel.Bfloat16: {p.Float32, p.Float32, []uint16{0x3f80, 0xc000}, []any{float32(1), float32(-2)}},
		savedmodel.Bool: {arrow.FixedWidthTypes.Boolean, arrow.FixedWidthTypes.Boolean, []bool{true, false},
			[]any{true, false}},
		savedmodel.String: {arrow.BinaryTypes.Binary, arrow.BinaryTypes.Binary, nil,
			[]any{"a", "", "ß", "d", "\xff", "f", "g", "h"}},
	} {
		for _, inner := range [][]int64{{}, {2}, {1, 2}, {2, 2}} {
			for _, layout := range []string{"", protocol.LayoutTensor} {
				// Two rows take part; the elements of an output are those of the table, again and again.
				n := 2 * elements(inner)
				value := Value{DType: dtype, Shape: append([]int64{2}, inner...)}
				want := slices.Repeat(c.want, int(n))[:n]
				if dtype == savedmodel.String {
					value.Strings = texts[:n]
				} else {
					once, err := binary.Append(nil, binary.LittleEndian, c.elements)
					if err != nil {
						t.Fatal(err)
					}
					value.Data = slices.Repeat(once, int(n))[:int(n)*dtype.Size()]
				}
				column := c.list
				if layout != "" {
					column = c.tensor
					if len(inner) > 0 {
						column = arrow.FixedSizeListOf(int32(n/2), column)
					}
				}
				for range inner {
					if layout == "" {
						column = arrow.ListOf(column)
					}
				}
				first, second := want[:n/2], want[n/2:]
				// The request says what the signature leaves open.
				options := Options{Layout: layout, ErrorColumn: "why",
					Outputs: protocol.Outputs{{Tensor: "y", Column: "y", Shape: append([]int64{-1}, inner...)}}}
				output := savedmodel.Spec{Name: "y", DType: dtype, UnknownRank: true}
				checkRecords(t, output, options, value, NewRows(2), column, []any{first, second})
				rows := NewRows(4)
				rows.Null(0)
				rows.Refuse(2, "for the test")
				checkRecords(t, output, options, value, rows, column, []any{nil, first, nil, second})
			}
		}
	}
}

// checkRecords compares the answer of one output, its nulls and its column of errors with the elements of its rows.
func checkRecords(t *testing.T, output savedmodel.Spec, options Options, value Value, rows *Rows,
	column arrow.DataType, want []any) {
	t.Helper()
	mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
	defer mem.AssertSize(t, 0)
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{output}}, options)
	if err != nil {
		t.Fatal(err)
	}
	if field := plan.Schema().Field(0); !arrow.TypeEqual(field.Type, column) || !field.Nullable {
		t.Fatalf("%s: column %s, want %s", output.DType, field, column)
	}
	settled, owned := plan.Settle([]Value{value}, rows, mem)
	if err := plan.CheckOutputs(settled, rows.Kept()); err != nil || owned {
		t.Fatalf("%s: owned %t, %v", output.DType, owned, err)
	}
	for _, outputs := range [][]Value{settled, nil} { // nil where nothing ran
		err = plan.Records(outputs, rows, mem, func(rec arrow.Record, last bool) error {
			if !last || !rec.Schema().Equal(plan.Schema()) || rec.NumRows() != int64(rows.Len()) {
				t.Errorf("last %t, %d rows of %s", last, rec.NumRows(), rec.Schema())
			}
			nulls := 0
			for row := range rows.Len() {
				got := read(rec.Column(0), row)
				if list, ok := got.([]any); ok {
					got = flatten(list)
				} else if got != nil {
					got = []any{got}
				}
				if got == nil {
					nulls++
				}
				if (want[row] == nil) != (got == nil) || want[row] != nil && !reflect.DeepEqual(got, want[row]) {
					t.Errorf("%s as %s, row %d: %v, want %v", output.DType, column, row, got, want[row])
				}
				reason, refused := rows.reason(row)
				if text := read(rec.Column(1), row); refused != (text != nil) || refused && text != reason {
					t.Errorf("row %d: error %v, want %q", row, text, reason)
				}
			}
			if rec.Column(0).NullN() != nulls {
				t.Errorf("%d nulls are counted of %d", rec.Column(0).NullN(), nulls)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		rows, want = NewRows(1), []any{nil}
		rows.Null(0)
	}
}

// TestLargeAnswersComeInParts cuts 130 MiB: rows stay in order, rows without an answer are in all parts, and the last
// part has no others.
func TestLargeAnswersComeInParts(t *testing.T) {
	const kept, tail, width = 130, 150, 1 << 18 // a row has 1 MiB
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	rows := NewRows(2*kept + tail)
	wide := Value{DType: savedmodel.Float32, Shape: []int64{kept, width}, Data: make([]byte, kept*width*4)}
	id := Value{DType: savedmodel.Int64, Shape: []int64{kept}, Data: make([]byte, kept*8)}
	text := Value{DType: savedmodel.String, Shape: []int64{kept}}
	next := 0
	for row := range rows.Len() {
		if row%2 == 1 || row >= 2*kept {
			rows.Null(row)
			continue
		}
		binary.LittleEndian.PutUint32(wide.Data[next*width*4:], math.Float32bits(float32(row)))
		binary.LittleEndian.PutUint64(id.Data[next*8:], uint64(row))
		text.Strings = append(text.Strings, fmt.Append(nil, row))
		next++
	}
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{
		spec("id", savedmodel.Int64, -1), spec("text", savedmodel.String, -1),
		spec("wide", savedmodel.Float32, -1, width),
	}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	seen, parts, sawLast := 0, 0, false
	err = plan.Records([]Value{id, text, wide}, rows, mem, func(rec arrow.Record, last bool) error {
		parts++
		sawLast = last
		bytes := 0
		for row := range int(rec.NumRows()) {
			var wantID, wantText any
			list, isList := read(rec.Column(0), row), rec.Column(2).IsValid(row)
			if seen%2 == 0 && seen < 2*kept {
				wantID, wantText = int64(seen), fmt.Sprint(seen)
				bytes += width * 4
				lists := rec.Column(2).(*array.List)
				lo, hi := lists.ValueOffsets(row)
				if first := lists.ListValues().(*array.Float32).Value(int(lo)); first != float32(seen) ||
					hi-lo != width {
					t.Errorf("row %d begins with %v and has %d elements", seen, first, hi-lo)
				}
			}
			if list != wantID || read(rec.Column(1), row) != wantText || isList != (wantID != nil) {
				t.Fatalf("row %d: %v, %v, %t", seen, list, read(rec.Column(1), row), isList)
			}
			seen++
		}
		if bytes > MaxAnswerBytes {
			t.Errorf("part %d has %d bytes", parts, bytes)
		}
		return nil
	})
	if err != nil || seen != rows.Len() || parts < 3 || !sawLast {
		t.Errorf("%d rows in %d parts, last seen %t: %v", seen, parts, sawLast, err)
	}

	broke := errors.New("the stream broke")
	if err := plan.Records([]Value{id, text, wide}, rows, mem,
		func(arrow.Record, bool) error { return broke }); !errors.Is(err, broke) {
		t.Errorf("the writer's error became %v", err)
	}
}

// TestUnevenStringsComeInParts has all its bytes in the last rows: the rows of a part bound it, not the average.
func TestUnevenStringsComeInParts(t *testing.T) {
	const n, large = 1000, 100
	big := make([]byte, 1<<20)
	value := Value{DType: savedmodel.String, Shape: []int64{n}}
	for row := range n {
		if row < n-large {
			value.Strings = append(value.Strings, []byte("small"))
		} else {
			value.Strings = append(value.Strings, big)
		}
	}
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("s", savedmodel.String, -1)}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	err = plan.Records([]Value{value}, NewRows(n), memory.DefaultAllocator, func(rec arrow.Record, _ bool) error {
		rows += int(rec.NumRows())
		if got := rec.Column(0).Data().Buffers()[2].Len(); got > MaxAnswerBytes {
			t.Errorf("a part has %d MiB", got>>20)
		}
		return nil
	})
	if err != nil || rows != n {
		t.Errorf("%d rows, %v", rows, err)
	}
}

func TestRecordsRefuseOutputs(t *testing.T) {
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 2)}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		value Value
		kind  fault.Kind
		texts []string
	}{
		"rows": {Value{DType: savedmodel.Float32, Shape: []int64{1, 2}, Data: make([]byte, 8)}, fault.BadRequest,
			[]string{`output "y"`, "first dimension 1", "batch of 3 rows"}},
		"dtype": {Value{DType: savedmodel.Int32, Shape: []int64{3, 2}, Data: make([]byte, 24)}, fault.Internal,
			[]string{`"y" float32 [?,2]`, "int32"}},
		"rank": {Value{DType: savedmodel.Float32, Shape: []int64{3}, Data: make([]byte, 12)}, fault.Internal,
			[]string{`"y" float32 [?,2]`, "1 dimensions"}},
		"size": {Value{DType: savedmodel.Float32, Shape: []int64{3, 1}, Data: make([]byte, 12)}, fault.Internal,
			[]string{`"y" float32 [?,2]`, "[3,1]"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := plan.Records([]Value{c.value}, NewRows(3), memory.DefaultAllocator, func(arrow.Record, bool) error {
				t.Error("a record batch was written")
				return nil
			})
			expect.Fault(t, err, c.kind, c.texts...)
		})
	}
	huge := Value{DType: savedmodel.String, Shape: []int64{1}, Strings: [][]byte{make([]byte, MaxRowBytes+1)}}
	texts, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("s", savedmodel.String, -1)}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = texts.Records([]Value{huge}, NewRows(1), memory.DefaultAllocator, nil)
	expect.Fault(t, err, fault.Exhausted, "256 MiB")
}

// TestShapeOfTheRequestIsChecked has an output whose shape is only in the request.
func TestShapeOfTheRequestIsChecked(t *testing.T) {
	signature := savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{{Name: "y",
		DType: savedmodel.Float32, UnknownRank: true}}}
	plan, err := NewPlan(signature,
		Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: []int64{-1, -1, 3}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.CheckOutputs([]Value{{DType: savedmodel.Float32, Shape: []int64{2, 1, 3}, Data: make([]byte, 24)}},
		2); err != nil {
		t.Error(err)
	}
	for _, shape := range [][]int64{{2, 3}, {2, 1, 4}, {2}, {}} {
		err := plan.CheckOutputs([]Value{{DType: savedmodel.Float32, Shape: shape}}, 2)
		expect.Fault(t, err, fault.BadRequest, `output "y"`, shapeText(shape), "[?,?,3]")
	}
	expect.Fault(t, plan.CheckOutputs(nil, 2), fault.Internal, "0 outputs came back, want 1")
}

// TestTensorLayoutHasItsShape reads the field's metadata and the elements of rows without an answer.
func TestTensorLayoutHasItsShape(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("y", savedmodel.Uint8, -1, 1, 2), spec("z", savedmodel.String, -1, 1)}},
		Options{Layout: protocol.LayoutTensor})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{`{"shape":[1,2]}`, `{"shape":[1]}`} {
		field := plan.Schema().Field(i)
		name, _ := field.Metadata.GetValue("ARROW:extension:name")
		if about, _ := field.Metadata.GetValue("ARROW:extension:metadata"); name != "arrow.fixed_shape_tensor" ||
			about != want {
			t.Errorf("%s: %s %s, want %s", field.Name, name, about, want)
		}
	}
	rows := NewRows(3)
	rows.Null(1)
	outputs := []Value{{DType: savedmodel.Uint8, Shape: []int64{2, 1, 2}, Data: []byte{1, 2, 3, 4}},
		{DType: savedmodel.String, Shape: []int64{2, 1}, Strings: [][]byte{[]byte("a"), []byte("b")}}}
	err = plan.Records(outputs, rows, mem, func(rec arrow.Record, _ bool) error {
		y, z := rec.Column(0).(*array.FixedSizeList), rec.Column(1).(*array.FixedSizeList)
		values := y.ListValues().(*array.Uint8)
		if got := values.Uint8Values(); !slices.Equal(got, []byte{1, 2, 0, 0, 3, 4}) || values.NullN() != 0 ||
			!y.IsNull(1) || y.NullN() != 1 {
			t.Errorf("%v", y)
		}
		texts := z.ListValues().(*array.Binary)
		if texts.Len() != 3 || texts.NullN() != 0 || texts.ValueString(1) != "" || texts.ValueString(2) != "b" ||
			!z.IsNull(1) {
			t.Errorf("%v", z)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestTensorLayoutComesInParts counts the elements of null rows, which have bytes, too.
func TestTensorLayoutComesInParts(t *testing.T) {
	const n, width = 150, 1 << 20
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("y", savedmodel.Uint8, -1, width)}}, Options{Layout: protocol.LayoutTensor})
	if err != nil {
		t.Fatal(err)
	}
	rows := NewRows(n)
	for row := 1; row < n; row++ {
		rows.Null(row)
	}
	seen := 0
	err = plan.Records([]Value{{DType: savedmodel.Uint8, Shape: []int64{1, width}, Data: make([]byte, width)}}, rows,
		memory.DefaultAllocator, func(rec arrow.Record, last bool) error {
			seen += int(rec.NumRows())
			if size := rec.Column(0).(*array.FixedSizeList).ListValues().Len(); size > MaxAnswerBytes ||
				last != (seen == n) {
				t.Errorf("a part of %d bytes ends at row %d, last %t", size, seen, last)
			}
			return nil
		})
	if err != nil || seen != n {
		t.Errorf("%d rows, %v", seen, err)
	}
}

// TestSettleRefusesRowsThatAreNotText takes the other rows of all outputs.
func TestSettleRefusesRowsThatAreNotText(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
		Outputs: []savedmodel.Spec{spec("n", savedmodel.Int8, -1), spec("s", savedmodel.String, -1, 2),
			spec("b", savedmodel.String, -1)}},
		Options{Outputs: protocol.Outputs{{Tensor: "s", Column: "s", Type: "utf8"}, {Tensor: "n", Column: "n"},
			{Tensor: "b", Column: "b"}}})
	if err != nil {
		t.Fatal(err)
	}
	texts := func(list ...string) (out [][]byte) {
		for _, s := range list {
			out = append(out, []byte(s))
		}
		return out
	}
	outputs := func(strings ...string) []Value {
		return []Value{{DType: savedmodel.String, Shape: []int64{3, 2}, Strings: texts(strings...)},
			{DType: savedmodel.Int8, Shape: []int64{3}, Data: []byte{1, 2, 3}},
			{DType: savedmodel.String, Shape: []int64{3}, Strings: texts("\xff", "b", "c")}}
	}
	rows := NewRows(4)
	rows.Null(1)
	settled, owned := plan.Settle(outputs("a", "ß", "b", "\xff", "", "c"), rows, mem)
	if !owned || !slices.Equal(rows.Positions(), []int{0, 3}) ||
		rows.texts[2] != `output "s" is not UTF-8; map it without the type utf8` {
		t.Fatalf("owned %t, %v", owned, rows.texts)
	}
	err = plan.Records(settled, rows, mem, func(rec arrow.Record, _ bool) error {
		if got := fmt.Sprint(read(rec.Column(0), 0), read(rec.Column(0), 3), read(rec.Column(0), 2),
			read(rec.Column(1), 3), read(rec.Column(2), 0)); got != "[a ß] [ c] <nil> 3\xff" {
			t.Errorf("the rows are %q", got)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for i := range settled {
		settled[i].Release()
	}
	none := NewRows(3)
	if settled, owned := plan.Settle(outputs("\xff", "", "\xff", "", "\xff", ""), none, mem); len(settled) != 0 ||
		!owned || none.Kept() != 0 {
		t.Errorf("%d values of %d rows are left", len(settled), none.Kept())
	}
}
