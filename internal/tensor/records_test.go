// Tests of answers: output tensors as columns, their parts, and the rows whose text is not UTF-8. Random outputs are
// compared with TensorFlow in pyspark-shim/tests/test_property.py.

package tensor

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// outTypes has, for each dtype, three elements at the edges, the column type that Spark reads, and the elements as a
// column prints them, strings in base64.
var outTypes = []struct {
	elements any
	column   arrow.DataType
	texts    string
}{
	{[]float32{float32(minusZero), 0x1p-149, nan}, f32, "-0 1e-45 NaN(0x7fc00001)"},
	{[]float64{minusZero, 5e-324, math.MaxFloat64}, f64, "-0 5e-324 1.7976931348623157e+308"},
	{[]half{0x8001, 0x7bff, 0x7c00}, f32, "-5.9604645e-08 65504 +Inf"},
	{[]bfloat{0x8001, 0x7f7f, 0xff80}, f32, "-9.1835e-41 3.3895314e+38 -Inf"},
	{[]int8{-1 << 7, 0, 1<<7 - 1}, i8, "-128 0 127"},
	{[]int16{-1 << 15, 0, 1<<15 - 1}, i16, "-32768 0 32767"},
	{[]int32{-1 << 31, 0, 1<<31 - 1}, i32, "-2147483648 0 2147483647"},
	{[]int64{-1 << 63, 0, 1<<63 - 1}, i64, "-9223372036854775808 0 9223372036854775807"},
	{[]uint8{0, 1, 1<<8 - 1}, i16, "0 1 255"},
	{[]uint16{0, 1, 1<<16 - 1}, i32, "0 1 65535"},
	{[]uint32{0, 1, 1<<32 - 1}, i64, "0 1 4294967295"},
	{[]uint64{0, 1, 1<<64 - 1}, decimal, "0 1 18446744073709551615"},
	{[]bool{true, false, true}, boolean, "true false true"},
	{[]string{"", "\x00", "ß"}, blob, " AA== w58="},
}

// tensorTypes are the column types of the layout tensor that differ from outTypes.
var tensorTypes = map[savedmodel.DType]arrow.DataType{
	savedmodel.Uint8: u8, savedmodel.Uint16: arrow.PrimitiveTypes.Uint16,
	savedmodel.Uint32: arrow.PrimitiveTypes.Uint32,
	savedmodel.Uint64: arrow.PrimitiveTypes.Uint64, savedmodel.Float16: arrow.FixedWidthTypes.Float16,
}

// anyInput are the inputs of tests in which only outputs matter.
var anyInput = specs("x float32 -1")

var outDTypes = []savedmodel.DType{
	savedmodel.Float32, savedmodel.Float64, savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64,
	savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Uint64, savedmodel.Float16, savedmodel.Bfloat16,
	savedmodel.Bool, savedmodel.String,
}

// printed returns the rows of an array as text.
func printed(a arrow.Array) string {
	rows := make([]string, a.Len())
	for i := range rows {
		rows[i] = array.NullValueStr
		if a.IsNull(i) {
			continue
		}
		switch a := a.(type) {
		case array.ListLike:
			lo, hi := a.ValueOffsets(i)
			inner := array.NewSlice(a.ListValues(), lo, hi)
			rows[i] = printed(inner)
			inner.Release()
		case *array.Float16: // whose text is wrong for numbers below 2^-14
			rows[i] = fmt.Sprint(FromHalf(a.Value(i).Uint16()))
		case *array.Float32:
			if rows[i] = a.ValueStr(i); rows[i] == "NaN" {
				rows[i] = fmt.Sprintf("NaN(%#x)", math.Float32bits(a.Value(i)))
			}
		default:
			rows[i] = a.ValueStr(i)
		}
	}
	return "[" + strings.Join(rows, " ") + "]"
}

