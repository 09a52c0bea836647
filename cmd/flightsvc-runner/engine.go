package main

import (
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/apache/arrow/go/v15/arrow/memory"
	"golang.org/x/sync/errgroup"

	"flightsvc/handlers"
	"flightsvc/internal/batch"
	"flightsvc/internal/fault"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
	"flightsvc/modelcache"
)

// engine is a loaded SavedModel with the picture graphs that its streams have asked for.
type engine struct {
	saved   *savedmodel.Model
	session *tensorflow.Session
	cores   int

	mu     sync.Mutex // guards graphs
	graphs map[preprocess.Spec]*preprocess.Graph
}

// open loads the model of a setup.
func open(setup modelcache.Setup) (*engine, error) {
	saved, err := savedmodel.Read(setup.Dir)
	if err != nil {
		return nil, err
	}
	threads := tensorflow.Options{IntraOpThreads: setup.Cores, InterOpThreads: setup.Cores}
	session, err := tensorflow.Load(setup.Dir, []string{savedmodel.ServeTag}, threads)
	if err != nil {
		return nil, fault.New(kindOf(err), "model %s cannot be loaded from %s%s: %s", setup.Model, setup.Dir, damage(err), firstLine(err))
	}
	return &engine{saved: saved, session: session, cores: max(setup.Cores, 1), graphs: map[preprocess.Spec]*preprocess.Graph{}}, nil
}

// Model returns what the SavedModel says about itself.
func (e *engine) Model() *savedmodel.Model { return e.saved }

// Run makes tensors of the feeds, without a copy where their memory is aligned, and runs the
// session. It takes over the feeds. What TensorFlow finds wrong with the rows is a BadRequest.
func (e *engine) Run(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error) {
	fed := make([]tensorflow.Feed, 0, len(feeds))
	defer func() {
		for _, feed := range fed {
			feed.Tensor.Close()
		}
	}()
	var failed error
	for i := range feeds {
		value := &feeds[i].Value
		if failed != nil {
			value.Release()
			continue
		}
		t, err := newTensor(value)
		if err != nil {
			failed = err
			continue
		}
		fed = append(fed, tensorflow.Feed{Name: feeds[i].Tensor, Tensor: t})
	}
	if failed != nil {
		return nil, fault.New(kindOf(failed), "make input tensors: %w", failed)
	}
	results, err := e.session.Run(timeout, fed, fetches)
	if err != nil {
		if kindOf(err) == fault.Deadline {
			return nil, fault.New(fault.Deadline, "TensorFlow did not finish a batch within run_timeout_ms (%d)", timeout.Milliseconds())
		}
		return nil, fault.New(kindOf(err), "%s%s", handlers.TensorFlowSays, firstLine(err))
	}
	return outputs(results), nil
}

// newTensor takes over the value.
func newTensor(value *tensor.Value) (*tensorflow.Tensor, error) {
	if value.DType == savedmodel.String {
		defer value.Release()
		return tensorflow.NewStrings(value.Shape, len(value.Strings), func(i int) []byte { return value.Strings[i] })
	}
	return tensorflow.NewTensor(value.DType, value.Shape, value.Data, value.Release)
}

// outputs are tensors that TensorFlow made.
type outputs []*tensorflow.Tensor

// Values views the tensors.
func (o outputs) Values() []tensor.Value {
	values := make([]tensor.Value, len(o))
	for i, t := range o {
		values[i] = tensor.Value{DType: t.DType(), Shape: t.Shape(), Data: t.Bytes()}
		if t.DType() == savedmodel.String {
			values[i].Strings = make([][]byte, t.Len())
			for j := range values[i].Strings {
				values[i].Strings[j] = t.String(j)
			}
		}
	}
	return values
}

// Close frees the tensors.
func (o outputs) Close() {
	for _, t := range o {
		t.Close()
	}
}

