package main

import (
	"errors"
	"strings"
	"time"

	"flightsvc/handlers"
	"flightsvc/internal/batch"
	"flightsvc/internal/fault"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
	"flightsvc/modelcache"
)

// engine is the model of a runner: what handlers ask of it, and what runs a batch.
type engine interface {
	handlers.Engine
	Run(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error)
}

// open loads the model of a setup.
func open(setup modelcache.Setup) (engine, error) {
	if setup.Dir == "" {
		return newImageEngine(setup), nil
	}
	return load(setup)
}

// loaded is a SavedModel in memory with the picture graphs that its streams have asked for.
type loaded struct {
	saved   *savedmodel.Model
	session *tensorflow.Session
	graphs  *graphs[*preprocess.Graph]
}

func load(setup modelcache.Setup) (*loaded, error) {
	saved, err := savedmodel.Read(setup.Dir)
	if err != nil {
		return nil, err
	}
	threads := tensorflow.Options{IntraOpThreads: setup.Cores, InterOpThreads: setup.Cores}
	session, err := tensorflow.Load(setup.Dir, []string{savedmodel.ServeTag}, threads)
	if err != nil {
		return nil, fault.New(kindOf(err), "model %s cannot be loaded from %s%s: %s", setup.Model, setup.Dir, damage(err), firstLine(err))
	}
	return &loaded{saved: saved, session: session, graphs: newGraphs(setup, preprocess.New)}, nil
}

// Model returns what the SavedModel says about itself.
func (e *loaded) Model() *savedmodel.Model { return e.saved }

// Run makes tensors of the feeds, without a copy where their memory is aligned, and runs the
// session. It takes over the feeds. What TensorFlow finds wrong with the rows is a BadRequest.
func (e *loaded) Run(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error) {
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
	_ engine        = (*loaded)(nil)
	_ batch.Outputs = (outputs)(nil)
)
