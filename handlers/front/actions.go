// Actions: what DoAction does, and its JSON.

package front

import (
	"cmp"
	"context"
	"encoding/json"
	"os"
	"strings"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
)

// actions are what DoAction knows, in the order in which ListActions lists them.
var actions = []struct {
	name, about string
	act         func(*Front, context.Context, []byte) (any, error)
}{
	{"server.ready", `{} -> {"ready":true} when this server takes requests`, (*Front).ready},
	{"status", `{} -> versions, and the models in memory with their streams`, (*Front).status},
	{"model.ready", `{"model","version"?} -> {"ready"}: whether the model is in memory; does not load it`,
		(*Front).modelReady},
	{"model.metadata", `{"model","version"?} -> {"model","version","signatures"}, read without loading`,
		(*Front).metadata},
	{"repository.index", `{} -> {"models":[{"name","version","state","reason"?}]}: all that this host knows`,
		(*Front).index},
	{"model.load", `{"model","version"?,"device"?} -> {"model","version","state":"ready"} once it is in memory`,
		(*Front).load},
	{"model.unload", `{"model","version"?} -> {"model","version","state":"unloaded"}; refused while streams are open`,
		(*Front).unload},
	{"model.tune",
		`{"model","version"?,"signature"?} -> {"candidate"} for each configuration measured, then {"tuning"}; ` +
			`may take minutes`, (*Front).tune},
	{"server.shutdown", `{} -> {"draining":true}; ends this server after its streams have ended`, (*Front).shutdown},
}

// ListActions lists what DoAction knows.
func (f *Front) ListActions(_ *flight.Empty, stream flight.FlightService_ListActionsServer) error {
	for _, action := range actions {
		if err := stream.Send(&flight.ActionType{Type: action.name, Description: action.about}); err != nil {
			return err
		}
	}
	return nil
}

// results is what an action with several results returns: a function that sends one after the other.
type results func(send func(any) error) error

// DoAction runs one action; body and results are JSON.
func (f *Front) DoAction(action *flight.Action, stream flight.FlightService_DoActionServer) error {
	for _, known := range actions {
		if known.name != action.GetType() {
			continue
		}
		answer, err := known.act(f, stream.Context(), action.GetBody())
		if err != nil {
			return err
		}
		send := func(answer any) error {
			body, err := json.Marshal(answer)
			if err != nil {
				return err
			}
			return stream.Send(&flight.Result{Body: body})
		}
		if several, ok := answer.(results); ok {
			return several(send)
		}
		return send(answer)
	}
	return fault.New(fault.Unimplemented, "no action %q; ListActions lists all", action.GetType())
}

// nothing refuses a body for an action that takes none.
func nothing(body []byte) error {
	if err := protocol.DecodeBody(body, &struct{}{}); err != nil {
		return fault.New(fault.BadRequest, "this action wants an empty body, or {}: %w", err)
	}
	return nil
}

func decodeModel(body []byte) (protocol.ModelBody, error) {
	var ask protocol.ModelBody
	if err := protocol.DecodeBody(body, &ask); err != nil {
		return ask, badBody(err)
	}
	if ask.Model == "" {
		return ask, badBody(protocol.ErrNoModel)
	}
	return ask, nil
}

func badBody(err error) error {
	return fault.New(fault.BadRequest, "this action wants a body like {\"model\":\"name\"}: %w", err)
}

// resolveBody finds the model that a body names.
func (f *Front) resolveBody(ctx context.Context, body []byte) (repository.Model, error) {
	ask, err := decodeModel(body)
	if err != nil {
		return repository.Model{}, err
	}
	return f.options.Cache.Resolve(ctx, ask.Model, string(ask.Version))
}

func (f *Front) ready(_ context.Context, body []byte) (any, error) {
	return protocol.Ready{Ready: true}, nothing(body)
}

func (f *Front) modelReady(ctx context.Context, body []byte) (any, error) {
	model, err := f.resolveBody(ctx, body)
	if err != nil {
		return nil, err
	}
	_, loaded := f.options.Cache.Loaded(model, "")
	return protocol.Ready{Ready: loaded}, nil
}