// TestRecords writes each dtype in both layouts and at several depths of lists: to rows that all have an answer, to
// some that have none between them, and to such alone.
func TestRecords(t *testing.T) {
	for _, c := range outTypes {
		value := tensorOf(c.elements)
		for _, l := range []struct {
			inner         []int64
			layout        string
			column        func(arrow.DataType) arrow.DataType
			whole, spread string // with one row null and one refused
		}{
			{nil, "", nil, "[%s %s %s]", "[(null) %s %s (null) %s]"},
			{nil, protocol.LayoutTensor, nil, "[%s %s %s]", "[(null) %s %s (null) %s]"},
			{[]int64{1}, "", list, "[[%s] [%s] [%s]]", "[(null) [%s] [%s] (null) [%s]]"},
			{[]int64{3}, "", list, "[[%s %s %s]]", "[(null) [%s %s %s] (null)]"},
			{[]int64{3, 1}, "", listOfLists, "[[[%s] [%s] [%s]]]", "[(null) [[%s] [%s] [%s]] (null)]"},
			{[]int64{1, 3}, "", listOfLists, "[[[%s %s %s]]]", "[(null) [[%s %s %s]] (null)]"},
			{[]int64{1}, protocol.LayoutTensor, listOf1, "[[%s] [%s] [%s]]", "[(null) [%s] [%s] (null) [%s]]"},
			{[]int64{1, 3}, protocol.LayoutTensor, listOf3, "[[%s %s %s]]", "[(null) [%s %s %s] (null)]"},
		} {
			texts := strings.Split(c.texts, " ")
			column, output := c.column, protocol.Output{Tensor: "y", Column: "y"}
			if own, ok := tensorTypes[value.DType]; ok && l.layout != "" {
				column = own
			}
			if value.DType == savedmodel.String && len(l.inner) == 1 {
				column, output.Type, texts = str, protocol.TypeUTF8, c.elements.([]string)
			}
			if l.column != nil {
				column = l.column(column)
			}
			plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput,
				Outputs: []savedmodel.Spec{spec("y", value.DType,
					append([]int64{-1}, l.inner...)...)}},
				Options{Layout: l.layout, ErrorColumn: "error", Outputs: protocol.Outputs{output}})
			if err != nil {
				t.Fatal(err)
			}
			if field := plan.Schema().Field(0); !arrow.TypeEqual(field.Type, column) || !field.Nullable {
				t.Errorf("%s is %s, want %s", value.DType, field, column)
			}
			kept := int(3 / elements(l.inner))
			value.Shape = append([]int64{int64(kept)}, l.inner...)
			whole, spread, nothing := NewRows(kept), NewRows(kept+2), NewRows(1)
			spread.Null(0)
			spread.Refuse(max(kept, 2), "bad")
			nothing.Refuse(0, "bad")
			format := func(format string) string { return fmt.Sprintf(format, texts[0], texts[1], texts[2]) }
			for rows, want := range map[*Rows]string{whole: format(l.whole), spread: format(l.spread),
				nothing: "[(null)]"} {
				outputs := []Value{value}
				if rows == nothing {
					outputs = nil
				} else if settled, owned := plan.Settle(outputs, rows, nil); owned || len(settled) != 1 {
					t.Errorf("%d settled, %t", len(settled), owned)
				}
				mem, parts := checkedMemory(t), 0
				err = plan.Records(outputs, rows, mem, func(rec arrow.Record, last bool) error {
					parts++
					y, reasons := rec.Column(0), rec.Column(1).(*array.String)
					if got := printed(y); got != want || y.NullN() != rows.Len()-rows.Kept() || !last ||
						!rec.Schema().Equal(plan.Schema()) {
						t.Errorf("%s, %d: %s with %d nulls, want %s", value.DType, l.inner, got, y.NullN(), want)
					}
					for row := range rows.Len() {
						if text, refused := rows.reason(row); reasons.IsValid(row) != refused ||
							reasons.Value(row) != text {
							t.Errorf("row %d: reason %q, want %q", row, reasons.Value(row), text)
						}
					}
					return nil
				})
				if err != nil || parts != 1 {
					t.Errorf("%s: %d parts, %v", value.DType, parts, err)
				}
			}
		}
	}
}

