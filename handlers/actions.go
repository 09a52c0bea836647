package handlers

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/gpu"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// MaxActionBytes bounds the body of an action.
const MaxActionBytes = 64 << 10

// actions are what DoAction knows, in the order in which ListActions lists them.
var actions = []struct {
	name, about string
	act         func(*Front, context.Context, []byte) (any, error)
}{
	{"server.ready", `{} -> {"ready":true} when this server takes requests`, (*Front).ready},
	{"status", `{} -> versions, features, and the models in memory with their streams`, (*Front).status},
	{"model.ready", `{"model","version"?} -> {"ready"}: whether the model is in memory; does not load it`, (*Front).modelReady},
	{"model.metadata", `{"model","version"?} -> {"model","version","signatures"}, read without loading`, (*Front).metadata},
	{"repository.index", `{} -> {"models":[{"name","version","state","reason"?}]}: all that this host knows`, (*Front).index},
	{"model.load", `{"model","version"?,"device"?} -> {"model","version","state":"ready"} once it is in memory`, (*Front).load},
	{"model.unload", `{"model","version"?} -> {"model","version","state":"unloaded"}; refused while streams are open`, (*Front).unload},
	{"model.tune", `{"model","version"?,"signature"?,"quick"?} -> {"candidate"} for each configuration measured, then {"tuning"}; may take minutes`, (*Front).tune},
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

// results is what an action returns that has several results: it sends one after the other.
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
	return fault.New(fault.Unimplemented, "no action %q; ListActions lists those there are", action.GetType())
}

// decodeBody reads one JSON object into ask, of at most MaxActionBytes. A body of nothing is {}.
func decodeBody(body []byte, ask any) error {
	if len(body) > MaxActionBytes {
		return fmt.Errorf("it has %d bytes, more than %d", len(body), MaxActionBytes)
	}
	if len(body) == 0 {
		return nil
	}
	return decodeStrictly(body, ask)
}

// nothing checks the body of an action that takes none.
func nothing(body []byte) error {
	if err := decodeBody(body, &struct{}{}); err != nil {
		return fault.New(fault.BadRequest, "this action wants an empty body, or {}: %w", err)
	}
	return nil
}

// modelBody is the body of an action on one model.
type modelBody struct {
	Model   string        `json:"model"`
	Version versionNumber `json:"version"`
}

// loadBody is the body of model.load.
type loadBody struct {
	modelBody
	Device string `json:"device"` // as in a descriptor
}

func decodeModel(body []byte) (modelBody, error) {
	var ask modelBody
	if err := decodeBody(body, &ask); err != nil {
		return ask, badBody(err)
	}
	if ask.Model == "" {
		return ask, badBody(errNoModel)
	}
	return ask, nil
}

var errNoModel = errors.New("model is missing")

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

// Ready is the answer of server.ready and model.ready.
type Ready struct {
	Ready bool `json:"ready"`
}

func (f *Front) ready(_ context.Context, body []byte) (any, error) {
	return Ready{Ready: true}, nothing(body)
}

func (f *Front) modelReady(ctx context.Context, body []byte) (any, error) {
	model, err := f.resolveBody(ctx, body)
	if err != nil {
		return nil, err
	}
	_, loaded := f.options.Cache.Loaded(model, "")
	return Ready{Ready: loaded}, nil
}

// ModelState is the answer of model.load and model.unload.
type ModelState struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	State   string `json:"state"`
}

