// Exchange: one stream of inference at a runner, from record batches to answers.

package handlers

import (
	"context"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/batch"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/tensor"
)

// exchange is one stream at a runner: a goroutine that reads, and the handler's own that runs and writes, joined by a
// bounded channel. Answers leave in the order of the record batches.
type exchange struct {
	options    RunnerOptions
	descriptor *protocol.Descriptor
	plan       *tensor.Plan
	binding    *tensor.Binding
	pictures   tensor.Pictures
	queue      *batch.Stream
	whole      bool // a record batch is one run, whatever memory its pictures take
	writer     *answerWriter
	pulse      *pulse
	answered   func(rows, refused int64) // called after each answered record batch

	rows, batches int64
	refused       int64 // rows of the record batch that is being answered
	runTime       time.Duration
}

func newExchange(options RunnerOptions, d *protocol.Descriptor, schema *arrow.Schema) (*exchange, error) {
	plan, err := Plan(d, options.Engine.Model())
	if err != nil {
		return nil, err
	}
	binding, err := plan.Bind(schema)
	if err != nil {
		return nil, d.Annotate(err)
	}
	pictures, err := options.Engine.Pictures(d.Preprocess)
	if err != nil {
		return nil, d.Annotate(err)
	}
	limits := batchLimits(d.Batching)
	if plan.Open() { // an output's size may depend on the other rows of a run: join none, cut only for max_batch_size
		limits.Alone, limits.Off = true, limits.Off || limits.MaxBatchSize == 0
	}
	call := batch.Call{Fetches: plan.Fetches(), Timeout: d.RunTimeout(), Check: plan.CheckOutputs, Limits: limits}
	return &exchange{
		options: options, descriptor: d, plan: plan, binding: binding, pictures: pictures,
		queue: options.Batches.Stream(call), whole: limits.Off && d.Model != protocol.Image,
	}, nil
}

// serve runs until the client half-closes or leaves, or an error ends the stream. It is the stream's only sender.
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
		return StreamError(arrivals.err, "record batch %d cannot be read: %w", x.batches, arrivals.err)
	}
	return nil
}

// answer runs one record batch and releases it. A record batch of pictures is run slice by slice, because pictures may
// be much larger as tensors.
func (x *exchange) answer(ctx context.Context, arrived arrival, arrivals *arrivals) error {
	defer arrivals.done(arrived)
	started := time.Now()
	if err := x.binding.Check(arrived.rec); err != nil {
		return x.descriptor.Annotate(err)
	}
	waited := started.Sub(arrived.at)
	total := arrived.rec.NumRows()
	ends := []int64{total}
	if !x.whole {
		ends = x.binding.Cut(arrived.rec, x.pictures, maxPictureBytes)
	}
	lo := int64(0)
	for _, hi := range ends {
		slice := arrived.rec.NewSlice(lo, hi)
		err := x.answerSlice(ctx, slice, lo, hi == total, waited, arrived.at)
		slice.Release()
		if err != nil {
			return err
		}
		lo = hi
	}
	x.batches++
	x.rows += total
	return nil
}

// maxPictureBytes bounds the tensors that are made of pictures at once, except for a single larger picture.
const maxPictureBytes = 64 << 20

// answerSlice runs the rows of rec, which begin at row lo of their record batch, and writes their answer, in several
// parts if it is large. final says that no further slice follows.
func (x *exchange) answerSlice(
	ctx context.Context, rec arrow.Record, lo int64, final bool, waited time.Duration, arrivedAt time.Time,
) error {
	meta := protocol.AnswerMetadata{Batch: x.batches, QueueUS: waited.Microseconds()}
	if x.batches == 0 && lo == 0 {
		meta.Server, meta.Form = x.options.Server, x.options.Form
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
		meta.Server, meta.Form = "", ""
		return err
	})
	if _, ok := fault.KindOf(err); ok {
		return x.descriptor.Annotate(err)
	}
	return err
}

// run makes the input tensors of rows, which begin at row lo of their record batch, and runs them. It returns nil if no
// row takes part.
func (x *exchange) run(ctx context.Context, rec arrow.Record, rows *tensor.Rows, lo int64) (*batch.Answer, error) {
	x.binding.Nulls(rec, rows, x.descriptor.Nulls == "fail")
	if rows.Kept() == 0 {
		return nil, x.refuse(rows, lo)
	}
	feeds, err := x.binding.Values(ctx, rec, rows, x.pictures, x.options.Memory)
	if err != nil {
		return nil, x.descriptor.Annotate(err)
	}
	if err := x.refuse(rows, lo); err != nil || rows.Kept() == 0 {
		tensor.ReleaseFeeds(feeds)
		return nil, err
	}
	kept := rows.Positions()
	ran, err := x.queue.Run(ctx, feeds, len(kept), x.descriptor.OnError == protocol.OnErrorFail)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, x.descriptor.Annotate(fault.New(kindOf(err), "record batch %d: %w", x.batches, err))
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

// refuse returns the error of the first refused row if that ends the stream. The rows begin at row lo.
func (x *exchange) refuse(rows *tensor.Rows, lo int64) error {
	row, reason, ok := rows.FirstRefused()
	if !ok || x.descriptor.OnError != protocol.OnErrorFail {
		return nil
	}
	return x.descriptor.Annotate(rowError(x.batches, lo+int64(row), reason))
}
