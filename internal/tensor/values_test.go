// Tests of input tensors: random columns against an oracle that goes row by row, and each kind of error.

package tensor

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
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

// The oracle works on plain Go values, a row at a time: nil is a null, []any a list, and an element is an
// int64, a uint64, a float64, a bool or a string.

// huge is a decimal of more than 64 bits.
type huge struct{}

var (
	signed   = []savedmodel.DType{savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64}
	unsigned = []savedmodel.DType{savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Uint64}
	doubles  = []savedmodel.DType{savedmodel.Float32, savedmodel.Float64}
	halves   = []savedmodel.DType{savedmodel.Float16, savedmodel.Bfloat16}
	strings_ = []savedmodel.DType{savedmodel.String}
)

// leafTypes lists, for each element type of a column, the tensor types that it feeds.
var leafTypes = map[arrow.DataType][]savedmodel.DType{
	arrow.PrimitiveTypes.Int8:                slices.Concat(signed, unsigned, doubles, halves),
	arrow.PrimitiveTypes.Int16:               slices.Concat(signed[1:], unsigned, doubles),
	arrow.PrimitiveTypes.Int32:               slices.Concat(signed[2:], unsigned, doubles[1:]),
	arrow.PrimitiveTypes.Int64:               slices.Concat(signed[3:], unsigned),
	arrow.PrimitiveTypes.Uint8:               slices.Concat(signed[1:], unsigned, doubles, halves),
	arrow.PrimitiveTypes.Uint16:              slices.Concat(signed[2:], unsigned, doubles),
	arrow.PrimitiveTypes.Uint32:              slices.Concat(signed[3:], unsigned, doubles[1:]),
	arrow.PrimitiveTypes.Uint64:              unsigned,
	&arrow.Decimal128Type{Precision: 20}:     unsigned,
	arrow.FixedWidthTypes.Float16:            slices.Concat(halves[:1], doubles),
	arrow.PrimitiveTypes.Float32:             slices.Concat(doubles, halves),
	arrow.PrimitiveTypes.Float64:             doubles,
	arrow.FixedWidthTypes.Boolean:            {savedmodel.Bool},
	arrow.BinaryTypes.String:                 strings_,
	arrow.BinaryTypes.LargeString:            strings_,
	arrow.BinaryTypes.Binary:                 strings_,
	arrow.BinaryTypes.StringView:             strings_,
	arrow.BinaryTypes.BinaryView:             strings_,
	&arrow.FixedSizeBinaryType{ByteWidth: 3}: strings_,
}

// leaves are the keys of leafTypes in a fixed order, so that a seed means one case.
var leaves = slices.SortedFunc(maps.Keys(leafTypes), func(a, b arrow.DataType) int {
	return strings.Compare(a.String(), b.String())
})

// level is one list around the elements of a column.
type level struct {
	kind int // 0 list, 1 large list, 2 list view, 3 large list view, 4 fixed-size list
	size int // of most rows
}

const fixedSize = 4

func (l level) around(t arrow.DataType) arrow.DataType {
	switch l.kind {
	case 0:
		return arrow.ListOf(t)
	case 1:
		return arrow.LargeListOf(t)
	case 2:
		return arrow.ListViewOf(t)
	case 3:
		return arrow.LargeListViewOf(t)
	}
	return arrow.FixedSizeListOf(int32(l.size), t)
}

