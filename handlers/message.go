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

// What a stream may send. Arrow's reader believes what a message says of itself; these bounds, and
// checkHeader, are what lies between that and our memory.
const (
	// MaxMessageBytes is the largest Flight message that we take: a row of tensor.MaxRowBytes with
	// what Arrow and Flight put around it. gRPC refuses more with ResourceExhausted.
	MaxMessageBytes = tensor.MaxRowBytes + 1<<20
	// MaxBatchRows is the most rows of a record batch. Columns without a buffer, of nulls, say, could
	// claim any number.
	MaxBatchRows = 1 << 24
	// maxStreamMemory bounds what the record batches and dictionaries of a stream take in memory
	// once they are uncompressed.
	maxStreamMemory = 1 << 30
	// maxSchemaFields and maxSchemaDepth bound a schema, nested fields included.
	maxSchemaFields = 1 << 14
	maxSchemaDepth  = 64
)

// openReader reads the first messages of a stream: the descriptor and the schema. They may come
// as one message or as two, and a client may repeat the descriptor; the first one counts.
func openReader(stream flight.DataStreamReader, mem *readMemory) (*flight.Reader, *flight.FlightDescriptor, error) {
	first := &checkedStream{DataStreamReader: stream}
	reader, err := flight.NewRecordReader(first, ipc.WithAllocator(mem))
	if err != nil {
		return nil, nil, streamError(err, "the stream must begin with a descriptor and a schema: %w", err)
	}
	return reader, first.descriptor, nil
}

// checkedStream checks the header of each message and keeps the first descriptor that comes by.
type checkedStream struct {
	flight.DataStreamReader
	descriptor *flight.FlightDescriptor
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
	return message, checkHeader(message.GetDataHeader())
}

// streamError keeps errors of the transport and makes all others the caller's mistake.
func streamError(err error, format string, args ...any) error {
	if _, ok := status.FromError(err); ok || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.New(fault.BadRequest, format, args...)
}

// readMemory is the allocator of a stream's reader. When a record batch does not hold what it
// says, Arrow's reader loses the buffers that it was filling, which may be large and lie off the
// Go heap; readMemory knows them. It refuses, by a panic that the reader turns into an error, what a
// stream may not hold.
type readMemory struct {
	memory.Allocator

	mu      sync.Mutex       // guards the fields below
	fresh   map[*byte][]byte // not freed, of the record batch that is being read
	live    int              // bytes not freed, of all record batches
	limit   int              // of live
	refused bool             // limit was reached
}

func newReadMemory(mem memory.Allocator, limit int) *readMemory {
	return &readMemory{Allocator: mem, fresh: map[*byte][]byte{}, limit: limit}
}

// Allocate is part of memory.Allocator.
func (m *readMemory) Allocate(size int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size < 0 || size > m.limit-m.live {
		m.refused = true
		panic(fmt.Sprintf("the stream holds %d MiB and wants %d MiB more, of at most %d MiB", m.live>>20, uint64(size)>>20, m.limit>>20))
	}
	b := m.Allocator.Allocate(size)
	m.live += len(b)
	if len(b) > 0 {
		m.fresh[unsafe.SliceData(b)] = b
	}
	return b
}

// Reallocate is part of memory.Allocator.
func (m *readMemory) Reallocate(size int, b []byte) []byte {
	grown := m.Allocate(size)
	copy(grown, b)
	m.Free(b)
	return grown
}

// Free is part of memory.Allocator.
func (m *readMemory) Free(b []byte) {
	m.mu.Lock()
	delete(m.fresh, unsafe.SliceData(b))
	m.live -= len(b)
	m.mu.Unlock()
	m.Allocator.Free(b)
}

// whole says that the record batch was read: its buffers are its own from now on.
func (m *readMemory) whole() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.fresh)
}

// lost frees what a record batch that could not be read has left.
func (m *readMemory) lost() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.fresh {
		m.Allocator.Free(b)
	}
	clear(m.fresh)
}

// Slots of the fields that are looked at, and the types of headers, from Arrow's Message.fbs and
// Schema.fbs: the field with number n has slot 4+2n.
const (
	slotHeaderType, slotHeader, slotMessageMetadata      = 6, 8, 12
	slotSchemaFields, slotSchemaMetadata                 = 6, 8
	slotFieldTypeID, slotFieldType                       = 8, 10
	slotFieldChildren, slotFieldMetadata                 = 14, 16
	slotUnionTypeIDs                                     = 6
	slotDictionaryData                                   = 6
	slotBatchLength, slotBatchBuffers, slotBatchVariadic = 4, 8, 12

	headerSchema, headerDictionary, headerRecordBatch = 1, 2, 3
	typeUnion                                         = 14
)

// checkHeader looks at the numbers in a message's header by which Arrow's reader allocates and
// recurses before it has seen what they count, so that none claims more than the header holds.
func checkHeader(header []byte) (err error) {
	defer func() {
		if recover() != nil { // an offset that leads outside
			err = fault.New(fault.BadRequest, "the header of a message is malformed")
		}
	}()
	message := flatTable{flatbuffers.Table{Bytes: header, Pos: flatbuffers.GetUOffsetT(header)}}
	message.vector(slotMessageMetadata, 4)
	kind := message.byte(slotHeaderType)
	switch body := message.union(slotHeader); kind {
	case headerSchema:
		fields := 0
		body.vector(slotSchemaMetadata, 4)
		body.fields(slotSchemaFields, 0, &fields)
	case headerDictionary:
		data := body.table(slotDictionaryData)
		data.batch()
	case headerRecordBatch:
		body.batch()
	}
	return nil
}

// errHeader is thrown by the methods of flatTable and caught by checkHeader.
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

// fields walks over a vector of fields and those below them. FlatBuffers lets many share one, so
// a small header could unfold to any size.
func (t *flatTable) fields(slot flatbuffers.VOffsetT, depth int, count *int) {
	start, n := t.vector(slot, 4)
	if *count += n; *count > maxSchemaFields || depth > maxSchemaDepth {
		panic(errHeader)
	}
	for i := range n {
		field := flatTable{flatbuffers.Table{Bytes: t.Bytes, Pos: t.Indirect(start + flatbuffers.UOffsetT(4*i))}}
		field.vector(slotFieldMetadata, 4)
		if field.byte(slotFieldTypeID) == typeUnion {
			union := field.union(slotFieldType)
			union.vector(slotUnionTypeIDs, 4)
		}
		field.fields(slotFieldChildren, depth+1, count)
	}
}

// batch checks a record batch, or the data of a dictionary.
func (t *flatTable) batch() {
	if o := t.Offset(slotBatchLength); o != 0 {
		if n := t.GetInt64(t.Pos + flatbuffers.UOffsetT(o)); n < 0 || n > MaxBatchRows {
			panic(errHeader)
		}
	}
	_, buffers := t.vector(slotBatchBuffers, 16)
	start, n := t.vector(slotBatchVariadic, 8)
	for i := range n {
		if count := t.GetInt64(start + flatbuffers.UOffsetT(8*i)); count < 0 || count > int64(buffers) {
			panic(errHeader)
		}
	}
}
