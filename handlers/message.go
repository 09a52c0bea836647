// Messages: what a stream sends, checked before Arrow's reader trusts it. The FlatBuffers checks are written by hand,
// because those of Arrow's Go library are internal to it, and its version 15 is fixed.

package handlers

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	flatbuffers "github.com/google/flatbuffers/go"
	"google.golang.org/grpc/status"

	"flightsvc/internal/fault"
	"flightsvc/internal/tensor"
)

// Bounds on what a stream may send. Arrow's reader trusts the numbers in a message; these bounds and checkedStream keep
// false ones from taking the server's memory.
const (
	// MaxMessageBytes is the largest Flight message that is accepted: a row of tensor.MaxRowBytes with what Arrow and
	// Flight put around it. gRPC refuses more with ResourceExhausted.
	MaxMessageBytes = tensor.MaxRowBytes + 1<<20
	// MaxBatchRows is the most rows of a record batch. A column without buffers, such as nulls, could claim any number.
	MaxBatchRows = 1 << 24
	// maxStreamMemory bounds the uncompressed record batches and dictionaries of a stream in memory.
	maxStreamMemory = 1 << 30
	// maxSchemaFields, maxSchemaDepth and maxSchemaText bound a schema, nested fields included. Its text is the bytes
	// of names and metadata: fields can share them, but Arrow's reader copies them for each field.
	maxSchemaFields = 1 << 14
	maxSchemaDepth  = 64
	maxSchemaText   = 16 << 20
)

// OpenReader reads the first messages of a stream: the descriptor and the schema. They may come as one message or as
// two. A client may repeat the descriptor; the first one counts. The reader allocates from mem; the caller must release
// it.
func OpenReader(stream flight.DataStreamReader, mem *ReadMemory) (*flight.Reader, *flight.FlightDescriptor, error) {
	first := &checkedStream{DataStreamReader: stream, mem: mem}
	reader, err := flight.NewRecordReader(first, ipc.WithAllocator(mem))
	if err != nil {
		return nil, nil, StreamError(err, "the stream must begin with a descriptor and a schema: %w", err)
	}
	return reader, first.descriptor, nil
}

// checkedStream checks each message and keeps the first descriptor.
type checkedStream struct {
	flight.DataStreamReader
	descriptor *flight.FlightDescriptor
	schema     outline
	awaited    int // dictionaries that must come before record batches
	mem        *ReadMemory
}

// Recv is part of flight.DataStreamReader.
func (c *checkedStream) Recv() (*flight.FlightData, error) {
	message, err := c.DataStreamReader.Recv()
	if err != nil {
		return message, err
	}
	if c.descriptor == nil {
		c.descriptor = message.GetFlightDescriptor()
	}
	if len(message.GetDataHeader()) == 0 {
		return message, nil
	}
	return message, c.check(message.GetDataHeader(), message.GetDataBody())
}

// StreamError returns an error of the transport as it is. Any other error is the caller's mistake and becomes a
// BadRequest with the given text.
func StreamError(err error, format string, args ...any) error {
	if _, ok := status.FromError(err); ok || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.New(fault.BadRequest, format, args...)
}

// ReadMemory is the allocator of a stream's reader. When a record batch is malformed, Arrow's reader loses the buffers
// that it was filling, which may be large and lie off the Go heap; ReadMemory keeps track of them, and Discard frees
// them. An allocation beyond the limit panics, which the reader turns into an error.
//
// After a malformed record batch the reader may also release dictionaries that other record batches still read.
// Dictionaries therefore lie on the Go heap.
type ReadMemory struct {
	memory.Allocator

	mu      sync.Mutex       // guards the fields below
	fresh   map[*byte][]byte // buffers of the record batch that is being read
	live    int              // bytes not freed, of all record batches
	limit   int              // bound on live
	refused bool             // limit was reached
	heap    bool             // the next buffers lie on the Go heap
	onHeap  map[*byte]bool   // buffers that do
}

// NewReadMemory returns an allocator on top of mem that has at most limit bytes allocated at once.
func NewReadMemory(mem memory.Allocator, limit int) *ReadMemory {
	return &ReadMemory{Allocator: mem, fresh: map[*byte][]byte{}, limit: limit, onHeap: map[*byte]bool{}}
}

