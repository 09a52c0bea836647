package handlers

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// Engine is the loaded model of a runner. Its methods are safe for concurrent use.
type Engine interface {
	// Model says which signatures the loaded SavedModel has.
	Model() *savedmodel.Model
	// Run feeds graph tensors and fetches others. It takes over the feeds and releases them,
	// also on error. timeout bounds the run, 0 is none. The caller closes the outputs.
	Run(ctx context.Context, feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error)
	// Pictures returns what decodes pictures for the given inputs.
	Pictures(specs map[string]Preprocess) (tensor.Pictures, error)
}

// Outputs are the results of one run. The values view native memory until Close.
type Outputs interface {
	Values() []tensor.Value
	Close()
}

// StreamEvents is told when a stream opens and closes, with the lease that opened it.
type StreamEvents interface {
	StreamOpened(lease string)
	StreamClosed(lease string)
}

// RunnerOptions are what a runner's service needs.
type RunnerOptions struct {
	Engine Engine
	Events StreamEvents
	Key    []byte           // for leases
	Server string           // who answers, for instance "host:1234"; goes into app_metadata
	Memory memory.Allocator // off the Go heap and 64-byte aligned, so tensors need no copy
	Log    *zap.Logger
}

// Runner is the Flight service of a runner process: DoExchange, and nothing else.
type Runner struct {
	flight.BaseFlightServer
	options RunnerOptions
	leases  leases
	readers sync.WaitGroup // one for each stream's reading goroutine
}

// NewRunner returns the service for one loaded model.
func NewRunner(options RunnerOptions) *Runner {
	return &Runner{options: options, leases: leases{key: options.Key, used: map[string]time.Time{}}}
}

// DoExchange serves one stream of inference.
func (r *Runner) DoExchange(stream flight.FlightService_DoExchangeServer) error {
	mem := &readMemory{Allocator: r.options.Memory, fresh: map[*byte][]byte{}}
	reader, descriptor, err := openReader(stream, mem)
	if err != nil {
		return err
	}
	d, err := ParseDescriptor(descriptor)
	schema := reader.Schema()
	r.readers.Add(1)
	arrivals := readAll(stream.Context(), reader, mem, r.options.Log, r.readers.Done)
	defer arrivals.leave()
	if err != nil {
		return err
	}
	if err := r.leases.spend(d.Lease, time.Now()); err != nil {
		return err
	}
	r.options.Events.StreamOpened(d.Lease.ID)
	defer r.options.Events.StreamClosed(d.Lease.ID)
	log := r.options.Log.With(zap.String("request_id", d.RequestID), zap.String("model", d.Model), zap.String("signature", d.Signature))
	log.Debug("stream opened")
	exchange, err := newExchange(r.options, d, schema)
	if err != nil {
		return err
	}
	started := time.Now()
	err = exchange.serve(stream, arrivals)
	log.Info("stream ended", zap.Int64("rows", exchange.rows), zap.Int64("record_batches", exchange.batches), zap.Duration("run_time", exchange.runTime), zap.Duration("total_time", time.Since(started)), zap.Error(err))
	return err
}

// Close waits until nothing reads any more. Call it after the gRPC server has stopped.
func (r *Runner) Close() { r.readers.Wait() }

// AnswerMetadata is the app_metadata of an answered record batch. Times are microseconds.
type AnswerMetadata struct {
	Batch   int64  `json:"batch"` // which input record batch this answers, from 0
	Last    bool   `json:"last"`  // whether it is the last part of that answer
	QueueUS int64  `json:"queue_us"`
	RunUS   int64  `json:"run_us"`
	TotalUS int64  `json:"total_us"`
	TFRows  int    `json:"tf_rows"`          // rows of the TensorFlow run
	Server  string `json:"server,omitempty"` // on the first answer only
}

func (m AnswerMetadata) encode() []byte {
	data, err := json.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("numbers and strings always encode: %v", err))
	}
	return data
}

// rowError is the fault of a refused row under on_error fail.
func rowError(batch int64, row int, reason string) error {
	return fault.New(fault.BadRequest, "row %d of record batch %d: %s; on_error \"null\" or \"column\" lets the other rows through", row, batch, reason)
}

// Interface guards.
var _ flight.FlightServer = (*Runner)(nil)
