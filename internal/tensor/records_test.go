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
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// outTypes are the column types that Spark reads for each tensor type.
var outTypes = map[savedmodel.DType]arrow.DataType{
	savedmodel.Float32: arrow.PrimitiveTypes.Float32, savedmodel.Float64: arrow.PrimitiveTypes.Float64,
	savedmodel.Int8: arrow.PrimitiveTypes.Int8, savedmodel.Int16: arrow.PrimitiveTypes.Int16, savedmodel.Int32: arrow.PrimitiveTypes.Int32, savedmodel.Int64: arrow.PrimitiveTypes.Int64,
	savedmodel.Uint8: arrow.PrimitiveTypes.Int16, savedmodel.Uint16: arrow.PrimitiveTypes.Int32, savedmodel.Uint32: arrow.PrimitiveTypes.Int64,
	savedmodel.Bool: arrow.FixedWidthTypes.Boolean, savedmodel.String: arrow.BinaryTypes.Binary,
}

// anyInput stands for the inputs where outputs alone matter.
var anyInput = []savedmodel.Spec{spec("x", savedmodel.Float32, -1)}

var outDTypes = []savedmodel.DType{
	savedmodel.Float32, savedmodel.Float64, savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64,
	savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Bool, savedmodel.String,
}

// outElement draws an element of a tensor: how the tensor holds it, and what the column should say.
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
	case savedmodel.Int8:
		return bits, int8(wide)
	case savedmodel.Int16:
		return bits, int16(wide)
	case savedmodel.Uint8:
		return bits, int16(wide)
	case savedmodel.Int32, savedmodel.Uint16:
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
	case *array.Boolean:
		return c.Value(row)
	case *array.Binary:
		return string(c.Value(row))
	case *array.String:
		return c.Value(row)
	}
	panic(fmt.Sprintf("no way to read %T", column))
}

// draw appends one row of an output with the given inner dimensions to value, and returns what the column should say.
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

// TestRecordsAgreeWithRows compares answers of random outputs and row states with what each row should hold.
func TestRecordsAgreeWithRows(t *testing.T) {
	for seed := range uint64(1500) {
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
		var outputs []Value
		var want [][]any // by column, then row
		for i := range 1 + r.IntN(3) {
			dtype := outDTypes[r.IntN(len(outDTypes))]
			shape := []int64{-1}
			value := Value{DType: dtype, Shape: []int64{int64(rows.Kept())}}
			column := outTypes[dtype]
			for range r.IntN(4) {
				size := r.Int64N(4)
				shape, value.Shape = append(shape, []int64{-1, size}[r.IntN(2)]), append(value.Shape, size)
				column = arrow.ListOf(column)
			}
			signature.Outputs = append(signature.Outputs, savedmodel.Spec{Name: fmt.Sprintf("out%d", i), DType: dtype, Shape: shape})
			expected := make([]any, rows.Len())
			for _, row := range rows.Positions() {
				expected[row] = draw(r, &value, value.Shape[1:])
			}
			outputs, want = append(outputs, value), append(want, expected)
		}
		if rows.Kept() == 0 && r.IntN(2) == 0 {
			outputs = nil // nothing ran
		}
		options := Options{}
		if r.IntN(2) == 0 {
			options.ErrorColumn = "error"
			texts := make([]any, rows.Len())
			for row, text := range rows.texts {
				texts[row] = text
			}
			want = append(want, texts)
		}
		plan, err := NewPlan(signature, options)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
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

// TestLargeAnswersComeInParts cuts 130 MiB: rows stay in order, rows without an answer lie in all parts and fill
// the last one alone.
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
		spec("id", savedmodel.Int64, -1), spec("text", savedmodel.String, -1), spec("wide", savedmodel.Float32, -1, width),
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
				if first := lists.ListValues().(*array.Float32).Value(int(lo)); first != float32(seen) || hi-lo != width {
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
	if err := plan.Records([]Value{id, text, wide}, rows, mem, func(arrow.Record, bool) error { return broke }); !errors.Is(err, broke) {
		t.Errorf("the writer's error became %v", err)
	}
}

// TestUnevenStringsComeInParts has all its bytes in the last rows: parts are bounded by their own rows, not by the average.
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
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{spec("s", savedmodel.String, -1)}}, Options{})
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
	plan, err := NewPlan(savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1, 2)}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		value Value
		kind  fault.Kind
		parts []string
	}{
		"rows":  {Value{DType: savedmodel.Float32, Shape: []int64{1, 2}, Data: make([]byte, 8)}, fault.BadRequest, []string{`output "y"`, "first dimension 1", "batch of 3 rows"}},
		"dtype": {Value{DType: savedmodel.Int32, Shape: []int64{3, 2}, Data: make([]byte, 24)}, fault.Internal, []string{`"y" float32 [?,2]`, "int32"}},
		"rank":  {Value{DType: savedmodel.Float32, Shape: []int64{3}, Data: make([]byte, 12)}, fault.Internal, []string{`"y" float32 [?,2]`, "1 dimensions"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := plan.Records([]Value{c.value}, NewRows(3), memory.DefaultAllocator, func(arrow.Record, bool) error {
				t.Error("a record batch was written")
				return nil
			})
			wantFault(t, err, c.kind, c.parts...)
		})
	}
	huge := Value{DType: savedmodel.String, Shape: []int64{1}, Strings: [][]byte{make([]byte, MaxRowBytes+1)}}
	texts, err := NewPlan(savedmodel.Signature{Inputs: anyInput, Outputs: []savedmodel.Spec{spec("s", savedmodel.String, -1)}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = texts.Records([]Value{huge}, NewRows(1), memory.DefaultAllocator, nil)
	wantFault(t, err, fault.Exhausted, "256 MiB")
}
