// Package savedmodel reads the signatures of a SavedModel, with dtypes and shapes, from saved_model.pb, without
// TensorFlow. Front and runner use it: the front to answer metadata and schemas, the runner to check requests before a
// run.
//
// The needed fields are decoded by hand, because the generated types would hold the whole graph in memory.
//
// What may enter: types and facts of the SavedModel format. Running a graph lives in internal/tensorflow.
package savedmodel

import (
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	corepb "github.com/galeone/tensorflow/tensorflow/go/core/protobuf/for_core_protos_go_proto"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
)

// File is the name of the graph's file in a SavedModel's folder.
const File = "saved_model.pb"

// ServeTag marks the meta graph that is for inference.
const ServeTag = "serve"

// DefaultSignature is the signature used when a request names none.
const DefaultSignature = "serving_default"

// initSignature is an entry that TensorFlow 2 writes for its loader; it cannot be called.
const initSignature = "__saved_model_init_op"

// Field numbers of SavedModel, MetaGraphDef and MetaInfoDef, from TensorFlow's
// saved_model.proto and meta_graph.proto.
const (
	fieldMetaGraphs   = 2
	fieldMetaInfo     = 1
	fieldVersion      = 1 // of MetaInfoDef: meta_graph_version
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
	// UnknownRank means that not even the number of dimensions is known.
	UnknownRank bool
}

// Signature is a computation that can be called by name. Both lists are sorted by Name.
type Signature struct {
	Inputs, Outputs []Spec
	// Assigns names an operation that writes to a variable and that the signature depends on, or is "". The answers of
	// such a signature change from call to call.
	Assigns string
}

// Model is what is read from a SavedModel.
type Model struct {
	Signatures map[string]Signature
	Folded     bool // flightsvc freeze has made it, and there is no faster form of its graph
}

// folded is the meta_graph_version of a graph that flightsvc freeze has folded (FOLDED in export/freeze.py).
const folded = "folded by flightsvc"

// maxGraph is the most bytes of saved_model.pb: the limit of protocol buffers.
const maxGraph = 2 << 30

// maxSignature is the most bytes of a signature in the file; decoded, it is assumed to take timesOfSignature as many.
const (
	maxSignature     = 16 << 20
	timesOfSignature = 8
)

// Read reads saved_model.pb in dir until ctx ends. It skips constants, so frozen weights cost neither time nor memory.
// It calls reserve before it uses more than about 1 MiB of memory, and ends with reserve's error; nil reserves nothing.
// Other errors are ctx's, and faults: NotFound if dir is no SavedModel, Precondition if the file cannot be read,
// BadRequest if it is damaged or has no signature for serving.
func Read(ctx context.Context, dir string, reserve func(bytes int64) error) (*Model, error) {
	path := filepath.Join(dir, File)
	file, err := regular.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "%s is not a SavedModel: it has no %s", dir, File)
	}
	if err != nil {
		return nil, fault.New(fault.Precondition, "read SavedModel: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, fault.New(fault.Precondition, "read SavedModel: %w", err)
	}
	if info.Size() > maxGraph {
		return nil, fault.New(fault.BadRequest, "%s has %d bytes; the maximum is %d",
			path, info.Size(), int64(maxGraph))
	}
	in := struct {
		io.Reader
		io.Seeker
	}{regular.Until(ctx, file), file}
	model, err := parse(newMessage(in, info.Size()), reserve)
	switch kind, ok := fault.KindOf(err); {
	case err == nil:
		return model, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case ok && kind != fault.BadRequest: // reserve's error
		return nil, err
	}
	return nil, fault.New(fault.BadRequest, "%s: %w", path, err)
}

func parse(m *message, reserve func(bytes int64) error) (*Model, error) {
	var found *Model
	err := m.fields(func(num protowire.Number, field *message) error {
		if num != fieldMetaGraphs || found != nil {
			return nil
		}
		model, tags, err := parseMetaGraph(field, reserve)
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

func parseMetaGraph(m *message, reserve func(bytes int64) error) (*Model, []string, error) {
	model := &Model{Signatures: map[string]Signature{}}
	var tags []string
	operations := newGraph(reserve)
	err := m.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldMetaInfo:
			return field.fields(func(num protowire.Number, field *message) error {
				switch num {
				case fieldVersion:
					if field.left != int64(len(folded)) {
						return nil
					}
					version, err := field.text()
					model.Folded = string(version) == folded
					return err
				case fieldTags:
					tag, err := field.text()
					tags = append(tags, string(tag))
					return errors.Join(err, operations.meter.take(vertexBytes+int64(len(tag))))
				}
				return nil
			})
		case fieldGraph:
			return operations.read(field)
		case fieldSignatureMap:
			if err := operations.meter.take(timesOfSignature * field.left); err != nil {
				return err
			}
			return model.addSignature(field)
		}
		return nil
	})
	for name, signature := range model.Signatures {
		signature.Assigns = operations.assigned(signature)
		model.Signatures[name] = signature
	}
	return model, tags, err
}

// addSignature reads one entry of map<string, SignatureDef>.
func (m *Model) addSignature(entry *message) error {
	var name string
	var def corepb.SignatureDef
	err := entry.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldMapKey:
			text, err := field.text()
			name = string(text)
			return err
		case fieldMapValue:
			data, err := field.bytes(maxSignature)
			if err != nil {
				return err
			}
			return proto.Unmarshal(data, &def)
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
		spec := Spec{Name: name, Tensor: info.GetName(), DType: DType(info.GetDtype())}
		spec.UnknownRank = shape == nil || shape.GetUnknownRank()
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

// Signature returns the signature called name, or a NotFound fault that lists all names.
func (m *Model) Signature(name string) (Signature, error) {
	if sig, ok := m.Signatures[name]; ok {
		return sig, nil
	}
	return Signature{}, fault.New(fault.NotFound, "no signature %q; this model has %s",
		name, strings.Join(m.Names(), ", "))
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
