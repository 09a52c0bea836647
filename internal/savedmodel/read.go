// Package savedmodel reads what a SavedModel says about itself (signatures, dtypes,
// shapes) from saved_model.pb, without TensorFlow. Both processes use it: the front
// to answer metadata and schemas, the runner to check requests before a run.
//
// What may enter: types and facts of the SavedModel format. Running a graph lives in
// internal/tensorflow.
package savedmodel

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corepb "github.com/galeone/tensorflow/tensorflow/go/core/protobuf/for_core_protos_go_proto"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/fault"
)

// File is the name of the graph's file in a SavedModel's folder.
const File = "saved_model.pb"

// ServeTag marks the meta graph that is for inference.
const ServeTag = "serve"

// DefaultSignature is the signature used when a request names none.
const DefaultSignature = "serving_default"

// initSignature is an entry that TensorFlow 2 writes for its loader; it is not a
// signature that can be called.
const initSignature = "__saved_model_init_op"

// Field numbers of SavedModel, MetaGraphDef and MetaInfoDef, from TensorFlow's
// saved_model.proto and meta_graph.proto.
const (
	fieldMetaGraphs   = 2
	fieldMetaInfo     = 1
	fieldGraph        = 2
	fieldSignatureMap = 5
	fieldTags         = 4
	fieldMapKey       = 1
	fieldMapValue     = 2
)

// Spec is one input or output of a signature.
type Spec struct {
	Name   string  // key in the signature, for instance "image"
	Tensor string  // tensor in the graph, for instance "serving_default_image:0"
	DType  DType   // element type
	Shape  []int64 // dimensions, -1 where unknown; nil where the rank is unknown
	// UnknownRank says that not even the number of dimensions is known.
	UnknownRank bool
}

// Signature is a computation that can be called by name. Both lists are sorted by Name.
type Signature struct {
	Inputs, Outputs []Spec
	// Assigns names an operation that the signature reaches and that writes to a variable, or is "".
	// Such a signature answers differently when it is asked again.
	Assigns string
}

// Model is what a SavedModel says about itself.
type Model struct {
	Signatures map[string]Signature
}

// Read parses saved_model.pb in dir. It decodes the signatures and walks the graph's operations
// without its constants, so its cost does not grow with frozen weights beyond reading the file.
// Errors are faults: NotFound where dir is no SavedModel, BadRequest where the file
// is broken or has no signature for serving.
func Read(dir string) (*Model, error) {
	data, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		if os.IsNotExist(err) {
			return nil, fault.New(fault.NotFound, "%s is not a SavedModel: it has no %s", dir, File)
		}
		return nil, fault.New(fault.Precondition, "read SavedModel: %w", err)
	}
	model, err := parse(data)
	if err != nil {
		return nil, fault.New(fault.BadRequest, "%s: %w", filepath.Join(dir, File), err)
	}
	return model, nil
}

func parse(data []byte) (*Model, error) {
	var found *Model
	err := fields(data, func(num protowire.Number, value []byte) error {
		if num != fieldMetaGraphs || found != nil {
			return nil
		}
		model, tags, err := parseMetaGraph(value)
		if err == nil && slices.Contains(tags, ServeTag) {
			found = model
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if found == nil {
		return nil, fault.New(fault.BadRequest, "no meta graph has the tag %q; export the model for serving", ServeTag)
	}
	if len(found.Signatures) == 0 {
		return nil, fault.New(fault.BadRequest, "no signature; export the model with signatures")
	}
	return found, nil
}

func parseMetaGraph(data []byte) (*Model, []string, error) {
	model := &Model{Signatures: map[string]Signature{}}
	var tags []string
	operations := &graph{}
	err := fields(data, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldMetaInfo:
			return fields(value, func(num protowire.Number, value []byte) error {
				if num == fieldTags {
					tags = append(tags, string(value))
				}
				return nil
			})
		case fieldGraph:
			var err error
			operations, err = parseGraph(value)
			return err
		case fieldSignatureMap:
			return model.addSignature(value)
		}
		return nil
	})
	for name, signature := range model.Signatures {
		signature.Assigns = operations.assigned(signature)
		model.Signatures[name] = signature
	}
	return model, tags, err
}

// addSignature takes one entry of map<string, SignatureDef>.
func (m *Model) addSignature(entry []byte) error {
	var name string
	var def corepb.SignatureDef
	err := fields(entry, func(num protowire.Number, value []byte) error {
		switch num {
		case fieldMapKey:
			name = string(value)
		case fieldMapValue:
			return proto.Unmarshal(value, &def)
		}
		return nil
	})
	if err != nil || name == initSignature {
		return err
	}
	m.Signatures[name] = Signature{Inputs: specs(def.GetInputs()), Outputs: specs(def.GetOutputs())}
	return nil
}

func specs(infos map[string]*corepb.TensorInfo) []Spec {
	list := make([]Spec, 0, len(infos))
	for name, info := range infos {
		shape := info.GetTensorShape()
		spec := Spec{Name: name, Tensor: info.GetName(), DType: DType(info.GetDtype()), UnknownRank: shape == nil || shape.GetUnknownRank()}
		if !spec.UnknownRank {
			spec.Shape = make([]int64, len(shape.GetDim()))
			for i, dim := range shape.GetDim() {
				spec.Shape[i] = max(dim.GetSize(), -1)
			}
		}
		list = append(list, spec)
	}
	slices.SortFunc(list, func(a, b Spec) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// fields calls visit for each length-delimited field of a message and skips the rest.
func fields(data []byte, visit func(protowire.Number, []byte) error) error {
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		data = data[n:]
		if typ != protowire.BytesType {
			n = protowire.ConsumeFieldValue(num, typ, data)
			if n < 0 {
				return protowire.ParseError(n)
			}
			data = data[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := visit(num, value); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// Signature returns the signature called name, or a NotFound fault that lists the
// names there are.
func (m *Model) Signature(name string) (Signature, error) {
	if sig, ok := m.Signatures[name]; ok {
		return sig, nil
	}
	return Signature{}, fault.New(fault.NotFound, "no signature %q; this model has %s", name, strings.Join(m.Names(), ", "))
}

// Names returns the signatures' names, sorted.
func (m *Model) Names() []string {
	names := make([]string, 0, len(m.Signatures))
	for name := range m.Signatures {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
