package handlers

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache"
)

// FrontOptions are what the front's service needs.
type FrontOptions struct {
	Cache    *modelcache.Cache
	Version  string
	Build    string
	Server   string // "host:pid"
	Shutdown func() // asked for by the action server.shutdown
	Log      *zap.Logger
}

// Front is the Flight service that callers find first: it answers what can be said without
// a model in memory, makes models ready, and sends callers on to runners or relays for them.
type Front struct {
	flight.BaseFlightServer
	options FrontOptions
}

// NewFront returns the service.
func NewFront(options FrontOptions) *Front { return &Front{options: options} }

// request is a descriptor with all that the repository knows about it.
type request struct {
	descriptor *Descriptor
	model      modelcache.Model
	schema     *arrow.Schema
}

// resolve reads a descriptor and plans it, without loading anything.
func (f *Front) resolve(fd *flight.FlightDescriptor) (*request, error) {
	d, err := ParseDescriptor(fd)
	if err != nil {
		return nil, err
	}
	model, err := f.options.Cache.Resolve(d.Model, d.Version)
	if err != nil {
		return nil, err
	}
	plan, err := d.Plan(model.Saved)
	if err != nil {
		return nil, err
	}
	d.Version = model.Version
	return &request{descriptor: d, model: model, schema: plan.Schema()}, nil
}

// admit makes the request's model ready and leases a stream on its runner.
func (f *Front) admit(ctx context.Context, r *request) (*modelcache.Runner, error) {
	started := time.Now()
	runner, err := f.options.Cache.Ready(ctx, r.model)
	if err != nil {
		return nil, err
	}
	lease := Grant(runner.Key(), time.Now())
	runner.Leased(lease.ID, time.UnixMilli(lease.Expires))
	r.descriptor.Lease = &lease
	f.options.Log.Info("stream admitted", zap.String("request_id", r.descriptor.RequestID), zap.String("model", r.descriptor.Model),
		zap.Int("runner", runner.PID()), zap.Duration("wait_time", time.Since(started)))
	return runner, nil
}

// GetSchema answers the schema of the answer without loading the model.
func (f *Front) GetSchema(_ context.Context, fd *flight.FlightDescriptor) (*flight.SchemaResult, error) {
	r, err := f.resolve(fd)
	if err != nil {
		return nil, err
	}
	return &flight.SchemaResult{Schema: flight.SerializeSchema(r.schema, memory.DefaultAllocator)}, nil
}