// element draws one element that the type can hold exactly. For a checked dtype a few are out of range.
func element(r *rand.Rand, leaf arrow.DataType, dtype savedmodel.DType) any {
	switch leaf.ID() {
	case arrow.BOOL:
		return r.IntN(2) == 1
	case arrow.FIXED_SIZE_BINARY:
		return fmt.Sprint(100 + r.IntN(900))
	case arrow.STRING, arrow.LARGE_STRING, arrow.BINARY, arrow.STRING_VIEW, arrow.BINARY_VIEW:
		return strings.Repeat("ß", 5*r.IntN(4)) + fmt.Sprint(r.IntN(100))
	case arrow.FLOAT16:
		return float64(r.IntN(2048)) / 8
	case arrow.FLOAT32:
		if slices.Contains(halves, dtype) && r.IntN(20) > 0 {
			return float64(float32(r.NormFloat64()))
		}
		return float64(math.Float32frombits(uint32(r.Uint32()&0x7effffff) | uint32(r.IntN(2))<<31))
	case arrow.FLOAT64:
		return (r.Float64() - 0.5) * 1e6
	}
	bits := leaf.(arrow.FixedWidthDataType).BitWidth()
	isUnsigned := strings.HasPrefix(leaf.Name(), "uint")
	if slices.Contains(unsigned, dtype) && r.IntN(20) > 0 {
		bits = min(bits, 8*dtype.Size()) // fits, or nearly: int8 to uint8 has no sign
		if !isUnsigned {
			bits--
		}
		return int64(r.Uint64() >> (64 - bits) >> max(bits-63, 0))
	}
	switch {
	case leaf.ID() == arrow.DECIMAL128:
		return []any{huge{}, r.Uint64(), int64(-1)}[r.IntN(3)]
	case isUnsigned:
		return r.Uint64() >> (64 - bits)
	}
	return int64(r.Uint64()) >> (64 - bits)
}

// value draws one row below the given levels. A row that is not regular may hold nulls. Every list may have a length of
// its own if ragged is set.
func value(r *rand.Rand, levels []level, element func() any, regular, ragged bool) any {
	if !regular && r.IntN(4) == 0 {
		return nil
	}
	if len(levels) == 0 {
		return element()
	}
	size := levels[0].size
	if ragged && levels[0].kind != fixedSize {
		size = r.IntN(4)
	}
	list := make([]any, size)
	for i := range list {
		list[i] = value(r, levels[1:], element, regular, ragged)
	}
	return list
}

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

// anywhere reports whether a condition holds for v or for an element in it, at any depth.
func anywhere(v any, is func(any) bool) bool {
	list, isList := v.([]any)
	return is(v) || isList && slices.ContainsFunc(list, func(e any) bool { return anywhere(e, is) })
}

func hasNull(v any) bool { return anywhere(v, func(v any) bool { return v == nil }) }

