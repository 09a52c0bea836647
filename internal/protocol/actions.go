// The bodies and results of actions, of DoPut and of ListFlights.

package protocol

import (
	"errors"
	"fmt"

	"flightsvc/internal/savedmodel"
)

// MaxActionBytes bounds the body of an action.
const MaxActionBytes = 64 << 10

// DecodeBody reads one JSON object of at most MaxActionBytes into body, a pointer to a struct. An empty body counts as
// {}.
func DecodeBody(data []byte, body any) error {
	if len(data) > MaxActionBytes {
		return fmt.Errorf("it has %d bytes, more than %d", len(data), MaxActionBytes)
	}
	if len(data) == 0 {
		return nil
	}
	return Decode(data, body)
}

// ErrNoModel means that a body names no model.
var ErrNoModel = errors.New("model is missing")

// ModelBody is the body of an action on one model. An empty version is the latest.
type ModelBody struct {
	Model   string        `json:"model"`
	Version VersionNumber `json:"version,omitempty"`
}

// LoadBody is the body of model.load.
type LoadBody struct {
	ModelBody
	Device string `json:"device,omitempty"` // as in a descriptor
}

// TuneBody is the body of model.tune. Signature is serving_default where it is absent.
type TuneBody struct {
	ModelBody
	Signature string `json:"signature,omitempty"`
}

// Ready is the answer of server.ready and model.ready.
type Ready struct {
	Ready bool `json:"ready"`
}

// Draining is the answer of server.shutdown.
type Draining struct {
	Draining bool `json:"draining"`
}

// ModelState is the answer of model.load and model.unload.
type ModelState struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	State   string `json:"state"`
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

// TensorMetadata is one input or output. Shape has -1 for unknown dimensions and is null for an unknown rank.
type TensorMetadata struct {
	Name  string  `json:"name"`
	DType string  `json:"dtype"`
	Shape []int64 `json:"shape"`
}

// Tensors returns the metadata of inputs or outputs.
func Tensors(specs []savedmodel.Spec) []TensorMetadata {
	list := make([]TensorMetadata, len(specs))
	for i, spec := range specs {
		list[i] = TensorMetadata{Name: spec.Name, DType: spec.DType.String(), Shape: spec.Shape}
	}
	return list
}

// PutCommand is the command of DoPut.
type PutCommand struct {
	V      int    `json:"v"`
	Put    string `json:"put"`              // "model"
	Digest string `json:"digest,omitempty"` // that the sent model must have; "" for any
}

// PutResult is the app_metadata of DoPut's one answer.
type PutResult struct {
	Digest string `json:"digest"`
	Known  bool   `json:"known"` // the host had the model already
}

// Criteria select the models that ListFlights lists.
type Criteria struct {
	Model string `json:"model"` // "" for all
}