// Allocate is part of memory.Allocator.
func (m *ReadMemory) Allocate(size int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size < 0 || size > m.limit-m.live {
		m.refused = true
		panic(fmt.Sprintf("the stream holds %d MiB and wants %d MiB more, of at most %d MiB", m.live>>20,
			uint64(size)>>20, m.limit>>20))
	}
	if size == 0 {
		return nil
	}
	m.live += size
	if m.heap {
		b := memory.DefaultAllocator.Allocate(size)
		m.onHeap[unsafe.SliceData(b)] = true
		return b
	}
	b := m.Allocator.Allocate(size)
	m.fresh[unsafe.SliceData(b)] = b
	return b
}

// Refused reports whether the limit was reached.
func (m *ReadMemory) Refused() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.refused
}

// useGoHeap says whether the next buffers lie on the Go heap.
func (m *ReadMemory) useGoHeap(yes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.heap = yes
}

// Reallocate is part of memory.Allocator.
func (m *ReadMemory) Reallocate(size int, b []byte) []byte {
	grown := m.Allocate(size)
	copy(grown, b)
	m.Free(b)
	return grown
}

// Free is part of memory.Allocator.
func (m *ReadMemory) Free(b []byte) {
	at := unsafe.SliceData(b)
	m.mu.Lock()
	onHeap := m.onHeap[at]
	delete(m.onHeap, at)
	delete(m.fresh, at)
	m.live -= len(b)
	m.mu.Unlock()
	if !onHeap {
		m.Allocator.Free(b)
	}
}

// Commit says that a record batch was read completely: releasing it frees its buffers from now on.
func (m *ReadMemory) Commit() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.fresh)
}

// Discard frees the buffers of a record batch that could not be read.
func (m *ReadMemory) Discard() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.fresh {
		m.Allocator.Free(b)
	}
	clear(m.fresh)
}

// Slots of the fields that are checked, and types of headers, from Arrow's Message.fbs and Schema.fbs: the field with
// number n has slot 4+2n.
const (
	slotHeaderType, slotHeader, slotMessageMetadata    = 6, 8, 12
	slotSchemaFields, slotSchemaMetadata               = 6, 8
	slotFieldName, slotFieldTypeID, slotFieldType      = 4, 8, 10
	slotFieldChildren, slotFieldMetadata               = 14, 16
	slotUnionTypeIDs, slotTimestampZone                = 6, 6
	slotKey, slotValue                                 = 4, 6
	slotUnionMode, slotFieldDictionary, slotEncodingID = 4, 12, 4
	slotDictionaryID, slotDictionaryData               = 4, 6
	slotDictionaryDelta                                = 8
	slotBatchLength, slotBatchNodes, slotBatchBuffers  = 4, 6, 8
	slotBatchVariadic                                  = 12
	slotBatchCompression, slotCompressionCodec         = 10, 4

	headerSchema, headerDictionary, headerRecordBatch = 1, 2, 3
	unionDense, codecZstd                             = 1, 1
)

// Types of fields, from Schema.fbs.
const (
	typeNull, typeBinary, typeUTF8, typeTimestamp = 1, 4, 5, 10
	typeStruct, typeUnion, typeFixedSizeList      = 13, 14, 16
	typeLargeBinary, typeLargeUTF8, typeRunEnds   = 19, 20, 22
	typeBinaryView, typeUTF8View                  = 23, 24
	typeListView, typeLargeListView               = 25, 26
)

