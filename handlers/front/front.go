// Front: schemas, tickets and relayed streams.

package front

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/handlers"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// Options are what the front's service needs.
type Options struct {
	Repository *repository.Repository
	Cache      *modelcache.Cache
	Tuner      *tuning.Tuner
	Version    string
	Build      string
	Server     string // names this server in answers: "host:pid", after "executor ID " if it has one
	Executor   string // Spark's id of the executor that this front belongs to; "" for none
	Shutdown   func() // called by the action server.shutdown
	Log        *zap.Logger
}

// Front is the Flight service that callers find first: it answers what needs no model in memory, makes models ready,
// and sends callers on to runners or relays for them.
type Front struct {
	flight.BaseFlightServer
	options Options
}

// New returns the service.
func New(options Options) *Front { return &Front{options: options} }

// request is a descriptor with its model and the schema of its answer.
type request struct {
	descriptor *protocol.Descriptor
	asked      string // the version, as the caller wrote it
	model      repository.Model
	schema     *arrow.Schema
}

// resolve reads a descriptor and plans it, without loading anything.
func (f *Front) resolve(ctx context.Context, fd *flight.FlightDescriptor) (*request, error) {
	d, err := handlers.ParseDescriptor(fd)
	if err != nil {
		return nil, err
	}
	r := &request{descriptor: d, asked: d.Version}
	return r, f.plan(ctx, r)
}

// plan finds the request's model and plans the answer.
func (f *Front) plan(ctx context.Context, r *request) error {
	model, err := f.options.Cache.Resolve(ctx, r.descriptor.Model, r.asked)
	if err != nil {
		return err
	}
	plan, err := handlers.Plan(r.descriptor, model.Saved)
	if err != nil {
		return err
	}
	r.model, r.schema, r.descriptor.Version = model, plan.Schema(), model.Version
	return nil
}

// admit makes the request's model ready and leases a stream on its runner. If the load fails and the version that was
// asked for, such as "latest", now means another one, admit goes on with that.
func (f *Front) admit(ctx context.Context, r *request) (*modelcache.Runner, error) {
	started := time.Now()
	for {
		runner, err := f.options.Cache.Ready(ctx, r.model, r.descriptor.Device)
		if err != nil {
			failed := r.model.Version
			if f.plan(ctx, r) == nil && r.model.Version != failed {
				continue
			}
			return nil, err
		}
		if err := r.descriptor.Grant(runner.Key(), time.Now()); err != nil {
			return nil, err
		}
		lease := r.descriptor.Lease
		if !runner.Leased(lease.ID, r.descriptor.RequestID, time.UnixMilli(lease.Expires)) {
			continue // the runner has been unloaded, or has ended
		}
		f.options.Log.Info("stream admitted", zap.String("request_id", r.descriptor.RequestID),
			zap.String("model", r.descriptor.Model), zap.Int("runner", runner.PID()),
			zap.Duration("wait_time", time.Since(started)))
		return runner, nil
	}
}

// GetSchema returns the schema of the answer, without loading the model.
func (f *Front) GetSchema(ctx context.Context, fd *flight.FlightDescriptor) (*flight.SchemaResult, error) {
	r, err := f.resolve(ctx, fd)
	if err != nil {
		return nil, err
	}
	return &flight.SchemaResult{Schema: flight.SerializeSchema(r.schema, memory.DefaultAllocator)}, nil
}

// GetFlightInfo makes the model ready and returns the answer's schema and one endpoint: a ticket, and the runner's
// location unless the caller wants to be relayed.
func (f *Front) GetFlightInfo(ctx context.Context, fd *flight.FlightDescriptor) (*flight.FlightInfo, error) {
	r, err := f.resolve(ctx, fd)
	if err != nil {
		return nil, err
	}
	runner, err := f.admit(ctx, r)
	if err != nil {
		return nil, err
	}
	ticket, err := r.descriptor.Command()
	if err != nil {
		return nil, err
	}
	endpoint := &flight.FlightEndpoint{Ticket: &flight.Ticket{Ticket: ticket}}
	if r.descriptor.TakesLocation() {
		endpoint.Location = []*flight.Location{{Uri: runner.Endpoint()}}
	}
	return &flight.FlightInfo{
		Schema:           flight.SerializeSchema(r.schema, memory.DefaultAllocator),
		FlightDescriptor: fd,
		Endpoint:         []*flight.FlightEndpoint{endpoint},
		TotalRecords:     -1,
		TotalBytes:       -1,
	}, nil
}

// DoExchange relays a stream to the runner. Its first message holds a ticket's command, or a plain descriptor, for
// which the front takes the lease itself.
func (f *Front) DoExchange(stream flight.FlightService_DoExchangeServer) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return fault.New(fault.BadRequest, "the stream ended before its descriptor")
	}
	if err != nil {
		return err
	}
	r, err := f.resolve(stream.Context(), first.GetFlightDescriptor())
	if err != nil {
		return err
	}
	runner, err := f.runnerOf(stream.Context(), r)
	if err != nil {
		return err
	}
	command, err := r.descriptor.Command()
	if err != nil {
		return err
	}
	first.FlightDescriptor = &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: command}
	client, err := runner.Client()
	if err != nil {
		return err
	}
	return relay(stream, client, first)
}

// runnerOf returns the runner that the descriptor's lease belongs to; without a lease it admits the request.
func (f *Front) runnerOf(ctx context.Context, r *request) (*modelcache.Runner, error) {
	if r.descriptor.Lease == nil {
		return f.admit(ctx, r)
	}
	runner, ok := f.options.Cache.Loaded(r.model, r.descriptor.Device)
	if !ok {
		return nil, fault.New(fault.Unavailable, "model %s: the runner of this ticket has ended; ask for another "+
			"ticket", r.descriptor.Model)
	}
	return runner, nil
}

// Interface guards.
var _ flight.FlightServer = (*Front)(nil)