// GetFlightInfo makes the model ready and returns the answer's schema and one endpoint: a
// ticket, and the runner's location unless the caller wants to be relayed.
func (f *Front) GetFlightInfo(ctx context.Context, fd *flight.FlightDescriptor) (*flight.FlightInfo, error) {
	r, err := f.resolve(fd)
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
	if r.descriptor.redirect() {
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

// DoExchange relays a stream to the runner. Its first message holds a ticket's command, or a
// plain descriptor, for which the front takes the lease itself.
func (f *Front) DoExchange(stream flight.FlightService_DoExchangeServer) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return fault.New(fault.BadRequest, "the stream ended before its descriptor")
	}
	if err != nil {
		return err
	}
	r, err := f.resolve(first.GetFlightDescriptor())
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

// runnerOf returns the runner which the descriptor's lease belongs to, or admits the request.
func (f *Front) runnerOf(ctx context.Context, r *request) (*modelcache.Runner, error) {
	if r.descriptor.Lease == nil {
		return f.admit(ctx, r)
	}
	runner, ok := f.options.Cache.Loaded(r.model)
	if !ok {
		return nil, fault.New(fault.Unavailable, "model %s: the runner of this ticket has ended; ask for another ticket", r.descriptor.Model)
	}
	return runner, nil
}

// The actions that DoAction knows.
const (
	actionReady    = "server.ready"
	actionShutdown = "server.shutdown"
	actionStatus   = "status"
	actionMetadata = "model.metadata"
)

// ListActions lists what DoAction knows.
func (f *Front) ListActions(_ *flight.Empty, stream flight.FlightService_ListActionsServer) error {
	for _, action := range []*flight.ActionType{
		{Type: actionReady, Description: "answers {\"ready\":true} when this server takes requests"},
		{Type: actionStatus, Description: "versions, features, and the models in memory with their streams"},
		{Type: actionMetadata, Description: "signatures of {\"model\":...}, read without loading it"},
		{Type: actionShutdown, Description: "ends this server after its streams have ended"},
	} {
		if err := stream.Send(action); err != nil {
			return err
		}
	}
	return nil
}

// DoAction runs one action; body and result are JSON.
func (f *Front) DoAction(action *flight.Action, stream flight.FlightService_DoActionServer) error {
	answer, err := f.act(action)
	if err != nil {
		return err
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	return stream.Send(&flight.Result{Body: body})
}

func (f *Front) act(action *flight.Action) (any, error) {
	switch action.GetType() {
	case actionReady:
		return map[string]bool{"ready": true}, nil
	case actionStatus:
		return f.status(), nil
	case actionMetadata:
		return f.metadata(action.GetBody())
	case actionShutdown:
		f.options.Shutdown()
		return map[string]bool{"draining": true}, nil
	}
	return nil, fault.New(fault.Unimplemented, "no action %q; ListActions lists those there are", action.GetType())
}

// Status is the answer of the action status.
type Status struct {
	Flightsvc string                   `json:"flightsvc"` // version
	Build     string                   `json:"build"`
	V         int                      `json:"v"` // of descriptors
	Features  []string                 `json:"features"`
	Server    string                   `json:"server"`
	PID       int                      `json:"pid"`
	Models    []modelcache.ModelStatus `json:"models"`
}

func (f *Front) status() Status {
	return Status{Flightsvc: f.options.Version, Build: f.options.Build, V: WireVersion, Features: Features, Server: f.options.Server, PID: os.Getpid(), Models: f.options.Cache.Status()}
}

// Metadata is the answer of the action model.metadata.
type Metadata struct {
	Model      string                       `json:"model"`
	Version    string                       `json:"version"`
	Signatures map[string]SignatureMetadata `json:"signatures"`
}

// SignatureMetadata lists a signature's inputs and outputs, sorted by name.
type SignatureMetadata struct {
	Inputs  []TensorMetadata `json:"inputs"`
	Outputs []TensorMetadata `json:"outputs"`
}

// TensorMetadata is one input or output. Shape has -1 for unknown dimensions and is null for an
// unknown rank.
type TensorMetadata struct {
	Name  string  `json:"name"`
	DType string  `json:"dtype"`
	Shape []int64 `json:"shape"`
}

func (f *Front) metadata(body []byte) (*Metadata, error) {
	var ask struct{ Model, Version string }
	if err := json.Unmarshal(body, &ask); err != nil || ask.Model == "" {
		return nil, fault.New(fault.BadRequest, "%s wants a body like {\"model\":\"name\"}", actionMetadata)
	}
	model, err := f.options.Cache.Resolve(ask.Model, ask.Version)
	if err != nil {
		return nil, err
	}
	answer := &Metadata{Model: ask.Model, Version: model.Version, Signatures: map[string]SignatureMetadata{}}
	for name, signature := range model.Saved.Signatures {
		answer.Signatures[name] = SignatureMetadata{Inputs: tensorMetadata(signature.Inputs), Outputs: tensorMetadata(signature.Outputs)}
	}
	return answer, nil
}

func tensorMetadata(specs []savedmodel.Spec) []TensorMetadata {
	list := make([]TensorMetadata, len(specs))
	for i, spec := range specs {
		list[i] = TensorMetadata{Name: spec.Name, DType: spec.DType.String(), Shape: spec.Shape}
	}
	return list
}

// Interface guards.
var _ flight.FlightServer = (*Front)(nil)
