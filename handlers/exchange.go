package handlers

import (
	"bytes"
	"context"
	"sync"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/tensor"
)

// What streams hold, from the moment at which a record batch was read until it is answered. A
// stream that holds nothing may always read one; beyond that it holds readAhead record batches
// and streamBytes at most, and reads on only while all streams together hold less than runnerBytes.
const (
	readAhead   = 5
	streamBytes = 64 << 20
	runnerBytes = 1 << 30
)

// exchange is one stream at a runner: a goroutine that reads, and the handler's own that
// runs and writes, joined by a bounded channel. Answers leave in the order of the batches.
type exchange struct {
	options    RunnerOptions
	descriptor *Descriptor
	plan       *tensor.Plan
	binding    *tensor.Binding
	pictures   tensor.Pictures
	queue      *batch.Stream
	whole      bool // a record batch is one run, whatever its pictures take
	writer     *answerWriter
	pulse      *pulse
	answered   func(rows, refused int64) // called after each answered record batch

	rows, batches int64
	refused       int64 // rows of the record batch that is being answered
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
	limits := d.Batching.limits()
	if plan.Open() { // other rows may change the size of an output: cut only what asks for it
		limits.Alone, limits.Off = true, limits.Off || limits.MaxBatchSize == 0
	}
	queue := options.Batches.Stream(batch.Call{Fetches: plan.Fetches(), Timeout: d.runTimeout(), Check: plan.CheckOutputs, Limits: limits})
	return &exchange{options: options, descriptor: d, plan: plan, binding: binding, pictures: pictures, queue: queue, whole: limits.Off && d.Model != control.Image}, nil
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
		before := x.rows
		if err := x.answer(stream.Context(), arrived, arrivals); err != nil {
			return err
		}
		x.answered(x.rows-before, x.refused)
		x.refused = 0
	}
	if arrivals.err != nil {
		return streamError(arrivals.err, "record batch %d cannot be read: %w", x.batches, arrivals.err)
	}
	return nil
}

// answer runs one record batch and gives it back. Pictures are decoded and answered a piece at a time,
// since they may be much larger as tensors.
func (x *exchange) answer(ctx context.Context, arrived arrival, arrivals *arrivals) error {
	defer arrivals.done(arrived)
	started := time.Now()
	if err := x.binding.Check(arrived.rec); err != nil {
		return x.descriptor.say(err)
	}
	waited := started.Sub(arrived.at)
	total := arrived.rec.NumRows()
	ends := []int64{total}
	if !x.whole {
		ends = x.binding.Cut(arrived.rec, x.pictures, maxPictureBytes)
	}
	lo := int64(0)
	for _, hi := range ends {
		piece := arrived.rec.NewSlice(lo, hi)
		err := x.answerPiece(ctx, piece, lo, hi == total, waited, arrived.at)
		piece.Release()
		if err != nil {
			return err
		}
		lo = hi
	}
	x.batches++
	x.rows += total
	return nil
}

// maxPictureBytes bounds the tensors that are made of pictures at once, unless a single one is larger.
const maxPictureBytes = 64 << 20

// answerPiece runs the rows of a record batch from lo on, which is all of them but for pictures, and
// writes their answer, in several parts if it is large.
func (x *exchange) answerPiece(ctx context.Context, rec arrow.Record, lo int64, final bool, waited time.Duration, arrivedAt time.Time) error {
	meta := AnswerMetadata{Batch: x.batches, QueueUS: waited.Microseconds()}
	if x.batches == 0 && lo == 0 {
		meta.Server = x.options.Server
	}
	rows := tensor.NewRows(int(rec.NumRows()))
	x.pulse.work(true)
	ran, err := x.run(ctx, rec, rows, lo)
	x.pulse.work(false)
	if err != nil {
		return err
	}
	var values []tensor.Value
	if ran != nil {
		defer ran.Close()
		x.runTime += ran.Run
		meta.QueueUS += ran.Queue.Microseconds()
		meta.RunUS, meta.TFRows = ran.Run.Microseconds(), ran.TFRows
		values = ran.Values
	}
	if rows.Kept() > 0 {
		settled, owned := x.plan.Settle(values, rows, x.options.Memory)
		if owned {
			defer func() {
				for i := range settled {
					settled[i].Release()
				}
			}()
		}
		values = settled
	}
	if err := x.refuse(rows, lo); err != nil {
		return err
	}
	x.refused += rows.Refused()
	err = x.plan.Records(values, rows, answerMemory, func(rec arrow.Record, last bool) error {
		meta.Last = last && final
		meta.TotalUS = time.Since(arrivedAt).Microseconds()
		err := x.writer.write(rec, meta)
		x.pulse.move()
		meta.Server = ""
		return err
	})
	if _, ok := fault.KindOf(err); ok {
		return x.descriptor.say(err)
	}
	return err
}

