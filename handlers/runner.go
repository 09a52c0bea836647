// Runner: the Flight service of a runner process, which is DoExchange alone.

package handlers

import (
	"cmp"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// Engine is the loaded model of a runner. Its methods are safe for concurrent use.
type Engine interface {
	// Model says which signatures the loaded SavedModel has.
	Model() *savedmodel.Model
	// Pictures returns what decodes pictures for the given inputs.
	Pictures(specs map[string]protocol.Preprocess) (tensor.Pictures, error)
}

// StreamEvents receives the events of streams, each named by the lease that opened it. Several goroutines call its
// methods at once, but those for one stream are called in the order of the events.
type StreamEvents interface {
	StreamOpened(lease string)
	// StreamResting says that nothing has moved on a stream for RunnerOptions.StreamRest: no message came, no run was
	// queued or under way, no answer was taken. StreamStirring says that one of these has happened since.
	StreamResting(lease string)
	StreamStirring(lease string)
	StreamClosed(lease string)
	// Answered is called once, when the first record batch of the runner's life has been answered.
	Answered()
}

// RunnerOptions are what a runner's service needs.
type RunnerOptions struct {
	Engine  Engine
	Batches *batch.Scheduler // runs the engine's session
	Events  StreamEvents
	Key     []byte // for leases
	Server  string // names this runner in answers, for instance "host:1234"; goes into app_metadata
	Form    string // protocol.FormSaved or protocol.FormFolded, also for app_metadata
	// StreamRest is how long nothing moves on a stream before it counts as resting; control.StreamRest if 0.
	StreamRest time.Duration
	Memory     memory.Allocator // off the Go heap and 64-byte aligned, so tensors need no copy
	Log        *zap.Logger
}

// MaxStreams is how many streams a runner has open at once. It bounds the runner's memory, because each stream may hold
// a record batch; Spark opens one for each task of an executor.
const MaxStreams = 256

// Runner is the Flight service of a runner process: DoExchange, and nothing else.
type Runner struct {
	flight.BaseFlightServer
	options RunnerOptions
	leases  leases
	ahead   *ahead
	streams atomic.Int64
	rows    atomic.Int64   // answered
	errors  atomic.Int64   // rows refused, and streams failed
	readers sync.WaitGroup // one for each stream's reading goroutine
	first   sync.Once      // for StreamEvents.Answered
}

// NewRunner returns the service for one loaded model.
func NewRunner(options RunnerOptions) *Runner {
	options.StreamRest = cmp.Or(options.StreamRest, control.StreamRest)
	return &Runner{options: options, leases: leases{key: options.Key, used: map[string]time.Time{}}, ahead: newAhead()}
}

// DoExchange serves one stream of inference.
func (r *Runner) DoExchange(stream flight.FlightService_DoExchangeServer) (err error) {
	defer func() {
		kind, _ := fault.KindOf(err)
		// after Unavailable a client tries again, and a client that has left is no failure
		if err != nil && kind != fault.Unavailable && stream.Context().Err() == nil {
			r.errors.Add(1)
		}
	}()
	mem := NewReadMemory(r.options.Memory, maxStreamMemory)
	reader, descriptor, err := OpenReader(stream, mem)
	if err != nil {
		return err
	}
	d, err := ParseDescriptor(descriptor) // err is checked once readAll has taken over the reader
	schema := reader.Schema()
	p := newPulse(r.options.StreamRest)
	r.readers.Add(1)
	arrivals := readAll(stream.Context(), reader, mem, r.ahead, p, r.options.Log, r.readers.Done)
	defer arrivals.leave()
	if err != nil {
		return err
	}
	if err := r.leases.spend(d, time.Now()); err != nil {
		return err
	}
	r.options.Events.StreamOpened(d.Lease.ID)
	defer r.options.Events.StreamClosed(d.Lease.ID)
	p.start(d.Lease.ID, r.options.Events)
	defer p.stop() // before StreamClosed is called
	log := r.options.Log.With(zap.String("request_id", d.RequestID), zap.String("model", d.Model),
		zap.String("signature", d.Signature))
	log.Debug("stream opened")
	defer r.streams.Add(-1)
	if r.streams.Add(1) > MaxStreams {
		return stayAway(stream, time.Second, fmt.Sprintf("it has %d streams open, the most that it takes", MaxStreams))
	}
	if retryAfter, full := r.options.Batches.Full(); full {
		return stayAway(stream, retryAfter, "its queue is full")
	}
	p.work(true)
	exchange, err := newExchange(r.options, d, schema)
	p.work(false)
	if err != nil {
		return err
	}
	exchange.pulse, exchange.answered = p, func(rows, refused int64) {
		r.rows.Add(rows)
		r.errors.Add(refused)
		r.first.Do(r.options.Events.Answered)
	}
	started := time.Now()
	err = exchange.serve(stream, arrivals)
	log.Info("stream ended", zap.Int64("rows", exchange.rows), zap.Int64("record_batches", exchange.batches),
		zap.Duration("run_time", exchange.runTime), zap.Duration("total_time", time.Since(started)), cause(err))
	return err
}

// Counts returns what the runner has done so far, and how many rows wait.
func (r *Runner) Counts() control.Counts {
	c := r.options.Batches.Counts()
	return control.Counts{
		Rows: r.rows.Load(), Errors: r.errors.Load(), Runs: c.Runs, JoinedRuns: c.JoinedRuns, Queued: c.Queued,
		QueueSeconds: c.QueueTime.Seconds(), RunSeconds: c.RunTime.Seconds(),
	}
}

// stayAway refuses a stream because the runner has no room now, and says in the trailer when to ask again.
func stayAway(stream grpc.ServerStream, retryAfter time.Duration, reason string) error {
	stream.SetTrailer(metadata.Pairs(protocol.RetryAfter, fmt.Sprint(retryAfter.Milliseconds())))
	return fault.New(fault.Unavailable, "the runner accepts no more streams now, %s; ask again in %d ms (%s)", reason,
		retryAfter.Milliseconds(), protocol.RetryAfter)
}

// Close waits until no goroutine reads a stream any more. Call it after the gRPC server has stopped.
func (r *Runner) Close() { r.readers.Wait() }

// rowError is the fault of a refused row under on_error fail.
func rowError(batch, row int64, reason string) error {
	return fault.New(fault.BadRequest, "row %d of record batch %d: %s; on_error \"null\" or \"column\" lets the other "+
		"rows through", row, batch, reason)
}

// Interface guards.
var _ flight.FlightServer = (*Runner)(nil)
