// Sessions: a SavedModel or a graph is loaded with options and run, from feeds to fetches.

package tensorflow

// #include "door.h"
import "C"

import (
	"math"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"google.golang.org/protobuf/encoding/protowire"
)

// Options configures a session. With the zero value it has as many threads of each kind as the machine has cores.
type Options struct {
	// IntraOpThreads is the number of threads that one operation may use. Each session has its own.
	IntraOpThreads int
	// InterOpThreads is the number of operations that may run at once. A positive number gives the session threads of
	// its own; 0 shares those of the process. A negative one runs operations one after another in the thread that
	// calls Run, which suits small graphs that many goroutines run at once; such a session ignores timeouts.
	InterOpThreads int
	// GrowDevice makes TensorFlow allocate GPU memory when it needs it, instead of nearly all at once. TensorFlow does
	// not return it before the process ends.
	GrowDevice bool
	// DeviceMiB bounds the memory that TensorFlow allocates on the GPU that it sees; 0 is no bound. It becomes the
	// memory_limit_mb of one virtual device, because per_process_gpu_memory_fraction needs the size of the GPU, which
	// is not known here. Without a GPU it does nothing.
	DeviceMiB int
}

// Field numbers of TensorFlow's config.proto.
const (
	configIntraOpThreads       = 2
	configInterOpThreads       = 5
	configGPUOptions           = 6
	configUsePerSessionThreads = 9
	gpuAllowGrowth             = 4
	gpuExperimental            = 9
	gpuVirtualDevices          = 1
	gpuMemoryLimitMB           = 1 // repeated float
	runOptionsTimeoutInMs      = 2
)

// config encodes the options as a ConfigProto.
func (o Options) config() []byte {
	var b []byte
	field := func(number protowire.Number, value int) {
		if value != 0 {
			b = protowire.AppendTag(b, number, protowire.VarintType)
			b = protowire.AppendVarint(b, uint64(int64(value)))
		}
	}
	field(configIntraOpThreads, o.IntraOpThreads)
	field(configInterOpThreads, o.InterOpThreads)
	message := func(number protowire.Number, content []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), content)
	}
	var gpu []byte
	if o.GrowDevice {
		gpu = protowire.AppendVarint(protowire.AppendTag(gpu, gpuAllowGrowth, protowire.VarintType), 1)
	}
	if o.DeviceMiB > 0 {
		limit := message(gpuMemoryLimitMB, protowire.AppendFixed32(nil, math.Float32bits(float32(o.DeviceMiB))))
		gpu = append(gpu, message(gpuExperimental, message(gpuVirtualDevices, limit))...)
	}
	if len(gpu) > 0 {
		b = append(b, message(configGPUOptions, gpu)...)
	}
	if o.InterOpThreads > 0 {
		field(configUsePerSessionThreads, 1)
	}
	return b
}

// ownThreads makes TensorFlow give each session intra-op threads of its own. Without it all sessions share those of the
// first. TensorFlow reads the variable once, when it makes its first session.
var ownThreads = sync.OnceFunc(func() {
	name, yes := C.CString("TF_OVERRIDE_GLOBAL_THREADPOOL"), C.CString("true")
	defer C.free(unsafe.Pointer(name))
	defer C.free(unsafe.Pointer(yes))
	C.setenv(name, yes, 0)
})

// withOptions calls f with the options as TF_SessionOptions.
func withOptions(o Options, f func(*C.TF_SessionOptions) error) error {
	ownThreads()
	options := C.TF_NewSessionOptions()
	defer C.TF_DeleteSessionOptions(options)
	if config := o.config(); len(config) > 0 {
		err := withStatus(func(status *C.TF_Status) {
			C.TF_SetConfig(options, unsafe.Pointer(unsafe.SliceData(config)), C.size_t(len(config)), status)
		})
		if err != nil {
			return err
		}
	}
	return f(options)
}

// Session runs one graph. It is safe for concurrent use.
type Session struct {
	mu    sync.RWMutex  // held for reading by each Run, for writing by Close
	c     *C.TF_Session // nil once closed
	graph *C.TF_Graph   // deleted with c

	outputs sync.Map // tensor name -> C.TF_Output
}

// Load opens the SavedModel in folder dir, restores its variables and runs its initialisers. tags select the meta
// graph; it is {"serve"} in a model that was exported for serving. A folder that is not a SavedModel, lacks that meta
// graph, or has damaged variables is an *Error.
func Load(dir string, tags []string, o Options) (*Session, error) {
	path := C.CString(dir)
	defer C.free(unsafe.Pointer(path))
	names := make([]*C.char, len(tags))
	for i, tag := range tags {
		names[i] = C.CString(tag)
		defer C.free(unsafe.Pointer(names[i]))
	}
	return open(o, func(options *C.TF_SessionOptions, graph *C.TF_Graph, status *C.TF_Status) *C.TF_Session {
		return C.TF_LoadSessionFromSavedModel(options, nil, path, unsafe.SliceData(names), C.int(len(names)), graph,
			nil, status)
	})
}