// load goes on when its caller has left.
func (f *Front) load(ctx context.Context, body []byte) (any, error) {
	var ask loadBody
	if err := decodeBody(body, &ask); err != nil {
		return nil, badBody(err)
	}
	if ask.Model == "" {
		return nil, badBody(errNoModel)
	}
	if err := checkDevice(cmp.Or(ask.Device, DeviceAuto)); err != nil {
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
	return ModelState{Model: model.Ref, Version: model.Version, State: modelcache.StateReady}, nil
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
	return ModelState{Model: ask.Model, Version: version, State: modelcache.StateUnloaded}, nil
}

// TuneBody is the body of model.tune. Signature is serving_default where it is absent.
type TuneBody struct {
	Model     string        `json:"model"`
	Version   versionNumber `json:"version,omitempty"`
	Signature string        `json:"signature,omitempty"`
	Quick     bool          `json:"quick,omitempty"`
}

// TuneResult is one result of model.tune: a configuration that was measured, or, last, what came of all.
type TuneResult struct {
	Candidate *tuning.Candidate `json:"candidate,omitempty"`
	Tuning    *tuning.Tuning    `json:"tuning,omitempty"`
}

// tune ends when its caller leaves.
func (f *Front) tune(ctx context.Context, body []byte) (any, error) {
	var ask TuneBody
	if err := decodeBody(body, &ask); err != nil || ask.Model == "" {
		return nil, fault.New(fault.BadRequest, "this action wants a body like {\"model\":\"name\",\"quick\":true}: %w", cmp.Or(err, errNoModel))
	}
	model, err := f.options.Cache.Resolve(ctx, ask.Model, string(ask.Version))
	if err != nil {
		return nil, err
	}
	return results(func(send func(any) error) error {
		ctx, leave := context.WithCancelCause(ctx)
		defer leave(nil)
		tuning, err := f.options.Tuner.Tune(ctx, model, tuning.TuneOptions{Signature: ask.Signature, Quick: ask.Quick}, func(c tuning.Candidate) {
			if err := send(TuneResult{Candidate: &c}); err != nil {
				leave(err)
			}
		})
		if err != nil {
			return err
		}
		return send(TuneResult{Tuning: &tuning})
	}), nil
}

func (f *Front) shutdown(_ context.Context, body []byte) (any, error) {
	if err := nothing(body); err != nil {
		return nil, err
	}
	f.options.Shutdown()
	return struct {
		Draining bool `json:"draining"`
	}{true}, nil
}

// Index is the answer of repository.index.
type Index struct {
	Models []IndexEntry `json:"models"`
}

// IndexEntry is one version of a model. Reason says why it cannot be served as it is.
type IndexEntry struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	State   string `json:"state"`
	Reason  string `json:"reason,omitempty"`
}

func (f *Front) index(ctx context.Context, body []byte) (any, error) {
	if err := nothing(body); err != nil {
		return nil, err
	}
	entries, err := f.options.Cache.Index(ctx)
	if err != nil {
		return nil, err
	}
	answer := Index{Models: make([]IndexEntry, len(entries))}
	for i, entry := range entries {
		_, reasons := flightsOf(entry)
		answer.Models[i] = IndexEntry{Name: entry.Ref, Version: entry.Version, State: entry.State, Reason: strings.Join(reasons, "; ")}
	}
	return answer, nil
}

// Status is the answer of the action status.
type Status struct {
	Flightsvc string                   `json:"flightsvc"` // version
	Build     string                   `json:"build"`
	V         int                      `json:"v"` // of descriptors
	Features  []string                 `json:"features"`
	Server    string                   `json:"server"`
	Executor  string                   `json:"executor,omitempty"` // Spark's id of the executor that the front belongs to
	PID       int                      `json:"pid"`
	Models    []modelcache.ModelStatus `json:"models"`
	Memory    modelcache.Memory        `json:"memory"` // of the host
	Devices   []gpu.Device             `json:"devices"`
	Totals    modelcache.Totals        `json:"totals"`
}

func (f *Front) status(_ context.Context, body []byte) (any, error) {
	return Status{Flightsvc: f.options.Version, Build: f.options.Build, V: WireVersion, Features: Features, Server: f.options.Server, Executor: f.options.Executor, PID: os.Getpid(), Models: f.options.Cache.Status(), Memory: f.options.Cache.Memory(), Devices: f.options.Cache.Devices(), Totals: f.options.Cache.Totals()}, nothing(body)
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

func (f *Front) metadata(ctx context.Context, body []byte) (any, error) {
	model, err := f.resolveBody(ctx, body)
	if err != nil {
		return nil, err
	}
	answer := &Metadata{Model: model.Ref, Version: model.Version, Signatures: map[string]SignatureMetadata{}}
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