// TestRecordsOfNoElements has rows of empty lists.
func TestRecordsOfNoElements(t *testing.T) {
	for output, want := range map[string]string{
		"y float32 -1 0": "[[] (null) []]", "y string -1 2 0": "[[[] []] (null) [[] []]]",
		"y bool -1 0 3": "[[] (null) []]",
	} {
		y := specs(output)[0]
		rows := NewRows(3)
		rows.Null(1)
		value := Value{DType: y.DType, Shape: append([]int64{2}, y.Shape[1:]...)}
		err := newPlan(t, "x float32 -1", output, Options{}).Records([]Value{value}, rows, checkedMemory(t),
			func(rec arrow.Record, _ bool) error {
				if got := printed(rec.Column(0)); got != want {
					t.Errorf("%s is %s, want %s", output, got, want)
				}
				return nil
			})
		if err != nil {
			t.Error(err)
		}
	}
}

func listOfLists(t arrow.DataType) arrow.DataType { return list(list(t)) }

func listOf1(t arrow.DataType) arrow.DataType { return arrow.FixedSizeListOf(1, t) }

func listOf3(t arrow.DataType) arrow.DataType { return arrow.FixedSizeListOf(3, t) }

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
	plan := newPlan(t, "x float32 -1", "id int64 -1, text string -1, wide float32 -1 262144", Options{})
	seen, parts, sawLast := 0, 0, false
	err := plan.Records([]Value{id, text, wide}, rows, mem, func(rec arrow.Record, last bool) error {
		parts++
		sawLast = last
		bytes := 0
		for row := range int(rec.NumRows()) {
			wantID, wantText := "(null)", "(null)"
			id, text, isList := rec.Column(0).ValueStr(row), rec.Column(1).ValueStr(row), rec.Column(2).IsValid(row)
			if seen%2 == 0 && seen < 2*kept {
				wantID, wantText = fmt.Sprint(seen), base64.StdEncoding.EncodeToString(fmt.Append(nil, seen))
				bytes += width * 4
				lists := rec.Column(2).(*array.List)
				lo, hi := lists.ValueOffsets(row)
				if first := lists.ListValues().(*array.Float32).Value(int(lo)); first != float32(seen) ||
					hi-lo != width {
					t.Errorf("row %d begins with %v and has %d elements", seen, first, hi-lo)
				}
			}
			if id != wantID || text != wantText || isList != (wantID != "(null)") {
				t.Fatalf("row %d: %s, %s, %t", seen, id, text, isList)
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
	plan, rows := newPlan(t, "x float32 -1", "s string -1", Options{}), 0
	err := plan.Records([]Value{value}, NewRows(n), memory.DefaultAllocator, func(rec arrow.Record, _ bool) error {
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
	plan := newPlan(t, "x float32 -1", "y float32 -1 2", Options{})
	for _, c := range []struct {
		dtype savedmodel.DType
		shape []int64
		kind  fault.Kind
		texts string
	}{
		{savedmodel.Float32, []int64{1, 2}, fault.BadRequest, `output "y"|first dimension 1|batch of 3 rows`},
		{savedmodel.Int32, []int64{3, 2}, fault.Internal, `"y" float32 [?,2]|int32`},
		{savedmodel.Float32, []int64{3}, fault.Internal, `"y" float32 [?,2]|1 dimensions`},
		{savedmodel.Float32, []int64{3, 1}, fault.Internal, `"y" float32 [?,2]|[3,1]`},
	} {
		value := Value{DType: c.dtype, Shape: c.shape, Data: make([]byte, 24)}
		err := plan.Records([]Value{value}, NewRows(3), memory.DefaultAllocator, func(arrow.Record, bool) error {
			t.Error("a record batch was written")
			return nil
		})
		expect.Fault(t, err, c.kind, strings.Split(c.texts, "|")...)
	}
	huge := Value{DType: savedmodel.String, Shape: []int64{1}, Strings: [][]byte{make([]byte, MaxRowBytes+1)}}
	err := newPlan(t, "x float32 -1", "s string -1", Options{}).
		Records([]Value{huge}, NewRows(1), memory.DefaultAllocator, nil)
	expect.Fault(t, err, fault.Exhausted, "256 MiB")
}

// TestShapeOfTheRequestIsChecked has outputs whose shape, or a part of it, is only in the request or the signature.
func TestShapeOfTheRequestIsChecked(t *testing.T) {
	for output, shape := range map[string][]int64{"y float32 ?": {-1, -1, 3}, "y float32 -1 -1 3": {-1, -1, -1}} {
		plan := newPlan(t, "x float32 -1", output,
			Options{Outputs: protocol.Outputs{{Tensor: "y", Column: "c", Shape: shape}}})
		good := Value{DType: savedmodel.Float32, Shape: []int64{2, 1, 3}, Data: make([]byte, 24)}
		if err := plan.CheckOutputs([]Value{good}, 2); err != nil {
			t.Error(err)
		}
		for _, shape := range [][]int64{{2, 3}, {2, 1, 4}, {2}, {}} {
			err := plan.CheckOutputs([]Value{{DType: savedmodel.Float32, Shape: shape}}, 2)
			expect.Fault(t, err, fault.BadRequest, `output "y"`, shapeText(shape), "[?,?,3]")
		}
		expect.Fault(t, plan.CheckOutputs(nil, 2), fault.Internal, "0 outputs came back, want 1")
	}
}

// TestTensorLayoutHasItsShape reads the field's metadata and the elements of rows without an answer.
func TestTensorLayoutHasItsShape(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	plan := newPlan(t, "x float32 -1", "y uint8 -1 1 2, z string -1 1", Options{Layout: protocol.LayoutTensor})
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
	err := plan.Records(outputs, rows, mem, func(rec arrow.Record, _ bool) error {
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
	plan := newPlan(t, "x float32 -1", "y uint8 -1 1048576", Options{Layout: protocol.LayoutTensor})
	rows := NewRows(n)
	for row := 1; row < n; row++ {
		rows.Null(row)
	}
	seen := 0
	err := plan.Records([]Value{{DType: savedmodel.Uint8, Shape: []int64{1, width}, Data: make([]byte, width)}}, rows,
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
	plan := newPlan(t, "x float32 -1", "n int8 -1, s string -1 2, b string -1", Options{Outputs: protocol.Outputs{
		{Tensor: "s", Column: "s", Type: "utf8"}, {Tensor: "n", Column: "n"}, {Tensor: "b", Column: "b"}}})
	outputs := func(texts ...string) []Value {
		s := tensorOf(texts)
		s.Shape = []int64{3, 2}
		return []Value{s, tensorOf([]int8{1, 2, 3}), tensorOf([]string{"\xff", "b", "c"})}
	}
	rows := NewRows(4)
	rows.Null(1)
	settled, owned := plan.Settle(outputs("a", "ß", "b", "\xff", "", "c"), rows, mem)
	if !owned || !slices.Equal(rows.Positions(), []int{0, 3}) ||
		rows.texts[2] != `output "s" is not UTF-8; map it without the type utf8` {
		t.Fatalf("owned %t, %v", owned, rows.texts)
	}
	err := plan.Records(settled, rows, mem, func(rec arrow.Record, _ bool) error {
		got := printed(rec.Column(0)) + printed(rec.Column(1)) + printed(rec.Column(2))
		if got != "[[a ß] (null) (null) [ c]][1 (null) (null) 3][/w== (null) (null) Yw==]" {
			t.Errorf("the rows are %s", got)
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