// check refuses a message whose numbers claim more than it holds, because Arrow's reader allocates and recurses by
// these numbers before it reads what they count. It also refuses lists that are shorter than the schema demands,
// because the reader indexes past their end.
func (c *checkedStream) check(header, body []byte) (err error) {
	defer func() {
		switch cause := recover().(type) {
		case nil:
		case *fault.Error: // a bound was exceeded
			err = cause
		default: // errHeader, or an index out of range for an offset that leads outside
			err = fault.New(fault.BadRequest, "a message is malformed")
		}
	}()
	message := flatTable{flatbuffers.Table{Bytes: header, Pos: flatbuffers.GetUOffsetT(header)}}
	message.vector(slotMessageMetadata, 4)
	kind := message.byte(slotHeaderType)
	if c.awaited > 0 && kind != headerDictionary { // the reader would take any message for one
		return fault.New(fault.BadRequest,
			"%d more dictionaries of the schema must come before record batches", c.awaited)
	}
	c.mem.useGoHeap(kind == headerDictionary)
	switch about := message.union(slotHeader); kind {
	case headerDictionary:
		if about.GetBoolSlot(slotDictionaryDelta, false) { // the reader would join it with the first one unchecked
			return fault.New(fault.BadRequest,
				"a delta dictionary (isDelta) is not supported; send the whole dictionary")
		}
		c.awaited--
		data := about.table(slotDictionaryData)
		data.batch(body, c.schema.dictionaries[about.GetInt64Slot(slotDictionaryID, 0)])
	case headerSchema:
		c.schema = outline{dictionaries: map[int64]counts{}}
		c.schema.columns = about.fields(slotSchemaFields, 0, &c.schema)
		about.metadata(slotSchemaMetadata, &c.schema)
		c.awaited = len(c.schema.dictionaries)
	case headerRecordBatch:
		about.batch(body, c.schema.columns)
	}
	return nil
}

// errHeader is what methods of flatTable panic with; check recovers it.
var errHeader = errors.New("malformed header")

// flatTable is a FlatBuffers table whose vectors are checked.
type flatTable struct{ flatbuffers.Table }

func (t *flatTable) byte(slot flatbuffers.VOffsetT) byte {
	if o := t.Offset(slot); o != 0 {
		return t.GetByte(t.Pos + flatbuffers.UOffsetT(o))
	}
	return 0
}

func (t *flatTable) union(slot flatbuffers.VOffsetT) flatTable {
	var out flatTable
	if o := t.Offset(slot); o != 0 {
		t.Union(&out.Table, flatbuffers.UOffsetT(o))
		return out
	}
	panic(errHeader)
}

func (t *flatTable) table(slot flatbuffers.VOffsetT) flatTable {
	if o := t.Offset(slot); o != 0 {
		return flatTable{flatbuffers.Table{Bytes: t.Bytes, Pos: t.Indirect(t.Pos + flatbuffers.UOffsetT(o))}}
	}
	panic(errHeader)
}

// vector returns where the elements of a vector begin and how many there are.
func (t *flatTable) vector(slot flatbuffers.VOffsetT, width int) (start flatbuffers.UOffsetT, n int) {
	o := flatbuffers.UOffsetT(t.Offset(slot))
	if o == 0 {
		return 0, 0
	}
	start, n = t.Vector(o), t.VectorLen(o)
	if n < 0 || n > (len(t.Bytes)-int(start))/width {
		panic(errHeader)
	}
	return start, n
}

// outline is what is kept of a schema: the number of its fields and the bytes of its text, shared ones counted each
// time they occur, and the counts of the arrays of its columns and, by id, of its dictionaries.
type outline struct {
	fields, text int
	columns      counts
	dictionaries map[int64]counts
}

// counts are numbers of nodes and buffers of arrays; views are arrays with any number of further buffers.
type counts struct{ nodes, buffers, views int }

func (p *counts) add(more counts) {
	p.nodes += more.nodes
	p.buffers += more.buffers
	p.views += more.views
}

// addText counts bytes of text, and panics with a fault if they are too many.
func (o *outline) addText(bytes int) {
	if o.text += bytes; o.text > maxSchemaText {
		panic(fault.New(fault.BadRequest, "names and metadata in a schema take %d MiB at most", maxSchemaText>>20))
	}
}