// run makes the input tensors of rows, which begin at lo of their record batch, and runs them. It
// returns nil where no row takes part.
func (x *exchange) run(ctx context.Context, rec arrow.Record, rows *tensor.Rows, lo int64) (*batch.Answer, error) {
	x.binding.Nulls(rec, rows, x.descriptor.Nulls == "fail")
	if rows.Kept() == 0 {
		return nil, x.refuse(rows, lo)
	}
	feeds, err := x.binding.Values(ctx, rec, rows, x.pictures, x.options.Memory)
	if err != nil {
		return nil, x.descriptor.say(err)
	}
	if err := x.refuse(rows, lo); err != nil || rows.Kept() == 0 {
		tensor.ReleaseFeeds(feeds)
		return nil, err
	}
	kept := rows.Positions()
	ran, err := x.queue.Run(ctx, feeds, len(kept), x.descriptor.OnError == OnErrorFail)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, x.descriptor.say(fault.New(kindOf(err), "record batch %d: %w", x.batches, err))
	}
	for at, reason := range ran.Refused {
		rows.Refuse(kept[at], reason)
	}
	if err := x.refuse(rows, lo); err != nil {
		ran.Close()
		return nil, err
	}
	return ran, nil
}

// refuse returns the error of the first refused row, if one ends the stream. The rows begin at lo.
func (x *exchange) refuse(rows *tensor.Rows, lo int64) error {
	row, reason, ok := rows.FirstRefused()
	if !ok || x.descriptor.OnError != OnErrorFail {
		return nil
	}
	return x.descriptor.say(rowError(x.batches, lo+int64(row), reason))
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
		return ipc.NewWriterWithPayloadWriter(w, ipc.WithSchema(schema), ipc.WithAllocator(answerMemory))
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
	err    error // why reading ended, nil at the end of the stream; valid once list is closed
	cancel context.CancelFunc
	ahead  *ahead
	pulse  *pulse // of the stream

	// Guarded by ahead.mu; what is in work included.
	held  int
	bytes int64
}

// ahead bounds what all streams of a runner hold together.
type ahead struct {
	mu    sync.Mutex // guards the fields below, and those of arrivals
	bytes int64
	less  chan struct{} // closed, and made anew, when a stream gives something back
}

func newAhead() *ahead { return &ahead{less: make(chan struct{})} }

// room waits until the stream may read a further record batch, and reports whether it may before
// ctx ends.
func (a *arrivals) room(ctx context.Context) bool {
	for {
		a.ahead.mu.Lock()
		ok := a.held == 0 || a.held < readAhead && a.bytes < streamBytes && a.ahead.bytes < runnerBytes
		less := a.ahead.less
		a.ahead.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-less:
		case <-ctx.Done():
			return false
		}
	}
}

// hold counts a record batch that was read, or with -1 one that is given back.
func (a *arrivals) hold(sign int, bytes int64) {
	a.ahead.mu.Lock()
	defer a.ahead.mu.Unlock()
	a.held += sign
	a.bytes += int64(sign) * bytes
	a.ahead.bytes += int64(sign) * bytes
	if sign < 0 {
		close(a.ahead.less)
		a.ahead.less = make(chan struct{})
	}
}

// readAll starts reading the stream into the result. It takes over reader and gives back
// everything when the stream is over; ended is called last. The caller must call leave.
func readAll(ctx context.Context, reader *flight.Reader, mem *readMemory, bound *ahead, p *pulse, log *zap.Logger, ended func()) *arrivals {
	ctx, cancel := context.WithCancel(ctx)
	a := &arrivals{pulse: p, list: make(chan arrival, readAhead), ahead: bound, cancel: cancel} // room for all that it may hold
	go func() {
		defer ended()
		defer mem.lost() // after the reader, whose dictionaries may still be fresh
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
	defer guard(log, "read", &a.err)
	for {
		if !a.room(ctx) {
			a.err = ctx.Err()
			return
		}
		if !reader.Next() {
			a.err = reader.Err()
			return
		}
		a.pulse.move()
		mem.whole()
		next := arrival{rec: reader.Record(), at: time.Now()}
		next.bytes = recordBytes(next.rec)
		next.rec.Retain()
		a.hold(1, next.bytes)
		a.list <- next
	}
}

// done gives back one arrival.
func (a *arrivals) done(arrived arrival) {
	arrived.rec.Release()
	a.hold(-1, arrived.bytes)
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
	if dictionary, _ := data.Dictionary().(*array.Data); dictionary != nil {
		n += dataBytes(dictionary)
	}
	return n
}
