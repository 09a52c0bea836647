// Fuzz targets for the Arrow messages of a stream.

package handlers

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	flatbuffers "github.com/google/flatbuffers/go"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// Every parser of bytes that a caller sends has a target: descriptors, leases, bodies of actions,
// criteria and commands of DoPut; the Arrow messages of DoExchange, up to the tensors; those of
// DoPut, up to the archive. What front and runner tell each other is their own and has none.

const (
	fuzzJSONBytes = 64 << 20  // of memory that a JSON text may take while it is read
	fuzzArrow     = 512 << 20 // of memory of the Go heap that the messages of a stream may take
	fuzzBatches   = 64 << 20  // of memory that a stream's record batches may hold, lower than maxStreamMemory for speed
)

// counted is an allocator that knows what is out.
type counted struct {
	memory.GoAllocator
	live atomic.Int64
}

func (c *counted) Allocate(size int) []byte {
	c.live.Add(int64(size))
	return c.GoAllocator.Allocate(size)
}

func (c *counted) Free(b []byte) {
	c.live.Add(-int64(len(b)))
	c.GoAllocator.Free(b)
}

// fuzzColumn is the name of the one column in the streams that the targets make.
const fuzzColumn = "c"

// fuzzAsk is an input and its column, from columns.json, with the name changed.
type fuzzAsk struct {
	column string // in columns.arrows
	plan   *tensor.Plan
}

// fuzzAsks returns what a stream may be asked for.
func fuzzAsks(f *testing.F) (asks []fuzzAsk) {
	f.Helper()
	data, err := os.ReadFile(filepath.Join(golden, "columns.json"))
	if err != nil {
		f.Fatal(err)
	}
	var list []goldenAsk
	if err := json.Unmarshal(data, &list); err != nil {
		f.Fatal(err)
	}
	unknown := func(column, dtype string) goldenAsk { // the rank, that is
		return goldenAsk{Entry: map[string]any{"column": column}, DType: dtype}
	}
	picture := goldenAsk{Entry: map[string]any{"column": "binary"}, DType: "float32", Shape: []int64{-1, 2, 3, 3}}
	list = append(list, unknown("list_of_lists", "int64"), unknown("ragged_words", "string"), picture,
		goldenAsk{Entry: map[string]any{"column": "cells", "encoding": "raw"}, DType: "bool", Shape: []int64{-1, 12}},
		goldenAsk{Entry: map[string]any{"column": "binary_view", "encoding": "raw"}, DType: "uint8", Shape: []int64{-1,
			2}})
	for _, ask := range list {
		column, _ := ask.Entry["column"].(string)
		ask.Entry["column"] = fuzzColumn
		var preprocess any
		if len(ask.Shape) == 4 {
			preprocess = map[string]any{"x": map[string]any{"size": []int{2, 3}}}
		}
		text, err := json.Marshal(map[string]any{"v": 1, "model": "m", "inputs": map[string]any{"x": ask.Entry},
			"preprocess": preprocess})
		if err != nil {
			f.Fatal(err)
		}
		d, err := ParseDescriptor(command(string(text)))
		if err != nil {
			f.Fatal(err)
		}
		x := savedmodel.Spec{Name: "x", Tensor: "x:0", DType: dtypeNamed(f, ask.DType), Shape: ask.Shape,
			UnknownRank: ask.Shape == nil}
		signature := savedmodel.Signature{Inputs: []savedmodel.Spec{x}, Outputs: []savedmodel.Spec{{Name: "y",
			Tensor: "y:0", DType: x.DType, Shape: []int64{-1}}}}
		if ask.Entry["lengths"] != nil {
			signature.Inputs = append([]savedmodel.Spec{{Name: "len", Tensor: "len:0", DType: dtypeNamed(f, "int8"),
				Shape: []int64{-1}}}, x)
		}
		plan, err := Plan(d,
			&savedmodel.Model{Signatures: map[string]savedmodel.Signature{savedmodel.DefaultSignature: signature}})
		if err != nil {
			f.Fatalf("%s: %v", text, err)
		}
		asks = append(asks, fuzzAsk{column: column, plan: plan})
	}
	return asks
}

func dtypeNamed(t testing.TB, name string) savedmodel.DType {
	t.Helper()
	for dtype := range savedmodel.DType(100) {
		if dtype.String() == name {
			return dtype
		}
	}
	t.Fatalf("no dtype %s", name)
	return 0
}

