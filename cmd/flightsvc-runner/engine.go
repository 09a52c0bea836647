// The engine of a SavedModel, which is loaded into a TensorFlow session.

package main

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"flightsvc/handlers"
	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// engine is the model of a runner, as handlers and the scheduler use it.
type engine interface {
	handlers.Engine
	Run(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error)
}

// open loads the model of a setup.
func open(setup control.Setup) (engine, error) {
	if version := tensorflow.Version(); tensorflow.TooOld(version) {
		return nil, fault.New(fault.Precondition, "model %s: libtensorflow is of TensorFlow %s, flightsvc needs %s or "+
			"newer; run pip install tensorflow-cpu==2.21.0 in the environment that it comes from "+
			"(setting libtensorflow)", setup.Model, version, tensorflow.Oldest)
	}
	if setup.Dir == "" {
		return newImageEngine(setup), nil
	}
	return load(setup)
}

// loaded is the engine of a SavedModel, with the picture graphs that its streams have asked for.
type loaded struct {
	saved   *savedmodel.Model
	session session
	device  string // UUID of the device with the session's memory; "" for the host
	graphs  *graphs[*preprocess.Graph]
	sampler *sampler // nil where no run is kept

	// openWide opens a second session, whose runs have all threads; nil where those of the first do. The pool of
	// threads belongs to a session, so one session cannot do both.
	openWide func() (session, error)
	widening sync.Once
	wide     atomic.Pointer[session] // nil until it is open
}

// session runs a SavedModel. It is a *tensorflow.Session; with the build tag simulated_device it may be a *simulated.
type session interface {
	Run(timeout time.Duration, feeds []tensorflow.Feed, fetches []string) ([]*tensorflow.Tensor, error)
	Close() error
}

func load(setup control.Setup) (*loaded, error) {
	saved, err := savedmodel.Read(context.Background(), setup.Dir, nil)
	if err != nil {
		return nil, err
	}
	for _, library := range setup.OpLibraries {
		if err := tensorflow.LoadLibrary(library); err != nil {
			return nil, fault.New(fault.Precondition, "model %s: the library %s, one of its op_libraries, "+
				"cannot be loaded: %s; it must be built for this machine and for TensorFlow %s", setup.Model, library,
				firstLine(err), tensorflow.Version())
		}
	}
	cores := max(setup.Cores, 1)
	runs := cmp.Or(setup.Batching.NumBatchThreads, cores)
	// Each run needs a thread of the inter-op pool, or runs wait for one another.
	options := tensorflow.Options{IntraOpThreads: cmp.Or(setup.Threads, max(cores/runs, 1)),
		InterOpThreads: max(cores, runs)}
	if setup.Device != "" {
		options.IntraOpThreads, options.GrowDevice, options.DeviceMiB = cores, true, int(setup.DeviceBytes>>20)
	}
	first, err := openSession(setup, options)
	if err != nil {
		return nil, loadError(setup, err)
	}
	e := &loaded{saved: saved, session: first, device: setup.Device, graphs: newGraphs(setup, preprocess.New)}
	if setup.RoomForTwo && options.IntraOpThreads < cores {
		options.IntraOpThreads = cores
		e.openWide = func() (session, error) { return openSession(setup, options) }
	}
	return e, nil
}

// unknownOperation matches TensorFlow's message about an operation that it does not have, and the operation's name.
var unknownOperation = regexp.MustCompile(`Op type not registered '([^']+)'`)

// loadError explains why a SavedModel cannot be loaded, and what to do.
func loadError(setup control.Setup, err error) error {
	if op := unknownOperation.FindStringSubmatch(err.Error()); op != nil {
		return fault.New(fault.Precondition, "model %s uses the operation %s, which TensorFlow %s does not have; "+
			"name the library that has it in op_libraries of the model's %s, and allow that file with the server's "+
			"setting op-libraries", setup.Model, op[1], tensorflow.Version(), control.SettingsFile)
	}
	if setup.Device != "" && noMemory(err) {
		return fault.New(fault.Exhausted, "model %s does not fit into the memory of the device %s: %s", setup.Model,
			setup.Device, firstLine(err))
	}
	return fault.New(kindOf(err), "model %s cannot be loaded from %s%s: %s", setup.Model, setup.Dir, damageHint(err),
		firstLine(err))
}

