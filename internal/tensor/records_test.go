// Tests of answers: output tensors as columns, their parts, and the rows whose text is not UTF-8.

package tensor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
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

// outTypes are the column types that Spark reads for each tensor type.
var outTypes = map[savedmodel.DType]arrow.DataType{
	savedmodel.Float32: arrow.PrimitiveTypes.Float32, savedmodel.Float64: arrow.PrimitiveTypes.Float64,
	savedmodel.Int8: arrow.PrimitiveTypes.Int8, savedmodel.Int16: arrow.PrimitiveTypes.Int16,
	savedmodel.Int32: arrow.PrimitiveTypes.Int32, savedmodel.Int64: arrow.PrimitiveTypes.Int64,
	savedmodel.Uint8: arrow.PrimitiveTypes.Int16, savedmodel.Uint16: arrow.PrimitiveTypes.Int32,
	savedmodel.Uint32: arrow.PrimitiveTypes.Int64,
	savedmodel.Uint64: &arrow.Decimal128Type{Precision: 20}, savedmodel.Float16: arrow.PrimitiveTypes.Float32,
	savedmodel.Bfloat16: arrow.PrimitiveTypes.Float32,
	savedmodel.Bool:     arrow.FixedWidthTypes.Boolean, savedmodel.String: arrow.BinaryTypes.Binary,
}

// tensorTypes are the column types of the layout tensor that differ from outTypes.
var tensorTypes = map[savedmodel.DType]arrow.DataType{
	savedmodel.Uint8: arrow.PrimitiveTypes.Uint8, savedmodel.Uint16: arrow.PrimitiveTypes.Uint16,
	savedmodel.Uint32: arrow.PrimitiveTypes.Uint32, savedmodel.Uint64: arrow.PrimitiveTypes.Uint64,
	savedmodel.Float16: arrow.FixedWidthTypes.Float16,
}

// anyInput are the inputs of tests in which only outputs matter.
var anyInput = []savedmodel.Spec{spec("x", savedmodel.Float32, -1)}

var outDTypes = []savedmodel.DType{
	savedmodel.Float32, savedmodel.Float64, savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64,
	savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Uint64, savedmodel.Float16, savedmodel.Bfloat16,
	savedmodel.Bool, savedmodel.String,
}

// outElement draws an element of a tensor: as the tensor holds it, and as the column should.
func outElement(r *rand.Rand, dtype savedmodel.DType) (data []byte, want any) {
	bits := binary.LittleEndian.AppendUint64(nil, r.Uint64())[:dtype.Size()]
	wide := binary.LittleEndian.Uint64(append(slices.Clone(bits), make([]byte, 8)...))
	switch dtype {
	case savedmodel.Float32:
		x := r.Float32()
		return binary.LittleEndian.AppendUint32(nil, math.Float32bits(x)), x
	case savedmodel.Float64:
		x := r.Float64()
		return binary.LittleEndian.AppendUint64(nil, math.Float64bits(x)), x
	case savedmodel.Bool:
		return []byte{byte(wide & 1)}, wide&1 == 1
	case savedmodel.String:
		s := fmt.Sprint(r.IntN(1e6))[r.IntN(2):] // sometimes empty
		return []byte(s), s
	case savedmodel.Float16: // neither infinite nor NaN
		bits[1] &= 0xbf
		return bits, FromHalf(uint16(wide & 0xbfff))
	case savedmodel.Bfloat16:
		bits[1] &= 0xbf
		return bits, FromBfloat(uint16(wide & 0xbfff))
	case savedmodel.Uint64:
		return bits, decimal128.FromU64(wide)
	case savedmodel.Int8:
		return bits, int8(wide)
	case savedmodel.Int16:
		return bits, int16(wide)
	case savedmodel.Uint8:
		return bits, int16(wide)
	case savedmodel.Int32:
		return bits, int32(wide)
	case savedmodel.Uint16:
		return bits, int32(wide)
	}
	return bits, int64(wide)
}

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