// load loads a model, even one in quarantine. The load goes on when the caller leaves.
func (f *Front) load(ctx context.Context, body []byte) (any, error) {
	var ask protocol.LoadBody
	if err := protocol.DecodeBody(body, &ask); err != nil {
		return nil, badBody(err)
	}
	if ask.Model == "" {
		return nil, badBody(protocol.ErrNoModel)
	}
	if err := protocol.CheckDevice(cmp.Or(ask.Device, protocol.DeviceAuto)); err != nil {
		return nil, badBody(err)
	}
	model, err := f.options.Cache.Resolve(ctx, ask.Model, string(ask.Version))
	if err != nil {
		return nil, err
	}
	f.options.Cache.Pardon(model)
	if _, err := f.options.Cache.Ready(ctx, model, ask.Device); err != nil {
		return nil, err
	}
	return protocol.ModelState{Model: model.Ref, Version: model.Version, State: modelcache.StateReady}, nil
}

func (f *Front) unload(ctx context.Context, body []byte) (any, error) {
	ask, err := decodeModel(body)
	if err != nil {
		return nil, err
	}
	version, err := f.options.Cache.Unload(ctx, ask.Model, string(ask.Version))
	if err != nil {
		return nil, err
	}
	return protocol.ModelState{Model: ask.Model, Version: version, State: modelcache.StateUnloaded}, nil
}

// tune tunes a model. The search ends when the caller leaves.
func (f *Front) tune(ctx context.Context, body []byte) (any, error) {
	var ask protocol.TuneBody
	if err := protocol.DecodeBody(body, &ask); err != nil || ask.Model == "" {
		return nil, fault.New(fault.BadRequest, "this action wants a body like "+
			"{\"model\":\"name\",\"signature\":\"serving_default\"}: %w", cmp.Or(err, protocol.ErrNoModel))
	}
	model, err := f.options.Cache.Resolve(ctx, ask.Model, string(ask.Version))
	if err != nil {
		return nil, err
	}
	return results(func(send func(any) error) error {
		ctx, leave := context.WithCancelCause(ctx)
		defer leave(nil)
		tuning, err := f.options.Tuner.Tune(ctx, model, ask.Signature, func(c protocol.Candidate) {
			if err := send(protocol.TuneResult{Candidate: &c}); err != nil {
				leave(err)
			}
		})
		if err != nil {
			return err
		}
		return send(protocol.TuneResult{Tuning: &tuning})
	}), nil
}

func (f *Front) shutdown(_ context.Context, body []byte) (any, error) {
	if err := nothing(body); err != nil {
		return nil, err
	}
	f.options.Shutdown()
	return protocol.Draining{Draining: true}, nil
}

func (f *Front) index(ctx context.Context, body []byte) (any, error) {
	if err := nothing(body); err != nil {
		return nil, err
	}
	entries, err := f.options.Cache.Index(ctx)
	if err != nil {
		return nil, err
	}
	answer := protocol.Index{Models: make([]protocol.IndexEntry, len(entries))}
	for i, entry := range entries {
		_, reasons := flightsOf(entry)
		answer.Models[i] = protocol.IndexEntry{Name: entry.Ref, Version: entry.Version, State: entry.State,
			Reason: strings.Join(reasons, "; ")}
	}
	return answer, nil
}

func (f *Front) status(_ context.Context, body []byte) (any, error) {
	devices := []protocol.Device{}
	for _, device := range f.options.Cache.Devices() {
		devices = append(devices, protocol.Device(device))
	}
	return protocol.Status{
		Flightsvc: f.options.Version, Build: f.options.Build, V: protocol.Version, Server: f.options.Server,
		Executor: f.options.Executor, PID: os.Getpid(),
		Models: f.options.Cache.Status(), Memory: f.options.Cache.Memory(), Devices: devices,
		Totals: f.options.Cache.Totals(),
	}, nothing(body)
}

func (f *Front) metadata(ctx context.Context, body []byte) (any, error) {
	model, err := f.resolveBody(ctx, body)
	if err != nil {
		return nil, err
	}
	answer := &protocol.Metadata{Model: model.Ref, Version: model.Version,
		Signatures: map[string]protocol.SignatureMetadata{}}
	for name, signature := range model.Saved.Signatures {
		answer.Signatures[name] = protocol.SignatureMetadata{Inputs: protocol.Tensors(signature.Inputs),
			Outputs: protocol.Tensors(signature.Outputs)}
	}
	return answer, nil
}