// noMemory reports whether TensorFlow ran out of memory. Its allocators report ResourceExhausted; CUDA's own messages
// come with other codes, but never with InvalidArgument, whose message may quote a row.
func noMemory(err error) bool {
	var native *tensorflow.Error
	if !errors.As(err, &native) {
		return false
	}
	text := strings.ToLower(native.Message)
	said := strings.Contains(text, "out of memory") || strings.Contains(text, "out_of_memory")
	return native.Code == tensorflow.ResourceExhausted || said && native.Code != tensorflow.InvalidArgument
}

// Model returns the signatures of the SavedModel.
func (e *loaded) Model() *savedmodel.Model { return e.saved }

// Run makes tensors of the feeds, without a copy if their memory is aligned, and runs the session. It takes over the
// feeds. An error that TensorFlow blames on the rows is a BadRequest.
func (e *loaded) Run(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error) {
	return e.runIn(e.session, feeds, fetches, timeout)
}

// RunAlone is Run with all threads. The first call only begins to open the session that has them.
func (e *loaded) RunAlone(feeds []tensor.Feed, fetches []string, timeout time.Duration) (batch.Outputs, error) {
	if e.openWide == nil {
		return e.Run(feeds, fetches, timeout)
	}
	e.widening.Do(func() {
		go func() { // ends when the session is open, or with the process
			if wide, err := e.openWide(); err == nil { // else runs go on with the threads that they had
				e.wide.Store(&wide)
			}
		}()
	})
	if wide := e.wide.Load(); wide != nil {
		return e.runIn(*wide, feeds, fetches, timeout)
	}
	return e.Run(feeds, fetches, timeout)
}

func (e *loaded) runIn(
	session session, feeds []tensor.Feed, fetches []string, timeout time.Duration,
) (batch.Outputs, error) {
	kept := e.sampler.begin(feeds)
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
		e.sampler.end(kept, fetches, nil)
		return nil, fault.New(kindOf(failed), "make input tensors: %w", failed)
	}
	results, err := session.Run(timeout, fed, fetches)
	e.sampler.end(kept, fetches, results)
	if err != nil {
		if e.device != "" && noMemory(err) {
			return nil, fault.New(fault.Exhausted, "the device %s has no memory for this batch; end other programs "+
				"on the device, or ask for the device \"cpu\". %s%s", e.device, handlers.TensorFlowSays, firstLine(err))
		}
		if kindOf(err) == fault.Deadline {
			return nil, fault.New(fault.Deadline, "TensorFlow did not finish a batch within run_timeout_ms (%d)",
				timeout.Milliseconds())
		}
		return nil, fault.New(kindOf(err), "%s%s", handlers.TensorFlowSays, firstLine(err))
	}
	return outputs(results), nil
}

// newTensor makes a tensor of a value and takes over the value.
func newTensor(value *tensor.Value) (*tensorflow.Tensor, error) {
	if value.DType == savedmodel.String {
		defer value.Release()
		return tensorflow.NewStrings(value.Shape, len(value.Strings), func(i int) []byte { return value.Strings[i] })
	}
	return tensorflow.NewTensor(value.DType, value.Shape, value.Data, value.Release)
}

// outputs are tensors that TensorFlow made.
type outputs []*tensorflow.Tensor

// Values returns views of the tensors.
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

// damageHint explains TensorFlow's codes for files that are truncated or missing.
func damageHint(err error) string {
	var native *tensorflow.Error
	if errors.As(err, &native) {
		switch native.Code {
		case tensorflow.OutOfRange, tensorflow.DataLoss, tensorflow.NotFound:
			return ", its files are damaged or incomplete; export the model again"
		}
	}
	return ""
}

// kindOf translates the TensorFlow codes that a caller can act on; all others are Internal.
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

// firstLine returns the first line of an error's message; in TensorFlow's messages a trace of the graph follows it.
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