// draw appends one row of an output with the given inner dimensions to value, and returns the row that the column
// should have.
func draw(r *rand.Rand, value *Value, inner []int64) any {
	if len(inner) == 0 {
		data, want := outElement(r, value.DType)
		if value.DType == savedmodel.String {
			value.Strings = append(value.Strings, data)
		} else {
			value.Data = append(value.Data, data...)
		}
		return want
	}
	list := []any{}
	for range inner[0] {
		list = append(list, draw(r, value, inner[1:]))
	}
	return list
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

// TestRecordsAgreeWithRows compares answers of random outputs and row states with what each row should hold.
func TestRecordsAgreeWithRows(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 2))
		mem := memory.NewCheckedAllocator(dirty{memory.NewGoAllocator()})
		rows := NewRows(r.IntN(10))
		states := 1 + r.IntN(4)
		for row := range rows.Len() {
			switch r.IntN(states) {
			case 1:
				rows.Null(row)
			case 2:
				rows.Refuse(row, fmt.Sprintf("reason %d", row))
			}
		}
		signature := savedmodel.Signature{Inputs: anyInput}
		options := Options{}
		tensor := r.IntN(3) == 0
		if tensor {
			options.Layout = protocol.LayoutTensor
		}
		var outputs []Value
		var want [][]any // by column, then row
		var types []arrow.DataType
		for i := range 1 + r.IntN(3) {
			dtype := outDTypes[r.IntN(len(outDTypes))]
			out := savedmodel.Spec{Name: fmt.Sprintf("out%d", i), DType: dtype, Shape: []int64{-1}}
			entry := protocol.Output{Tensor: out.Name, Column: out.Name}
			value := Value{DType: dtype, Shape: []int64{int64(rows.Kept())}}
			column := outTypes[dtype]
			if other, ok := tensorTypes[dtype]; tensor && ok {
				column = other
			}
			if dtype == savedmodel.String && r.IntN(2) == 0 {
				column, entry.Type = arrow.BinaryTypes.String, "utf8"
			}
			flat := int64(1)
			for range r.IntN(4) {
				size := r.Int64N(4)
				if tensor {
					size++
				}
				dim := []int64{-1, size}[r.IntN(2)]
				if tensor && r.IntN(2) == 0 {
					dim = size
				}
				out.Shape, value.Shape = append(out.Shape, dim), append(value.Shape, size)
				flat *= size
				if !tensor {
					column = arrow.ListOf(column)
				}
			}
			if tensor && len(out.Shape) > 1 {
				column = arrow.FixedSizeListOf(int32(flat), column)
			}
			// The request has the dimensions that the signature leaves open.
			if r.IntN(4) == 0 || tensor && slices.Contains(out.Shape[1:], -1) {
				entry.Shape = append([]int64{-1}, value.Shape[1:]...)
				if r.IntN(2) == 0 {
					out.Shape, out.UnknownRank = nil, true
				}
			}
			signature.Outputs = append(signature.Outputs, out)
			options.Outputs = append(options.Outputs, entry)
			expected := make([]any, rows.Len())
			for _, row := range rows.Positions() {
				expected[row] = draw(r, &value, value.Shape[1:])
				if tensor && len(value.Shape) > 1 {
					expected[row] = flatten(expected[row])
				}
			}
			outputs, want, types = append(outputs, value), append(want, expected), append(types, column)
		}
		if rows.Kept() == 0 && r.IntN(2) == 0 {
			outputs = nil // nothing ran
		}
		if r.IntN(2) == 0 {
			options.ErrorColumn = "error"
			texts := make([]any, rows.Len())
			for row := range texts {
				if text, ok := rows.reason(row); ok {
					texts[row] = text
				}
			}
			want = append(want, texts)
		}
		plan, err := NewPlan(signature, options)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for i, column := range types {
			if field := plan.Schema().Field(i); !arrow.TypeEqual(field.Type, column) || !field.Nullable {
				t.Fatalf("seed %d, column %d is %s, want %s", seed, i, field, column)
			}
		}
		if outputs != nil {
			settled, owned := plan.Settle(outputs, rows, mem)
			if err := plan.CheckOutputs(outputs, rows.Kept()); err != nil || owned || len(settled) != len(outputs) {
				t.Fatalf("seed %d: %d settled, %t, %v", seed, len(settled), owned, err)
			}
		}
		parts := 0
		err = plan.Records(outputs, rows, mem, func(rec arrow.Record, last bool) error {
			parts++
			if !last || rec.NumRows() != int64(rows.Len()) || !rec.Schema().Equal(plan.Schema()) {
				t.Fatalf("seed %d: %d rows, last %t, schema %s", seed, rec.NumRows(), last, rec.Schema())
			}
			for i, column := range rec.Columns() {
				nulls := 0
				for row := range rows.Len() {
					got := read(column, row)
					if got == nil {
						nulls++
					}
					if !reflect.DeepEqual(got, want[i][row]) {
						t.Fatalf("seed %d, column %d, row %d: %v, want %v", seed, i, row, got, want[i][row])
					}
				}
				if column.NullN() != nulls {
					t.Fatalf("seed %d, column %d says %d nulls, has %d", seed, i, column.NullN(), nulls)
				}
			}
			return nil
		})
		if err != nil || parts != 1 {
			t.Fatalf("seed %d: %d parts, %v", seed, parts, err)
		}
		mem.AssertSize(t, 0)
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