// goldenRecords returns the record batches of columns.arrows.
func goldenRecords(f *testing.F) (recs []arrow.Record) {
	f.Helper()
	file, err := os.Open(filepath.Join(golden, "columns.arrows"))
	if err != nil {
		f.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	reader, err := ipc.NewReader(file)
	if err != nil {
		f.Fatal(err)
	}
	for reader.Next() {
		rec := reader.Record()
		rec.Retain()
		recs = append(recs, rec)
	}
	if err := reader.Err(); err != nil && err != io.EOF || len(recs) != 3 {
		f.Fatal(len(recs), err)
	}
	return recs
}

// wire is the four first messages of a stream: its schema, and what follows.
type wire [4]*flight.FlightData

// only returns the messages of one column of record batches.
func only(f *testing.F, recs []arrow.Record, column string, options ...ipc.Option) (w wire) {
	f.Helper()
	const deltas = false // a stream with them ends early
	at := recs[0].Schema().FieldIndices(column)[0]
	field := recs[0].Schema().Field(at)
	field.Name = fuzzColumn
	schema := arrow.NewSchema([]arrow.Field{field}, nil)
	out := &captured{}
	writer := flight.NewRecordWriter(out, append(options, ipc.WithSchema(schema), ipc.WithDictionaryDeltas(deltas))...)
	for _, rec := range recs {
		if rec.NumRows() == 0 {
			continue
		}
		if err := writer.Write(array.NewRecord(schema, []arrow.Array{rec.Column(at)}, rec.NumRows())); err != nil {
			f.Fatalf("%s: %v", column, err)
		}
	}
	for i := range w {
		w[i] = &flight.FlightData{}
		if i < len(*out) {
			w[i] = (*out)[i]
		}
	}
	return w
}

// altered returns w with one message's header and body changed.
func (w wire) altered(at int, change func(message flatTable, header []byte, body *[]byte)) wire {
	message := &flight.FlightData{DataHeader: bytes.Clone(w[at].DataHeader), DataBody: bytes.Clone(w[at].DataBody)}
	change(flatTable{flatbuffers.Table{Bytes: message.DataHeader, Pos: flatbuffers.GetUOffsetT(message.DataHeader)}},
		message.DataHeader, &message.DataBody)
	w[at] = message
	return w
}

// FuzzStream feeds the messages of DoExchange: an input, the schema, and three messages of any kind. What
// passes becomes tensors whose every element can be read; what does not is a fault of the
// caller; all memory comes back.
func FuzzStream(f *testing.F) {
	asks, recs := fuzzAsks(f), goldenRecords(f)
	add := func(ask int, w wire) {
		f.Add(uint16(ask), w[0].DataHeader, w[1].DataHeader, w[1].DataBody, w[2].DataHeader, w[2].DataBody,
			w[3].DataHeader, w[3].DataBody)
	}
	lies := []int64{-1, 0, 1 << 40, 1 << 62, -1 << 63}
	seen := map[string]bool{}
	for i, ask := range asks {
		plain := only(f, recs, ask.column)
		add(i, plain)
		if seen[ask.column] {
			continue
		}
		seen[ask.column] = true
		add(i, only(f, recs, ask.column, ipc.WithLZ4()))
		packed := only(f, recs, ask.column, ipc.WithZstd())
		add(i, packed)
		for place, lie := range []struct {
			slot      flatbuffers.VOffsetT
			width, at int
		}{
			{slotBatchNodes, 16, 0},    // length
			{slotBatchNodes, 16, 8},    // nulls
			{slotBatchBuffers, 16, 16}, // offset of the second
			{slotBatchBuffers, 16, 24}, // its length
			{slotBatchVariadic, 8, 0},
			{slotBatchVariadic, 8, -4}, // how many there are
		} {
			add(i|nullsFail, plain.altered(1, func(message flatTable, header []byte, _ *[]byte) {
				batch := message.union(slotHeader)
				if message.byte(slotHeaderType) == headerDictionary {
					batch = batch.table(slotDictionaryData)
				}
				number := uint64(lies[(i+place)%len(lies)])
				switch start, n := batch.vector(lie.slot, lie.width); {
				case n == 0:
				case lie.at < 0:
					binary.LittleEndian.PutUint32(header[int(start)+lie.at:], 0)
				default:
					binary.LittleEndian.PutUint64(header[int(start)+lie.at:], number)
				}
			}))
		}
		ended := plain
		ended[2] = &flight.FlightData{} // after a dictionary, where the column has one
		add(i, ended)
		add(i, plain.altered(2, func(_ flatTable, _ []byte, body *[]byte) { *body = (*body)[:len(*body)/2] }))
		swapped := plain
		swapped[1], swapped[2] = plain[2], plain[1]
		add(i, swapped)
		add(i, packed.altered(1, func(_ flatTable, _ []byte, body *[]byte) { // says that it becomes 1 TiB
			for at := 0; at+8 <= len(*body); at += 8 {
				if binary.LittleEndian.Uint64((*body)[at:]) < 256 {
					binary.LittleEndian.PutUint64((*body)[at:], 1<<40)
				}
			}
		}))
	}
	of := func(column string) int {
		return slices.IndexFunc(asks, func(ask fuzzAsk) bool { return ask.column == column })
	}
	for _, w := range liars(f) {
		add(of("void"), w)
		add(of("void")|nullsFail, w)
		add(of("float64"), w)
	}
	f.Fuzz(func(t *testing.T, kind uint16, schema, h1, b1, h2, b2, h3, b3 []byte) {
		ask := asks[int(kind&(nullsFail-1))%len(asks)]
		fuzztest.Bounded(t, fuzzArrow, func() {
			exchangeOf(t, ask.plan, kind&nullsFail != 0, []*flight.FlightData{
				{DataHeader: schema, FlightDescriptor: command("{}")},
				{DataHeader: h1, DataBody: b1}, {DataHeader: h2, DataBody: b2}, {DataHeader: h3, DataBody: b3},
			})
		})
	})
}

// nullsFail is the bit of FuzzStream's first number that makes nulls refused rows.
const nullsFail = 1 << 8

// exchangeOf does with a stream's messages what a runner does up to the model.
func exchangeOf(t *testing.T, plan *tensor.Plan, refuse bool, messages []*flight.FlightData) {
	for i, message := range messages {
		if len(message.DataHeader) == 0 {
			messages = messages[:i]
			break
		}
	}
	counts, tensors := &counted{}, &offheap.Allocator{}
	mem := NewReadMemory(counts, fuzzBatches)
	defer func() {
		if left := counts.live.Load(); left != 0 || tensors.Live() != 0 {
			t.Errorf("%d bytes of record batches and %d of tensors are not given back", left, tensors.Live())
		}
	}()
	defer mem.Discard()
	reader, _, err := OpenReader(&sent{messages: messages}, mem)
	if err != nil {
		expect.Fault(t, err, fault.BadRequest)
		return
	}
	defer reader.Release()
	binding, err := plan.Bind(reader.Schema())
	if err != nil {
		expect.Fault(t, err, fault.BadRequest)
		binding = nil
	}
	// the time is that of one record batch
	for rows := int64(0); rows <= MaxBatchRows && reader.Next(); rows += reader.Record().NumRows() {
		mem.Commit()
		if rec := reader.Record(); binding != nil {
			tensorsOf(t, binding, rec, refuse, tensors)
		}
	}
}

// tensorsOf makes the input tensors of a record batch and reads all of them.
func tensorsOf(t *testing.T, binding *tensor.Binding, rec arrow.Record, refuse bool, mem memory.Allocator) {
	if err := binding.Check(rec); err != nil {
		expect.Fault(t, err, fault.BadRequest)
		return
	}
	if ends := binding.Cut(rec, notDecoded{}, 64); ends[len(ends)-1] != rec.NumRows() || !slices.IsSorted(ends) {
		t.Errorf("%d rows are cut at %d", rec.NumRows(), ends)
	}
	rows := tensor.NewRows(int(rec.NumRows()))
	binding.Nulls(rec, rows, refuse)
	if rows.Kept() == 0 {
		return
	}
	feeds, err := binding.Values(t.Context(), rec, rows, notDecoded{}, mem)
	if err != nil {
		if kind, ok := fault.KindOf(err); !ok || kind != fault.BadRequest && kind != fault.Exhausted {
			t.Errorf("the error is %v", err)
		}
		return
	}
	for i := range feeds {
		value := &feeds[i].Value
		size := int64(value.DType.Size())
		for _, d := range value.Shape {
			size *= d
		}
		if value.Rows() != int64(rows.Kept()) || int64(len(value.Data)) != size {
			t.Errorf("%s %v of %d bytes for %d rows", value.DType, value.Shape, len(value.Data), rows.Kept())
		}
		sum := byte(0)
		for _, b := range value.Data {
			sum += b
		}
		for _, s := range value.Strings {
			for _, b := range s {
				sum += b
			}
		}
		_ = sum
		value.Release()
	}
}

// notDecoded stands for the decoder of pictures: it takes those with an even number of bytes.
type notDecoded struct{}

func (notDecoded) Bytes(_ string, p tensor.Picture) int64 { return int64(len(p.Data)) }

func (notDecoded) Decode(_ context.Context, _ string, pictures []tensor.Picture, mem memory.Allocator) (tensor.Value,
	map[int]string, error) {
	failed := map[int]string{}
	for i, picture := range pictures {
		if len(picture.Data)%2 == 1 {
			failed[i] = "odd"
		}
	}
	return tensor.Allocate(savedmodel.Float32, []int64{int64(len(pictures)), 2, 3, 3}, mem), failed, nil
}

// liars returns streams that would make much work or take much memory for few bytes.
func liars(f *testing.F) []wire {
	f.Helper()
	one := func(dtype arrow.DataType, n int, buffers []*memory.Buffer, options ...ipc.Option) wire {
		column := array.MakeFromData(array.NewData(dtype, n, buffers, nil, 0, 0))
		schema := arrow.NewSchema([]arrow.Field{{Name: fuzzColumn, Type: dtype, Nullable: true}}, nil)
		return only(f, []arrow.Record{array.NewRecord(schema, []arrow.Array{column}, int64(n))}, fuzzColumn, options...)
	}
	zeros := func(n int, options ...ipc.Option) wire {
		return one(arrow.PrimitiveTypes.Float64, n, []*memory.Buffer{nil, memory.NewBufferBytes(make([]byte, 8*n))},
			options...)
	}
	list := []wire{
		one(arrow.Null, MaxBatchRows, nil),
		one(arrow.Null, MaxBatchRows+1, nil),
		zeros(1<<22, ipc.WithZstd()),
		zeros(1<<22, ipc.WithLZ4()),
		zeros(1<<24, ipc.WithZstd()),
	}
	// A frame that asks for a window of 512 MiB to decode 8 bytes.
	list = append(list, zeros(1, ipc.WithZstd()).altered(1, func(message flatTable, header []byte, body *[]byte) {
		*body = append(binary.LittleEndian.AppendUint64(nil, 8),
			"\x28\xb5\x2f\xfd\x00\x98\x41\x00\x00\x00\x00\x00\x00\x00\x00\xf0\x3f"...)
		batch := message.union(slotHeader)
		start, _ := batch.vector(slotBatchBuffers, 16)
		binary.LittleEndian.PutUint64(header[start+16:], 0)
		binary.LittleEndian.PutUint64(header[start+24:], uint64(len(*body)))
	}))
	for _, schema := range [][]byte{unfolding(20), unfolding(70), sharing(1<<14, 1<<16), sharing(1<<10, 1<<10)} {
		w := zeros(1)
		w[0] = &flight.FlightData{DataHeader: schema}
		list = append(list, w)
	}
	return list
}

// schemaHeader writes the header of a schema whose fields are n times the same one. An inner
// field has children, all the same too.
func schemaHeader(b *flatbuffers.Builder, field flatbuffers.UOffsetT, n int) []byte {
	fields := sameOffsets(b, field, n)
	b.StartObject(4)
	b.PrependUOffsetTSlot(1, fields, 0)
	schema := b.EndObject()
	b.StartObject(5)
	b.PrependInt16Slot(0, 4, 0) // MetadataVersion V5
	b.PrependByteSlot(1, headerSchema, 0)
	b.PrependUOffsetTSlot(2, schema, 0)
	b.Finish(b.EndObject())
	return b.FinishedBytes()
}

func sameOffsets(b *flatbuffers.Builder, offset flatbuffers.UOffsetT, n int) flatbuffers.UOffsetT {
	b.StartVector(4, n, 4)
	for range n {
		b.PrependUOffsetT(offset)
	}
	return b.EndVector(n)
}

func schemaField(b *flatbuffers.Builder, name flatbuffers.UOffsetT, kind byte,
	children flatbuffers.UOffsetT) flatbuffers.UOffsetT {
	b.StartObject(0)
	dtype := b.EndObject()
	b.StartObject(7)
	b.PrependUOffsetTSlot(0, name, 0)
	b.PrependByteSlot(2, kind, 0)
	b.PrependUOffsetTSlot(3, dtype, 0)
	b.PrependUOffsetTSlot(5, children, 0)
	return b.EndObject()
}

// unfolding returns a schema of structs that each have the one below twice.
func unfolding(depth int) []byte {
	const typeNull, typeStruct = 1, 13
	b := flatbuffers.NewBuilder(1024)
	name := b.CreateString(fuzzColumn)
	field := schemaField(b, name, typeNull, 0)
	for range depth {
		field = schemaField(b, name, typeStruct, sameOffsets(b, field, 2))
	}
	return schemaHeader(b, field, 1)
}

// sharing returns a schema of n fields that share one long name.
func sharing(n, bytes int) []byte {
	b := flatbuffers.NewBuilder(1024)
	return schemaHeader(b, schemaField(b, b.CreateString(strings.Repeat("n", bytes)), 1, 0), n)
}

// TestStreamsOfAllTypes sends a column of each type that Arrow has, in every compression: the checks of a message
// count nodes and buffers as Arrow does.
func TestStreamsOfAllTypes(t *testing.T) {
	item := arrow.Field{Name: "item", Type: arrow.BinaryTypes.String, Nullable: true}
	codes := []arrow.UnionTypeCode{0, 1}
	flat := []arrow.DataType{
		arrow.Null, arrow.FixedWidthTypes.Boolean, arrow.PrimitiveTypes.Int8, arrow.PrimitiveTypes.Float64,
		arrow.BinaryTypes.Binary, arrow.BinaryTypes.String, arrow.BinaryTypes.LargeBinary,
		arrow.BinaryTypes.LargeString, arrow.BinaryTypes.BinaryView, arrow.BinaryTypes.StringView,
		&arrow.FixedSizeBinaryType{ByteWidth: 3}, &arrow.Decimal128Type{Precision: 20},
		&arrow.Decimal256Type{Precision: 40}, arrow.FixedWidthTypes.Date32, arrow.FixedWidthTypes.Date64,
		arrow.FixedWidthTypes.Time32s, arrow.FixedWidthTypes.Time64us, arrow.FixedWidthTypes.Timestamp_us,
		arrow.FixedWidthTypes.Duration_s, arrow.FixedWidthTypes.MonthInterval, arrow.FixedWidthTypes.DayTimeInterval,
		arrow.FixedWidthTypes.MonthDayNanoInterval,
		&arrow.DictionaryType{IndexType: arrow.PrimitiveTypes.Int8, ValueType: arrow.BinaryTypes.String},
		arrow.MapOf(arrow.BinaryTypes.String, arrow.PrimitiveTypes.Int32),
		arrow.RunEndEncodedOf(arrow.PrimitiveTypes.Int32, arrow.BinaryTypes.String),
		arrow.SparseUnionOf([]arrow.Field{item, item}, codes), arrow.DenseUnionOf([]arrow.Field{item, item}, codes),
	}
	types := slices.Clone(flat)
	for _, dtype := range flat {
		inner := arrow.Field{Name: "a", Type: dtype, Nullable: true}
		types = append(types, arrow.ListOf(dtype), arrow.LargeListOf(dtype), arrow.ListViewOf(dtype),
			arrow.LargeListViewOf(dtype), arrow.FixedSizeListOf(2, dtype), arrow.StructOf(inner, item))
	}
	for _, option := range []ipc.Option{ipc.WithDictionaryDeltas(false), ipc.WithLZ4(), ipc.WithZstd()} {
		for _, dtype := range types {
			b := array.NewBuilder(memory.DefaultAllocator, dtype)
			b.AppendNull()
			b.AppendEmptyValue()
			column := b.NewArray()
			schema := arrow.NewSchema([]arrow.Field{{Name: "before", Type: dtype, Nullable: true},
				{Name: "after", Type: arrow.BinaryTypes.StringView, Nullable: true}}, nil)
			after := array.NewBuilder(memory.DefaultAllocator, arrow.BinaryTypes.StringView)
			after.AppendEmptyValue()
			after.AppendNull()
			out := &captured{}
			writer := flight.NewRecordWriter(out, ipc.WithSchema(schema), option)
			if err := writer.Write(array.NewRecord(schema, []arrow.Array{column, after.NewArray()}, 2)); err != nil {
				t.Fatalf("%s: %v", dtype, err)
			}
			reader, _, err := OpenReader(&sent{messages: *out}, NewReadMemory(&counted{}, fuzzBatches))
			if err != nil {
				t.Fatalf("%s: %v", dtype, err)
			}
			if !reader.Next() {
				t.Errorf("%s: %v", dtype, reader.Err())
			}
			reader.Release()
		}
	}
}

// sent is a stream of messages that were sent already.
type sent struct {
	flight.DataStreamReader
	messages []*flight.FlightData
}

func (s *sent) Recv() (*flight.FlightData, error) {
	if len(s.messages) == 0 {
		return nil, io.EOF
	}
	next := s.messages[0]
	s.messages = s.messages[1:]
	return next, nil
}
