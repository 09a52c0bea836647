package handlers

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/status"

	"flightsvc/internal/fault"
	"flightsvc/internal/tensor"
)

// MaxMessageBytes is the largest Flight message that we take: a row of tensor.MaxRowBytes with what
// Arrow and Flight put around it. gRPC refuses more with ResourceExhausted.
const MaxMessageBytes = tensor.MaxRowBytes + 1<<20

// readAhead bounds the record batches that a stream holds besides the one in work: at most
// this many, and at most budgetBytes together unless a single one is larger.
const (
	readAhead   = 4
	budgetBytes = 64 << 20
)

// openReader reads the first messages of a stream: the descriptor and the schema. They may come
// as one message or as two, and a client may repeat the descriptor; the first one counts.
func openReader(stream flight.DataStreamReader, mem *readMemory) (*flight.Reader, *flight.FlightDescriptor, error) {
	first := &firstDescriptor{DataStreamReader: stream}
	reader, err := flight.NewRecordReader(first, ipc.WithAllocator(mem))
	if err != nil {
		return nil, nil, streamError(err, "the stream must begin with a descriptor and a schema: %w", err)
	}
	return reader, first.descriptor, nil
}

// firstDescriptor keeps the first descriptor that comes by.
type firstDescriptor struct {
	flight.DataStreamReader
	descriptor *flight.FlightDescriptor
}