// outside reports whether an element is out of the range of a checked dtype.
func outside(v any, dtype savedmodel.DType) bool {
	switch v := v.(type) {
	case huge:
		return true
	case uint64:
		return slices.Contains(unsigned, dtype) && dtype != savedmodel.Uint64 && v>>(8*dtype.Size()) != 0
	case int64:
		return slices.Contains(unsigned, dtype) && (v < 0 || dtype != savedmodel.Uint64 && v>>(8*dtype.Size()) != 0)
	case float64:
		// Halfway between the largest number and the next power of two rounds up.
		return dtype == savedmodel.Float16 && math.Abs(v) >= 65520 ||
			dtype == savedmodel.Bfloat16 && math.Abs(v) >= 0x1.ffp127
	}
	return false
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

// dictionary replaces the elements below all lists by indices of a type into a dictionary that has them in another
// order, and one unused element. Some nulls are in the indices, the others in the dictionary.
func dictionary(t *testing.T, r *rand.Rand, data arrow.ArrayData, index arrow.DataType,
	mem memory.Allocator) arrow.ArrayData {
	if len(data.Children()) > 0 {
		child := dictionary(t, r, data.Children()[0], index, mem)
		defer child.Release()
		var dtype arrow.DataType
		switch list := data.DataType().(type) {
		case *arrow.ListType:
			dtype = arrow.ListOf(child.DataType())
		case *arrow.LargeListType:
			dtype = arrow.LargeListOf(child.DataType())
		case *arrow.ListViewType:
			dtype = arrow.ListViewOf(child.DataType())
		case *arrow.LargeListViewType:
			dtype = arrow.LargeListViewOf(child.DataType())
		case *arrow.FixedSizeListType:
			dtype = arrow.FixedSizeListOf(list.Len(), child.DataType())
		}
		return array.NewData(dtype, data.Len(), data.Buffers(), []arrow.ArrayData{child}, data.NullN(), data.Offset())
	}
	plain := array.MakeFromData(data)
	defer plain.Release()
	n := plain.Len()
	by := 0
	values := plain
	// which cannot be joined
	if id := data.DataType().ID(); n > 0 && id != arrow.STRING_VIEW && id != arrow.BINARY_VIEW {
		by = r.IntN(n)
		back, front := array.NewSlice(plain, int64(by), int64(n)), array.NewSlice(plain, 0, int64(by))
		var err error
		if values, err = array.Concatenate([]arrow.Array{back, front}, mem); err != nil {
			t.Fatal(err)
		}
		back.Release()
		front.Release()
		defer values.Release()
	}
	indices := array.NewBuilder(mem, index)
	defer indices.Release()
	for i := range n {
		if plain.IsNull(i) && r.IntN(2) == 0 {
			indices.AppendNull()
			continue
		}
		appendValue(indices, int64((i-by+n)%n))
	}
	at := indices.NewArray()
	defer at.Release()
	return array.NewDataWithDictionary(&arrow.DictionaryType{IndexType: index, ValueType: data.DataType()}, n,
		at.Data().Buffers(), at.NullN(), 0, values.Data().(*array.Data))
}

// appendTensor appends the elements of a row as a tensor of dtype holds them.
func appendTensor(data []byte, texts [][]byte, v any, dtype savedmodel.DType) ([]byte, [][]byte) {
	if list, ok := v.([]any); ok {
		for _, e := range list {
			data, texts = appendTensor(data, texts, e, dtype)
		}
		return data, texts
	}
	var number uint64
	var float float64
	switch v := v.(type) {
	case string:
		return data, append(texts, []byte(v))
	case bool:
		if v {
			return append(data, 1), texts
		}
		return append(data, 0), texts
	case uint64:
		number, float = v, float64(v)
	case int64:
		number, float = uint64(v), float64(v)
	case float64:
		float = v
	}
	le := binary.LittleEndian
	switch dtype {
	case savedmodel.Float16:
		data = le.AppendUint16(data, nearest(float, FromHalf))
	case savedmodel.Bfloat16:
		data = le.AppendUint16(data, nearest(float, FromBfloat))
	case savedmodel.Float32:
		data = le.AppendUint32(data, math.Float32bits(float32(float)))
	case savedmodel.Float64:
		data = le.AppendUint64(data, math.Float64bits(float))
	default:
		data = append(data, le.AppendUint64(nil, number)[:dtype.Size()]...)
	}
	return data, texts
}

// nearest finds the 16-bit float nearest to x by search, the even one of two.
func nearest(x float64, from func(uint16) float32) uint16 {
	sign := uint16(0)
	if math.Signbit(x) {
		sign, x = 0x8000, -x
	}
	above := uint16(sort.Search(0x7fff, func(h int) bool {
		v := float64(from(uint16(h)))
		return v >= x || math.IsNaN(v)
	}))
	if above > 0 {
		up, down := float64(from(above))-x, x-float64(from(above-1))
		if down < up || down == up && above%2 == 1 {
			above--
		}
	}
	return sign | above
}

// sizes raises dims to the longest list at each level of v, and reports whether a list differs from dims.
func sizes(v any, dims []int64) (differ bool) {
	list, ok := v.([]any)
	if !ok {
		return false
	}
	differ = dims[0] >= 0 && dims[0] != int64(len(list))
	dims[0] = max(dims[0], int64(len(list)))
	for _, e := range list {
		differ = sizes(e, dims[1:]) || differ
	}
	return differ
}

// padded fills the lists of v up to dims.
func padded(v any, dims []int64, filling any) any {
	if len(dims) == 0 {
		if v == nil {
			return filling
		}
		return v
	}
	list, _ := v.([]any)
	out := []any{}
	for i := range int(dims[0]) {
		var e any
		if i < len(list) {
			e = list[i]
		}
		out = append(out, padded(e, dims[1:], filling))
	}
	return out
}

// want is one input, for the oracle.
type want struct {
	rows    []any
	levels  []level
	spec    savedmodel.Spec
	filling any  // nil without padding
	lengths bool // the next input has them
}

// refuses reports whether a row cannot be part of the tensor.
func (w *want) refuses(v any) bool {
	if anywhere(v, func(v any) bool { return outside(v, w.spec.DType) }) {
		return true
	}
	var misfits func(v any, dims []int64) bool
	misfits = func(v any, dims []int64) bool {
		list, ok := v.([]any)
		if !ok {
			return false
		}
		length := int64(len(list))
		return dims[0] >= 0 && (length > dims[0] || length < dims[0] && w.filling == nil) ||
			slices.ContainsFunc(list, func(e any) bool { return misfits(e, dims[1:]) })
	}
	return !w.spec.UnknownRank && misfits(v, w.spec.Shape[1:])
}

// TestValuesAgreeWithRows compares Values on random columns, types, lengths, slices, nulls and selections with an
// oracle that walks the rows one by one.
func TestValuesAgreeWithRows(t *testing.T) {
	disagreed, refusals, paddings := 0, 0, 0
	for seed := range uint64(4000) {
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

		signature := savedmodel.Signature{Outputs: []savedmodel.Spec{spec("y", savedmodel.Float32, -1)}}
		mapping := protocol.Inputs{}
		var fields []arrow.Field
		var columns []arrow.Array
		var wants []want
		for i := range 1 + r.IntN(3) {
			leaf := leaves[r.IntN(len(leaves))]
			dtypes := leafTypes[leaf]
			w := want{spec: savedmodel.Spec{Name: fmt.Sprintf("in%d", i), Tensor: fmt.Sprintf("t%d:0", i),
				DType: dtypes[r.IntN(len(dtypes))], Shape: []int64{-1}}}
			w.levels = make([]level, r.IntN(4))
			column := leaf
			for j := range w.levels {
				w.levels[j] = level{kind: r.IntN(5), size: r.IntN(4)}
				if w.levels[j].kind == fixedSize {
					w.levels[j].size++ // Arrow has no fixed-size list of 0
				}
				w.spec.Shape = append(w.spec.Shape, []int64{-1, int64(w.levels[j].size)}[r.IntN(2)])
			}
			for j := len(w.levels) - 1; j >= 0; j-- {
				column = w.levels[j].around(column)
			}
			if r.IntN(8) == 0 {
				w.spec.Shape, w.spec.UnknownRank = nil, true
			}
			entry := protocol.Input{Tensor: w.spec.Name, Column: w.spec.Name}
			if len(w.levels) > 0 && r.IntN(3) == 0 {
				switch w.spec.DType {
				case savedmodel.String:
					w.filling, entry.Pad = "pad", []byte(`"pad"`)
				case savedmodel.Bool:
					w.filling, entry.Pad = true, []byte("true")
				default:
					w.filling, entry.Pad = int64(7), []byte("7")
				}
			}
			signature.Inputs = append(signature.Inputs, w.spec)
			if len(w.levels) > 0 && r.IntN(4) == 0 {
				w.lengths = true
				entry.Lengths = w.spec.Name + "n"
				all := slices.Concat(signed, unsigned)
				signature.Inputs = append(signature.Inputs,
					savedmodel.Spec{Name: entry.Lengths, Tensor: entry.Lengths + ":0", DType: all[r.IntN(len(all))],
						Shape: []int64{-1}})
			}
			b := array.NewBuilder(mem, column)
			raggedOf := []int{0, 1, 8}[r.IntN(3)] // no row, every row, one in 8
			for row, odd := range irregular {
				ragged := odd || raggedOf > 0 && r.IntN(raggedOf) == 0
				v := value(r, w.levels, func() any { return element(r, leaf, w.spec.DType) }, !odd, ragged)
				w.rows = append(w.rows, v)
				appendValue(b, v)
				if in := row - before; in >= 0 && in < n && odd && !hasNull(v) {
					refused[in] = true // taken out for a reason of its own, like a picture that cannot be decoded
				}
			}
			w.rows = w.rows[before : before+n]
			whole := b.NewArray()
			if r.IntN(4) == 0 {
				all := slices.Concat(signed, unsigned)
				indices := []arrow.DataType{arrow.PrimitiveTypes.Int8, arrow.PrimitiveTypes.Uint8,
					arrow.PrimitiveTypes.Int16, arrow.PrimitiveTypes.Uint16,
					arrow.PrimitiveTypes.Int32, arrow.PrimitiveTypes.Uint32, arrow.PrimitiveTypes.Int64,
					arrow.PrimitiveTypes.Uint64}
				index := indices[r.IntN(len(all))]
				// more elements than it can count
				if index.(arrow.FixedWidthDataType).Bytes() == 1 && len(w.levels) > 1 {
					index = arrow.PrimitiveTypes.Int32
				}
				data := dictionary(t, r, whole.Data(), index, mem)
				whole.Release()
				whole = array.MakeFromData(data)
				data.Release()
				column = whole.DataType()
			}
			columns = append(columns, array.NewSlice(whole, int64(before), int64(before+n)))
			whole.Release()
			b.Release()
			fields = append(fields, arrow.Field{Name: w.spec.Name, Type: column, Nullable: true})
			mapping = append(mapping, entry)
			wants = append(wants, w)
		}
		rec := array.NewRecord(arrow.NewSchema(fields, nil), columns, int64(n))
		for _, column := range columns {
			column.Release()
		}

		plan, err := NewPlan(signature, Options{Inputs: mapping})
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		binding, err := plan.Bind(rec.Schema())
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := binding.Check(rec); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		rows := NewRows(n)
		binding.Nulls(rec, rows, r.IntN(2) == 0)
		var candidates, kept []int
		for row := range n {
			null := slices.ContainsFunc(wants, func(w want) bool { return hasNull(w.rows[row]) })
			if (rows.state[row] != rowKept) != null {
				t.Fatalf("seed %d, row %d: state %d, but null is %t", seed, row, rows.state[row], null)
			}
			if refused[row] {
				rows.Refuse(row, "for the test")
			} else if !null {
				candidates = append(candidates, row)
			}
		}
		if rows.Kept() != len(candidates) || !slices.Equal(rows.Positions(), candidates) {
			t.Fatalf("seed %d: kept %v, want %v", seed, rows.Positions(), candidates)
		}
		if len(candidates) > 0 {
			for _, row := range candidates {
				if !slices.ContainsFunc(wants, func(w want) bool { return w.refuses(w.rows[row]) }) {
					kept = append(kept, row)
				}
			}
			differ := false
			dims := make([][]int64, len(wants))
			for i, w := range wants {
				dims[i] = make([]int64, len(w.levels))
				for j := range dims[i] {
					dims[i][j] = -1
					if !w.spec.UnknownRank {
						dims[i][j] = w.spec.Shape[j+1]
					}
					if dims[i][j] < 0 && w.levels[j].kind == fixedSize {
						dims[i][j] = int64(w.levels[j].size)
					}
				}
				for _, row := range kept {
					differ = sizes(w.rows[row], dims[i]) && w.filling == nil || differ
				}
				for j := range dims[i] {
					dims[i][j] = max(dims[i][j], 0) // nobody can know
				}
			}
			feeds, err := binding.Values(t.Context(), rec, rows, nil, mem)
			refusals += len(candidates) - len(kept)
			switch {
			case !slices.Equal(rows.Positions(), kept):
				t.Fatalf("seed %d: rows %v took part, want %v; %v", seed, rows.Positions(), kept, rows.texts)
			case differ:
				disagreed++
				expect.Fault(t, err, fault.BadRequest, "elements at dimension", `"pad"`)
			case err != nil:
				t.Fatalf("seed %d: %v", seed, err)
			case len(kept) == 0:
				if feeds != nil {
					t.Fatalf("seed %d: %d feeds without a row", seed, len(feeds))
				}
			default:
				for i, w := range wants {
					got := feeds[0].Value
					var data []byte
					var texts [][]byte
					var lengths []byte
					for _, row := range kept {
						data, texts = appendTensor(data, texts, padded(w.rows[row], dims[i], w.filling), w.spec.DType)
						if w.lengths {
							lengths, _ = appendTensor(lengths, nil, int64(len(w.rows[row].([]any))),
								feeds[1].Value.DType)
						}
					}
					shape := append([]int64{int64(len(kept))}, dims[i]...)
					same := slices.EqualFunc(got.Strings, texts,
						func(a, b []byte) bool { return string(a) == string(b) })
					if feeds[0].Tensor != w.spec.Tensor || got.DType != w.spec.DType ||
						!slices.Equal(got.Shape, shape) || string(got.Data) != string(data) || !same {
						t.Fatalf("seed %d, input %d: %s\n got %v %v %v %q\nwant %v %v %v %q", seed, i, fields[i].Type,
							got.DType, got.Shape, got.Data, got.Strings, w.spec.DType, shape, data, texts)
					}
					if w.filling != nil {
						paddings++
					}
					feeds[0].Value.Release()
					feeds = feeds[1:]
					if w.lengths {
						if string(feeds[0].Value.Data) != string(lengths) || feeds[0].Tensor != w.spec.Name+"n:0" ||
							!slices.Equal(feeds[0].Value.Shape, []int64{int64(len(kept))}) {
							t.Fatalf("seed %d, input %d: lengths %v, want %v", seed, i, feeds[0].Value.Data, lengths)
						}
						feeds[0].Value.Release()
						feeds = feeds[1:]
					}
				}
				if len(feeds) > 0 {
					t.Fatalf("seed %d: %d feeds too many", seed, len(feeds))
				}
			}
		}
		rec.Release()
		mem.AssertSize(t, 0)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("%d batches with lists that disagree, %d refused rows, %d padded inputs", disagreed, refusals, paddings)
	if disagreed < 100 || refusals < 100 || paddings < 100 {
		t.Error("too few cases of a kind")
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
			texts: []string{`"x" float32 [?,4]`, `column "c"`, "list<item: utf8", "write CAST(c AS ARRAY<FLOAT>)"}},
		"narrowing": {input: spec("x", savedmodel.Int32, -1), column: i64,
			texts: []string{`"x" int32 [?]`, `column "c" of int64`, "write CAST(c AS INT)"}},
		"narrowing in lists": {input: spec("x", savedmodel.Int32, -1, -1, -1), column: list(list(i64)),
			texts: []string{"write CAST(c AS ARRAY<ARRAY<INT>>)"}},
		"int32 to float32": {input: spec("x", savedmodel.Float32, -1), column: arrow.PrimitiveTypes.Int32,
			texts: []string{`"x" float32 [?]`, "int32", "CAST(c AS FLOAT)"}},
		"double to half": {input: spec("x", savedmodel.Float16, -1), column: arrow.PrimitiveTypes.Float64,
			texts: []string{"float16", "float64", "CAST(c AS FLOAT)"}},
		"too flat": {input: spec("x", savedmodel.Float32, -1, 4), column: f32,
			texts: []string{`"x" float32 [?,4]`, "1 level of list", `column "c" is float32`}},
		"too deep": {input: spec("x", savedmodel.Float32, -1), column: list(f32),
			texts: []string{"0 levels", "list<item: float32"}},
		"fixed size": {input: spec("x", savedmodel.Float32, -1, 4), column: arrow.FixedSizeListOf(3, f32),
			texts: []string{`"x" float32 [?,4]`, "fixed_size_list", "3 elements at dimension 1"}},
		"date": {input: spec("x", savedmodel.Int32, -1), column: date,
			texts: []string{"date32", "int32", "write unix_date(c)"}},
		"date for int8": {input: spec("x", savedmodel.Int8, -1), column: date,
			texts: []string{"write CAST(unix_date(c) AS TINYINT)"}},
		"dates in lists": {input: spec("x", savedmodel.Int64, -1, -1, -1), column: list(list(date)),
			texts: []string{"write transform(c, x -> transform(x, x -> unix_date(x)))"}},
		"timestamp": {input: spec("x", savedmodel.Int64, -1), column: stamp,
			texts: []string{"timestamp[us", "int64", "write unix_micros(c)"}},
		"timestamp for float": {input: spec("x", savedmodel.Float32, -1), column: stamp,
			texts: []string{"write CAST(c AS FLOAT)"}},
		"timestamp for text": {input: spec("x", savedmodel.String, -1), column: stamp,
			texts: []string{"write CAST(c AS STRING)"}},
		"time": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.Time64ns,
			texts: []string{"time64", "write CAST(c AS BIGINT)"}},
		"time for double": {input: spec("x", savedmodel.Float64, -1), column: arrow.FixedWidthTypes.Time64ns,
			texts: []string{"write CAST(CAST(c AS DECIMAL(20,9)) AS DOUBLE)"}},
		"timestamp without zone": {input: spec("x", savedmodel.Float64, -1),
			column: &arrow.TimestampType{Unit: arrow.Microsecond},
			texts:  []string{"write CAST(CAST(c AS TIMESTAMP) AS DOUBLE)"}},
		"timestamp for int32": {input: spec("x", savedmodel.Int32, -1), column: stamp,
			texts: []string{"write CAST(unix_seconds(c) AS INT)"}},
		"duration": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.Duration_us,
			texts: []string{"write unix_micros(timestamp_seconds(0) + c)"}},
		"decimal": {input: spec("x", savedmodel.Float64, -1), column: decimal,
			texts: []string{"decimal", "write CAST(c AS DOUBLE)"}},
		"decimal with fraction": {input: spec("x", savedmodel.Uint64, -1), column: decimal,
			texts: []string{"write CAST(c AS DECIMAL(20,0))"}},
		"binary": {input: spec("x", savedmodel.Float32, -1, 2), column: arrow.BinaryTypes.Binary,
			texts: []string{"float32", "binary", `"encoding":"raw"`}},
		"dictionary": {input: spec("x", savedmodel.Int32, -1),
			column: &arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: i64},
			texts:  []string{"dictionary", "write CAST(c AS INT)"}},
		"map": {input: spec("x", savedmodel.Float32, -1, -1), column: arrow.MapOf(str, f32),
			texts: []string{"map<", "write map_values(c)"}},
		"struct": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.StructOf(arrow.Field{Name: "a f", Type: f32}),
			texts:  []string{"struct", "float32", "write c.`a f`"}},
		"union": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.SparseUnionOf([]arrow.Field{{Name: "f", Type: f32}}, []int8{0}),
			texts:  []string{"union", "send plain float32"}},
		"run-end encoded": {input: spec("x", savedmodel.Float32, -1),
			column: arrow.RunEndEncodedOf(arrow.PrimitiveTypes.Int32, f32),
			texts:  []string{"run_end_encoded", "send plain float32"}},
		"interval": {input: spec("x", savedmodel.Int64, -1), column: arrow.FixedWidthTypes.MonthInterval,
			texts: []string{"month_interval", "send plain int64"}},
		"binary of no bytes": {input: spec("x", savedmodel.String, -1), column: &arrow.FixedSizeBinaryType{},
			texts: []string{"fixed_size_binary[0]"}},
		"dtype without type": {input: spec("x", savedmodel.Resource, -1), column: f32,
			texts: []string{"resource", "float32", "no column can feed"}},
		"vectors for integers": {input: spec("x", savedmodel.Int64, -1, -1), column: vectorType,
			texts: []string{`"x" int64 [?,?]`, `column "c" of Spark vectors`, "vector_to_array(c)"}},
		"vectors of rank 1": {input: spec("x", savedmodel.Float64, -1), column: vectorType,
			texts: []string{"2 dimensions", "vector_to_array(c)"}},
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
		"no output": {options: Options{Outputs: protocol.Outputs{}}, texts: []string{"no output is asked for"}},
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