// Pictures builds the graphs of the specs, or finds them built, and returns what decodes with
// them: rows in parallel, as many at once as there are cores.
func (e *engine) Pictures(specs map[string]handlers.Preprocess) (tensor.Pictures, error) {
	graphs := make(map[string]*preprocess.Graph, len(specs))
	for input, spec := range specs {
		graph, err := e.graph(preprocess.Spec{Height: spec.Size[0], Width: spec.Size[1], Scale: spec.Scales(), Offset: spec.Offsets()})
		if err != nil {
			return nil, fault.New(kindOf(err), "preprocess of input %q: %w", input, err)
		}
		graphs[input] = graph
	}
	return func(input string, encoded [][]byte, mem memory.Allocator) (tensor.Value, map[int]string, error) {
		graph := graphs[input]
		height, width := specs[input].Size[0], specs[input].Size[1]
		size := height * width * 3 * savedmodel.Float32.Size()
		if len(encoded)*size > tensor.MaxTensorBytes {
			return tensor.Value{}, nil, fault.New(fault.Exhausted, "input %q: %d pictures of %dx%d are more than %d MiB; send fewer rows in a record batch", input, len(encoded), width, height, tensor.MaxTensorBytes>>20)
		}
		value := tensor.Allocate(savedmodel.Float32, []int64{int64(len(encoded)), int64(height), int64(width), 3}, mem)
		var mu sync.Mutex // guards refused
		refused := map[int]string{}
		var group errgroup.Group
		group.SetLimit(e.cores)
		for i, picture := range encoded {
			group.Go(func() error {
				err := graph.Run(picture, value.Data[i*size:(i+1)*size])
				if err != nil && kindOf(err) == fault.BadRequest {
					mu.Lock()
					defer mu.Unlock()
					refused[i] = firstLine(err)
					return nil
				}
				return err
			})
		}
		if err := group.Wait(); err != nil {
			value.Release()
			return tensor.Value{}, nil, fault.New(kindOf(err), "decode pictures for input %q: %w", input, err)
		}
		return value, refused, nil
	}, nil
}

// maxGraphs is how many picture graphs a runner keeps. Each has a session with a thread of its own.
const maxGraphs = 64

func (e *engine) graph(spec preprocess.Spec) (*preprocess.Graph, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if graph, ok := e.graphs[spec]; ok {
		return graph, nil
	}
	if len(e.graphs) == maxGraphs {
		return nil, fault.New(fault.Exhausted, "this runner has prepared %d kinds of pictures already, the most that it keeps; use one of them, or unload the model", maxGraphs)
	}
	graph, err := preprocess.New(spec)
	if err == nil {
		e.graphs[spec] = graph
	}
	return graph, err
}

// damage says in plain words what TensorFlow's code means when files are shorter than they should be,
// or missing.
func damage(err error) string {
	var native *tensorflow.Error
	if errors.As(err, &native) {
		switch native.Code {
		case tensorflow.OutOfRange, tensorflow.DataLoss, tensorflow.NotFound:
			return ", its files are damaged or incomplete; export the model again"
		}
	}
	return ""
}

// kindOf keeps the meaning of TensorFlow's codes that a caller can act on; all others are
// Internal.
func kindOf(err error) fault.Kind {
	var native *tensorflow.Error
	if !errors.As(err, &native) {
		kind, _ := fault.KindOf(err)
		return kind
	}
	switch native.Code {
	case tensorflow.InvalidArgument:
		return fault.BadRequest
	case tensorflow.ResourceExhausted:
		return fault.Exhausted
	case tensorflow.DeadlineExceeded:
		return fault.Deadline
	default:
		return fault.Internal
	}
}

// firstLine returns what TensorFlow said, without the graph's stack below it.
func firstLine(err error) string {
	var native *tensorflow.Error
	text := err.Error()
	if errors.As(err, &native) {
		text = native.Message
	}
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// Interface guards.
var (
	_ handlers.Engine = (*engine)(nil)
	_ batch.Outputs   = (outputs)(nil)
)