// FromGraphDef opens a session on a serialised GraphDef, which is copied. Variables are not initialised.
func FromGraphDef(def []byte, o Options) (*Session, error) {
	return open(o, func(options *C.TF_SessionOptions, graph *C.TF_Graph, status *C.TF_Status) *C.TF_Session {
		buffer := C.TF_NewBufferFromString(unsafe.Pointer(unsafe.SliceData(def)), C.size_t(len(def)))
		defer C.TF_DeleteBuffer(buffer)
		imports := C.TF_NewImportGraphDefOptions()
		defer C.TF_DeleteImportGraphDefOptions(imports)
		C.TF_GraphImportGraphDef(graph, buffer, imports, status)
		if Code(C.TF_GetCode(status)) != OK {
			return nil
		}
		return C.TF_NewSession(graph, options, status)
	})
}

// open makes a session: start makes it of an empty graph.
func open(o Options, start func(*C.TF_SessionOptions, *C.TF_Graph, *C.TF_Status) *C.TF_Session) (*Session, error) {
	s := &Session{graph: C.TF_NewGraph()}
	err := withOptions(o, func(options *C.TF_SessionOptions) error {
		return withStatus(func(status *C.TF_Status) { s.c = start(options, s.graph, status) })
	})
	if err != nil {
		C.TF_DeleteGraph(s.graph)
		return nil, err
	}
	return s, nil
}

// Feed is the value of one tensor of the graph for one run.
type Feed struct {
	Name   string // as signatures spell it, "operation:0"
	Tensor *Tensor
}

// Run feeds tensors and returns the fetched ones, in the order of fetches, whose names are like Feed.Name. The caller
// closes both; feeds must stay open until Run returns. Fetched tensors may share memory with feeds.
//
// A run that takes longer than timeout is cancelled: it returns DeadlineExceeded as soon as the operations under way
// have ended. 0 means no limit. A name that the graph lacks is NotFound; a closed session is FailedPrecondition.
func (s *Session) Run(timeout time.Duration, feeds []Feed, fetches []string) ([]*Tensor, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.c == nil {
		return nil, errorf(FailedPrecondition, "the session is closed")
	}

	inputs := make([]C.TF_Output, len(feeds))
	values := make([]*C.TF_Tensor, len(feeds))
	for i, feed := range feeds {
		var err error
		if inputs[i], err = s.output(feed.Name); err != nil {
			return nil, err
		}
		if values[i] = feed.Tensor.c; values[i] == nil {
			return nil, errorf(InvalidArgument, "the tensor fed to %q is closed", feed.Name)
		}
	}
	outputs := make([]C.TF_Output, len(fetches))
	for i, name := range fetches {
		var err error
		if outputs[i], err = s.output(name); err != nil {
			return nil, err
		}
	}

	var options *C.TF_Buffer
	if timeout > 0 {
		ms := max(timeout.Milliseconds(), 1)
		b := protowire.AppendTag(nil, runOptionsTimeoutInMs, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(ms))
		options = C.TF_NewBufferFromString(unsafe.Pointer(unsafe.SliceData(b)), C.size_t(len(b)))
		defer C.TF_DeleteBuffer(options)
	}

	results := make([]*C.TF_Tensor, len(fetches))
	err := withStatus(func(status *C.TF_Status) {
		C.TF_SessionRun(s.c, options,
			unsafe.SliceData(inputs), unsafe.SliceData(values), C.int(len(inputs)),
			unsafe.SliceData(outputs), unsafe.SliceData(results), C.int(len(outputs)),
			nil, 0, nil, status)
	})
	tensors := make([]*Tensor, 0, len(results))
	for _, c := range results {
		if c != nil {
			tensors = append(tensors, adopt(c))
		}
	}
	if err != nil {
		for _, t := range tensors {
			t.Close()
		}
		return nil, err
	}
	return tensors, nil
}

// output finds a tensor of the graph by its name, "operation:index".
func (s *Session) output(name string) (C.TF_Output, error) {
	if found, ok := s.outputs.Load(name); ok {
		return found.(C.TF_Output), nil
	}
	operation, number, ok := strings.Cut(name, ":")
	index, err := strconv.ParseUint(number, 10, 31)
	if !ok || err != nil {
		return C.TF_Output{}, errorf(InvalidArgument, "%q is not the name of a tensor; it should look like operation:0",
			name)
	}
	cname := C.CString(operation)
	defer C.free(unsafe.Pointer(cname))
	oper := C.TF_GraphOperationByName(s.graph, cname)
	if oper == nil || int(index) >= int(C.TF_OperationNumOutputs(oper)) {
		return C.TF_Output{}, errorf(NotFound, "the graph has no tensor %q", name)
	}
	output := C.TF_Output{oper: oper, index: C.int(index)}
	s.outputs.Store(name, output)
	return output, nil
}

// Close waits for the runs under way and frees the session and its graph. Later runs fail. Calls after the first do
// nothing and return nil.
func (s *Session) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c == nil {
		return nil
	}
	err := withStatus(func(status *C.TF_Status) { C.TF_CloseSession(s.c, status) })
	// TF_DeleteSession reports the same status again; the session is deleted in any case.
	_ = withStatus(func(status *C.TF_Status) { C.TF_DeleteSession(s.c, status) })
	C.TF_DeleteGraph(s.graph)
	s.c, s.graph = nil, nil
	return err
}