// fields walks over a vector of fields and their children, and returns the counts of their arrays. It panics with a
// fault if they are too many or too deep: FlatBuffers lets many fields share one child, so a small header could unfold
// to any size.
func (t *flatTable) fields(slot flatbuffers.VOffsetT, depth int, seen *outline) (all counts) {
	start, n := t.vector(slot, 4)
	if seen.fields += n; seen.fields > maxSchemaFields {
		panic(fault.New(fault.BadRequest, "a schema has %d fields at most, nested ones included", maxSchemaFields))
	}
	if n > 0 && depth > maxSchemaDepth {
		panic(fault.New(fault.BadRequest, "the fields of a schema are nested %d deep at most", maxSchemaDepth))
	}
	for i := range n {
		field := t.element(start, i)
		field.text(slotFieldName, seen)
		field.metadata(slotFieldMetadata, seen)
		made := counts{nodes: 1, buffers: 2}
		switch field.byte(slotFieldTypeID) {
		case typeNull, typeRunEnds:
			made.buffers = 0
		case typeStruct, typeFixedSizeList:
			made.buffers = 1
		case typeBinary, typeUTF8, typeLargeBinary, typeLargeUTF8, typeListView, typeLargeListView:
			made.buffers = 3
		case typeBinaryView, typeUTF8View:
			made.views = 1
		case typeUnion:
			union := field.union(slotFieldType)
			_, ids := union.vector(slotUnionTypeIDs, 4)
			seen.addText(ids)
			if made.buffers = 1; union.GetInt16Slot(slotUnionMode, 0) == unionDense {
				made.buffers = 2
			}
		case typeTimestamp:
			timestamp := field.union(slotFieldType)
			timestamp.text(slotTimestampZone, seen)
		}
		made.add(field.fields(slotFieldChildren, depth+1, seen))
		if field.Offset(slotFieldDictionary) != 0 {
			dictionary := field.table(slotFieldDictionary)
			seen.dictionaries[dictionary.GetInt64Slot(slotEncodingID, 0)] = made
			made = counts{nodes: 1, buffers: 2}
		}
		all.add(made)
	}
	return all
}

// metadata counts the text of a vector of pairs of key and value.
func (t *flatTable) metadata(slot flatbuffers.VOffsetT, seen *outline) {
	start, n := t.vector(slot, 4)
	seen.addText(n * 2 * int(unsafe.Sizeof("")))
	for i := range n {
		pair := t.element(start, i)
		pair.text(slotKey, seen)
		pair.text(slotValue, seen)
	}
}

// text counts the bytes of a string.
func (t *flatTable) text(slot flatbuffers.VOffsetT, seen *outline) {
	_, n := t.vector(slot, 1)
	seen.addText(n)
}

// element returns the table with index i of a vector of tables.
func (t *flatTable) element(start flatbuffers.UOffsetT, i int) flatTable {
	return flatTable{flatbuffers.Table{Bytes: t.Bytes, Pos: t.Indirect(start + flatbuffers.UOffsetT(4*i))}}
}

// batch checks a record batch, or the data of a dictionary: it has at least the nodes and buffers of its schema, and
// its buffers lie within the body and together are no larger than it.
func (t *flatTable) batch(body []byte, want counts) {
	if o := t.Offset(slotBatchLength); o != 0 {
		switch n := t.GetInt64(t.Pos + flatbuffers.UOffsetT(o)); {
		case n < 0:
			panic(errHeader)
		case n > MaxBatchRows:
			panic(fault.New(fault.BadRequest, "a record batch has %d rows; it may have %d, send smaller ones",
				n, MaxBatchRows))
		}
	}
	zstd := false
	if t.Offset(slotBatchCompression) != 0 {
		compression := t.table(slotBatchCompression)
		zstd = compression.byte(slotCompressionCodec) == codecZstd
	}
	_, nodes := t.vector(slotBatchNodes, 16)
	start, buffers := t.vector(slotBatchBuffers, 16)
	total := int64(0)
	for i := range buffers {
		at := start + flatbuffers.UOffsetT(16*i)
		offset, size := t.GetInt64(at), t.GetInt64(at+8)
		if size == 0 {
			continue
		}
		if total += size; offset < 0 || size < 0 || offset > int64(len(body))-size || total > int64(len(body)) {
			panic(errHeader)
		}
		if zstd {
			checkFrames(body[offset : offset+size])
		}
	}
	start, views := t.vector(slotBatchVariadic, 8)
	more := int64(0)
	for i := range min(views, want.views) {
		count := t.GetInt64(start + flatbuffers.UOffsetT(8*i))
		if more += count; count < 0 || count > int64(buffers) {
			panic(errHeader)
		}
	}
	if nodes < want.nodes || views < want.views || int64(buffers) < int64(want.buffers)+more {
		panic(errHeader)
	}
}