// Recv is part of flight.DataStreamReader.
func (f *firstDescriptor) Recv() (*flight.FlightData, error) {
	message, err := f.DataStreamReader.Recv()
	if f.descriptor == nil {
		f.descriptor = message.GetFlightDescriptor()
	}
	return message, err
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
// Go heap; readMemory knows them.
type readMemory struct {
	memory.Allocator

	mu    sync.Mutex       // guards fresh
	fresh map[*byte][]byte // not freed, of the record batch that is being read
}

// Allocate is part of memory.Allocator.
func (m *readMemory) Allocate(size int) []byte {
	b := m.Allocator.Allocate(size)
	m.mu.Lock()
	defer m.mu.Unlock()
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

// exchange is one stream at a runner: a goroutine that reads, and the handler's own that
// runs and writes, joined by a bounded channel. Answers leave in the order of the batches.
type exchange struct {
	options    RunnerOptions
	descriptor *Descriptor
	plan       *tensor.Plan
	binding    *tensor.Binding
	pictures   tensor.Pictures
	writer     *answerWriter

	rows, batches int64
	runTime       time.Duration
}

func newExchange(options RunnerOptions, d *Descriptor, schema *arrow.Schema) (*exchange, error) {
	plan, err := d.Plan(options.Engine.Model())
	if err != nil {
		return nil, err
	}
	binding, err := plan.Bind(schema)
	if err != nil {
		return nil, d.say(err)
	}
	pictures, err := options.Engine.Pictures(d.Preprocess)
	if err != nil {
		return nil, d.say(err)
	}
	return &exchange{options: options, descriptor: d, plan: plan, binding: binding, pictures: pictures}, nil
}

// serve runs until the client half-closes, leaves, or an error ends the stream. It is the
// stream's only sender.
func (x *exchange) serve(stream flight.FlightService_DoExchangeServer, arrivals *arrivals) error {
	writer, err := newAnswerWriter(stream, x.plan.Schema())
	if err != nil {
		return err
	}
	x.writer = writer
	for arrived := range arrivals.list {
		if err := x.answer(stream.Context(), arrived, arrivals); err != nil {
			return err
		}
	}
	if arrivals.err != nil {
		return streamError(arrivals.err, "record batch %d cannot be read: %w", x.batches, arrivals.err)
	}
	return nil
}

// answer runs one record batch, writes its answer, in several parts if it is large, and gives
// the batch back.
func (x *exchange) answer(ctx context.Context, arrived arrival, arrivals *arrivals) error {
	defer arrivals.done(arrived)
	started := time.Now()
	if err := x.binding.Check(arrived.rec); err != nil {
		return x.descriptor.say(err)
	}
	meta := AnswerMetadata{Batch: x.batches, QueueUS: started.Sub(arrived.at).Microseconds()}
	if x.batches == 0 {
		meta.Server = x.options.Server
	}
	rows := tensor.NewRows(int(arrived.rec.NumRows()))
	outputs, err := x.run(ctx, arrived.rec, rows, &meta)
	if err != nil {
		return err
	}
	var values []tensor.Value
	if outputs != nil {
		defer outputs.Close()
		values = outputs.Values()
	}
	err = x.plan.Records(values, rows, answerMemory, func(rec arrow.Record, last bool) error {
		meta.Last = last
		meta.TotalUS = time.Since(arrived.at).Microseconds()
		err := x.writer.write(rec, meta)
		meta.Server = ""
		return err
	})
	if err != nil {
		if _, ok := fault.KindOf(err); ok {
			return x.descriptor.say(err)
		}
		return err
	}
	x.batches++
	x.rows += arrived.rec.NumRows()
	return nil
}

// run makes the input tensors of one record batch and runs them. It returns no outputs
// where no row takes part.
func (x *exchange) run(ctx context.Context, rec arrow.Record, rows *tensor.Rows, meta *AnswerMetadata) (Outputs, error) {
	x.binding.Nulls(rec, rows, x.descriptor.Nulls == "fail")
	var feeds []tensor.Feed
	if rows.Kept() > 0 {
		var err error
		if feeds, err = x.binding.Values(rec, rows, x.pictures, x.options.Memory); err != nil {
			return nil, x.descriptor.say(err)
		}
	}
	if row, reason, ok := rows.FirstRefused(); ok && x.descriptor.OnError == OnErrorFail {
		tensor.ReleaseFeeds(feeds)
		return nil, x.descriptor.say(rowError(x.batches, row, reason))
	}
	if len(feeds) == 0 {
		return nil, nil
	}
	started := time.Now()
	outputs, err := x.options.Engine.Run(ctx, feeds, x.plan.Fetches(), x.descriptor.runTimeout())
	if err != nil {
		return nil, x.descriptor.say(err)
	}
	took := time.Since(started)
	x.runTime += took
	meta.RunUS, meta.TFRows = took.Microseconds(), rows.Kept()
	return outputs, nil
}

// answerMemory is where answers are built and encoded: Go memory, which is zeroed. Arrow's encoder
// takes the validity bits of a column without a valid row from it and does not clear them.
var answerMemory = memory.NewGoAllocator()

// answerWriter sends the schema at once, so that a client knows that its stream is open before
// it has sent a row, and then record batches with their metadata. flight.Writer would hold the
// schema back until the first of them.
type answerWriter struct {
	stream  flight.DataStreamWriter
	encoder *ipc.Writer
	body    bytes.Buffer // kept, at the size of the largest record batch so far
	about   []byte       // metadata of the next message
	known   bool         // the next message is the schema, which the client has
}

func newAnswerWriter(stream flight.DataStreamWriter, schema *arrow.Schema) (*answerWriter, error) {
	w := &answerWriter{stream: stream}
	encoder := func() *ipc.Writer {
		// Memory of the Go heap is zeroed, which Arrow's writer expects when a column is all null: it
		// sends the validity bits as they were allocated.
		return ipc.NewWriterWithPayloadWriter(w, ipc.WithSchema(schema), ipc.WithAllocator(memory.DefaultAllocator))
	}
	// A writer that is closed before its first record batch has sent the schema alone.
	if err := encoder().Close(); err != nil {
		return nil, err
	}
	w.encoder, w.known = encoder(), true
	return w, nil
}

func (w *answerWriter) write(rec arrow.Record, about AnswerMetadata) error {
	w.about = about.encode()
	return w.encoder.Write(rec)
}

// WritePayload copies one encoded message into the body and sends it; gRPC copies that into its
// own buffers before Send returns. It is part of ipc.PayloadWriter.
func (w *answerWriter) WritePayload(payload ipc.Payload) error {
	meta := payload.Meta()
	defer meta.Release()
	if w.known {
		w.known = false
		return nil
	}
	w.body.Reset()
	if err := payload.SerializeBody(&w.body); err != nil {
		return err
	}
	return w.stream.Send(&flight.FlightData{DataHeader: meta.Bytes(), DataBody: w.body.Bytes(), AppMetadata: w.about})
}

// Start is part of ipc.PayloadWriter.
func (w *answerWriter) Start() error { return nil }

// Close is part of ipc.PayloadWriter.
func (w *answerWriter) Close() error { return nil }

// arrival is a record batch that was read, with the time at which it was whole.
type arrival struct {
	rec   arrow.Record
	bytes int64
	at    time.Time
}

// arrivals is the bounded way from the goroutine that reads a stream to the one that answers.
type arrivals struct {
	list   chan arrival
	budget *semaphore.Weighted
	err    error // why reading ended, nil at the end of the stream; valid once list is closed
	cancel context.CancelFunc
}

// readAll starts reading the stream into the result. It takes over reader and gives back
// everything when the stream is over; ended is called last. The caller must call leave.
func readAll(ctx context.Context, reader *flight.Reader, mem *readMemory, log *zap.Logger, ended func()) *arrivals {
	ctx, cancel := context.WithCancel(ctx)
	a := &arrivals{list: make(chan arrival, readAhead), budget: semaphore.NewWeighted(budgetBytes), cancel: cancel}
	go func() {
		defer ended()
		defer reader.Release()
		a.read(ctx, reader, mem, log)
		close(a.list)
		if ctx.Err() != nil {
			a.drain()
		}
	}()
	return a
}

func (a *arrivals) read(ctx context.Context, reader *flight.Reader, mem *readMemory, log *zap.Logger) {
	defer mem.lost()
	defer guard(log, "read", &a.err)
	for reader.Next() {
		mem.whole()
		next := arrival{rec: reader.Record(), at: time.Now()}
		next.bytes = min(recordBytes(next.rec), budgetBytes)
		if a.err = a.budget.Acquire(ctx, next.bytes); a.err != nil {
			return
		}
		next.rec.Retain()
		select {
		case a.list <- next:
		case <-ctx.Done():
			next.rec.Release()
			a.err = ctx.Err()
			return
		}
	}
	a.err = reader.Err()
}

// done gives back one arrival.
func (a *arrivals) done(arrived arrival) {
	arrived.rec.Release()
	a.budget.Release(arrived.bytes)
}

// leave gives back what was read and will not be answered. Reading itself ends when gRPC
// ends Recv, which it does once the handler has returned.
func (a *arrivals) leave() {
	a.cancel()
	a.drain()
}

func (a *arrivals) drain() {
	for {
		select {
		case arrived, ok := <-a.list:
			if !ok {
				return
			}
			a.done(arrived)
		default:
			return
		}
	}
}

// recordBytes returns the size of a record batch's buffers.
func recordBytes(rec arrow.Record) int64 {
	n := int64(0)
	for _, column := range rec.Columns() {
		n += dataBytes(column.Data())
	}
	return n
}

func dataBytes(data arrow.ArrayData) int64 {
	n := int64(0)
	for _, buffer := range data.Buffers() {
		if buffer != nil {
			n += int64(buffer.Len())
		}
	}
	for _, child := range data.Children() {
		n += dataBytes(child)
	}
	return n
}
