// Tests of warming up, of padded runs, of devices without memory, and of operations in libraries.

package main

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	tensorpb "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_go_proto"
	framework "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_shape_go_proto"
	"github.com/galeone/tensorflow/tensorflow/go/core/framework/types_go_proto"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// watched notes the rows of each run of a session, and fails the runs that full selects.
type watched struct {
	session
	rows []int64
	full func(rows int64) error
}

func (w *watched) Run(timeout time.Duration, feeds []tensorflow.Feed, fetches []string) ([]*tensorflow.Tensor, error) {
	rows := feeds[0].Tensor.Shape()[0]
	w.rows = append(w.rows, rows)
	if w.full != nil {
		if err := w.full(rows); err != nil {
			return nil, err
		}
	}
	return w.session.Run(timeout, feeds, fetches)
}

func watch(e *loaded) *watched {
	w := &watched{session: e.session}
	e.session = w
	return w
}

// field is a message with one field, which holds bytes.
func field(number protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), content)
}

// request is a Predict request with the given input, of int64 rows of three, behind its name.
func request(t *testing.T, signature, input string, outputs []string, rows int64) []byte {
	t.Helper()
	shape := &framework.TensorShapeProto{Dim: []*framework.TensorShapeProto_Dim{{Size: rows}, {Size: 3}}}
	content, err := proto.Marshal(&tensorpb.TensorProto{Dtype: types_go_proto.DataType_DT_INT64, TensorShape: shape,
		Int64Val: []int64{7}})
	if err != nil {
		t.Fatal(err)
	}
	message := field(1, field(3, []byte(signature)))
	message = append(message, field(2, append(field(1, []byte(input)), field(2, content)...))...)
	for _, name := range outputs {
		message = append(message, field(3, []byte(name))...)
	}
	return field(6, field(1, message))
}

// withWarmup copies a model and writes its warm-up requests.
func withWarmup(t *testing.T, name string, records ...[]byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("..", "..", "build", "models", name))); err != nil {
		t.Fatal(err)
	}
	sum := func(data []byte) uint32 {
		crc := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
		return (crc>>15 | crc<<17) + 0xa282ead8
	}
	var file []byte
	for _, record := range records {
		length := binary.LittleEndian.AppendUint64(nil, uint64(len(record)))
		file = append(file, binary.LittleEndian.AppendUint32(length, sum(length))...)
		file = append(file, record...)
		file = binary.LittleEndian.AppendUint32(file, sum(record))
	}
	path := filepath.Join(dir, savedmodel.WarmupFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestWarmUpWithRequests(t *testing.T) {
	signature := savedmodel.DefaultSignature
	classify := field(2, nil)
	for name, c := range map[string]struct {
		records [][]byte
		rows    []int64
		want    []string // of the error
	}{
		"good": {records: [][]byte{request(t, "", "i", nil, 2), classify,
			request(t, signature, "i", []string{"total"}, 5)}, rows: []int64{2, 5}},
		"no signature": {records: [][]byte{request(t, "nope", "i", nil, 2)},
			want: []string{"record 1", "tf_serving_warmup_requests", `no signature "nope"`}},
		"another input": {records: [][]byte{request(t, "", "i", nil, 2), request(t, "", "x", nil, 2)}, rows: []int64{2},
			want: []string{"record 2", `no input "i"`}},
		"no output": {records: [][]byte{request(t, "", "i", []string{"total", "nope"}, 2)},
			want: []string{"record 1", "output_filter"}},
		"damaged": {records: [][]byte{request(t, "", "i", nil, 2), []byte("no message")}, rows: []int64{2},
			want: []string{"record 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			setup := control.Setup{Model: "m", Dir: withWarmup(t, "ints", c.records...), Cores: 1}
			e, err := load(setup)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = e.session.Close() }()
			runs, mem := watch(e), &offheap.Allocator{}
			core, logs := observer.New(zapcore.InfoLevel)
			err = e.warmUp(setup, mem, zap.New(core))
			if !slices.Equal(runs.rows, c.rows) {
				t.Errorf("runs of %v rows, want %v", runs.rows, c.rows)
			}
			if mem.Live() != 0 {
				t.Errorf("%d bytes were not freed", mem.Live())
			}
			if c.want != nil {
				kind, _ := fault.KindOf(err)
				expect.Fault(t, err, kind, append(c.want, "model m", "write the file again")...)
			} else if err != nil || logs.FilterField(zap.String("kind", "classify_log")).Len() != 1 {
				t.Errorf("%v, logged %v", err, logs.All())
			}
		})
	}
	// An error of TensorFlow keeps its message.
	setup := control.Setup{Model: "m", Dir: withWarmup(t, "nested", request(t, "", "x", nil, 2)), Cores: 1}
	e, err := load(setup)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = e.session.Close() }()
	expect.Fault(t, e.warmUp(setup, &offheap.Allocator{}, zap.NewNop()), fault.BadRequest, "record 1",
		"TensorFlow refused it", "float")
	// A pipe, on which reading would never end.
	requests := filepath.Join(setup.Dir, savedmodel.WarmupFile)
	if err := errors.Join(os.Remove(requests), unix.Mkfifo(requests, 0o600)); err != nil {
		t.Fatal(err)
	}
	expect.Fault(t, e.warmUp(setup, &offheap.Allocator{}, zap.NewNop()), fault.Precondition, "not a regular file")
}

func TestWarmUpWithZeros(t *testing.T) {
	for name, c := range map[string]struct {
		rows   []int64
		logged string // why a signature was not run
	}{
		"two":        {rows: []int64{1, 4, 1, 4}}, // two signatures
		"echo":       {rows: []int64{1, 4}},       // unknown sizes
		"vocabulary": {logged: "zeros cannot feed"},
		"counter":    {logged: "assigns variables"},
	} {
		t.Run(name, func(t *testing.T) {
			e := loadModel(t, name)
			runs, mem := watch(e), &offheap.Allocator{}
			core, logs := observer.New(zapcore.InfoLevel)
			setup := control.Setup{Model: name, Batching: control.Batching{AllowedBatchSizes: []int{1, 4}}}
			if err := e.warmUp(setup, mem, zap.New(core)); err != nil {
				t.Fatal(err)
			}
			if name != "counter" && !slices.Equal(runs.rows, c.rows) { // one of its signatures assigns
				t.Errorf("runs of %v rows", runs.rows)
			}
			var said strings.Builder
			for _, entry := range logs.FilterMessage("not warmed up with zeros").All() {
				for _, f := range entry.Context {
					if err, ok := f.Interface.(error); ok {
						said.WriteString(err.Error())
					}
				}
			}
			if (c.logged == "") != (said.Len() == 0) || !strings.Contains(said.String(), c.logged) {
				t.Errorf("logged %q", said.String())
			}
			if mem.Live() != 0 {
				t.Errorf("%d bytes were not freed", mem.Live())
			}
		})
	}
	// No run has more than max_batch_bytes, as in serving.
	signature := savedmodel.Signature{Inputs: []savedmodel.Spec{{Name: "x", DType: savedmodel.Float32,
		Shape: []int64{-1, 1 << 20}}}}
	for rows, refused := range map[int64]bool{16: false, 17: true} {
		mem := &offheap.Allocator{}
		feeds, err := zeros(signature, rows, mem)
		if tensor.ReleaseFeeds(feeds); (err != nil) != refused || mem.Live() != 0 {
			t.Errorf("%d rows of 4 MiB: %v, %d bytes were not freed", rows, err, mem.Live())
		}
	}
	// A run that ignores its timeout is not waited for.
	e, mem := loadModel(t, "slow"), &offheap.Allocator{}
	million := []byte{0x00, 0x24, 0x74, 0x4b} // 1.6e7 as float32: turns of the model's loop
	feeds := []tensor.Feed{feed(t, e, "x", mem, []int64{1, 1}, million)}
	signature = e.saved.Signatures[savedmodel.DefaultSignature]
	if err := e.runUntil(time.Now().Add(100*time.Millisecond), feeds, signature); err == nil ||
		!strings.Contains(err.Error(), "did not finish") {
		t.Errorf("the loop ended with %v", err)
	}
}

// TestPaddedRuns runs a real model through the scheduler with prescribed batch sizes, also with rows that TensorFlow
// refuses.
func TestPaddedRuns(t *testing.T) {
	e, mem := loadModel(t, "ints"), &offheap.Allocator{}
	runs := watch(e)
	batches := batch.New(batch.Options{MaxBatchSize: 8, MaxBatchBytes: 1 << 20, MaxEnqueuedBatches: 8,
		NumBatchThreads: 1, AllowedBatchSizes: []int{2, 8}, Run: e.Run, Memory: mem, Log: zap.NewNop()})
	defer batches.Close()
	stream := batches.Stream(batch.Call{Fetches: fetches(e), Check: func(values []tensor.Value, rows int) error {
		if values[0].Rows() != int64(rows) {
			return fault.New(fault.Internal, "%d rows for %d", values[0].Rows(), rows)
		}
		return nil
	}})
	var x, doubled, total []int64
	for i := range int64(11) {
		x = append(x, i, -i, 2*i)
		doubled, total = append(doubled, 2*i, -2*i, 4*i), append(total, 2*i)
	}
	answer, err := stream.Run(t.Context(), []tensor.Feed{feed(t, e, "i", mem, []int64{11, 3}, numbers(x...))}, 11,
		false)
	if err != nil {
		t.Fatal(err)
	}
	if got := answer.Values; string(got[0].Data) != string(numbers(doubled...)) ||
		string(got[1].Data) != string(numbers(total...)) {
		t.Errorf("got %v", got)
	}
	if !slices.Equal(runs.rows, []int64{8, 8}) || answer.TFRows != 11 {
		t.Errorf("runs of %v rows, tf_rows %d", runs.rows, answer.TFRows)
	}
	answer.Close()
	if mem.Live() != 0 {
		t.Errorf("%d bytes were not freed", mem.Live())
	}
}

func TestNoDeviceMemory(t *testing.T) {
	e, mem := loadModel(t, "ints"), &offheap.Allocator{}
	var cuda atomic.Bool
	watch(e).full = func(int64) error {
		if cuda.Load() {
			return &tensorflow.Error{Code: tensorflow.Internal,
				Message: "CUDA_ERROR_OUT_OF_MEMORY: out of memory\nstack"}
		}
		return &tensorflow.Error{Code: tensorflow.ResourceExhausted, Message: "OOM when allocating tensor\nstack"}
	}
	run := func() error {
		_, err := e.Run([]tensor.Feed{feed(t, e, "i", mem, []int64{1, 3}, numbers(1, 2, 3))}, fetches(e), 0)
		return err
	}
	expect.Fault(t, run(), fault.Exhausted, "TensorFlow refused it: OOM when")
	e.device = "GPU-1"
	expect.Fault(t, run(), fault.Exhausted, "the device GPU-1 has no memory", `device "cpu"`, "OOM when")
	cuda.Store(true)
	expect.Fault(t, run(), fault.Exhausted, "the device GPU-1 has no memory", "CUDA_ERROR_OUT_OF_MEMORY")
	watch(e).full = func(int64) error {
		return &tensorflow.Error{Code: tensorflow.InvalidArgument,
			Message: "StringToNumberOp could not correctly convert string: out of memory"}
	}
	expect.Fault(t, run(), fault.BadRequest, "TensorFlow refused it", "convert string")
	setup := control.Setup{Model: "m", Device: "GPU-1"}
	expect.Fault(t, loadError(setup, &tensorflow.Error{Code: tensorflow.Internal, Message: "failed: out of memory"}),
		fault.Exhausted, "model m does not fit", "GPU-1")
	setup.Device = ""
	expect.Fault(t, loadError(setup, &tensorflow.Error{Code: tensorflow.Internal, Message: "failed: out of memory"}),
		fault.Internal, "model m cannot be loaded")
}

// TestOpLibraries builds an operation and a model with it, which TensorFlow in Python loads as well.
func TestOpLibraries(t *testing.T) {
	if _, err := exec.LookPath("g++"); err != nil {
		t.Skip("skipped: needs a C++ compiler")
	}
	out := t.TempDir()
	made := exec.Command(filepath.Join("..", "..", ".venv", "bin", "python"),
		filepath.Join("testdata", "make_triple.py"), out)
	if text, err := made.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	setup := control.Setup{Model: "triple", Dir: filepath.Join(out, "triple"), Cores: 1}
	_, err := load(setup)
	expect.Fault(t, err, fault.Precondition, "model triple uses the operation FlightsvcTriple",
		"op_libraries of the model's flightsvc.json", "setting op-libraries")

	setup.OpLibraries = []string{filepath.Join(out, "nope.so")}
	_, err = load(setup)
	expect.Fault(t, err, fault.Precondition, "nope.so", "No such file")

	text := filepath.Join(out, "text.so")
	if err := os.WriteFile(text, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	setup.OpLibraries = []string{text}
	_, err = load(setup)
	expect.Fault(t, err, fault.Precondition, "text.so", "cannot be loaded")

	setup.OpLibraries = []string{filepath.Join(out, "triple.so")}
	for range 2 { // again does nothing
		e, err := load(setup)
		if err != nil {
			t.Fatal(err)
		}
		one, three := []byte{0, 0, 0x80, 0x3f}, []byte{0, 0, 0x40, 0x40}
		outputs, err := e.Run([]tensor.Feed{feed(t, e, "x", &offheap.Allocator{}, []int64{1}, one)}, fetches(e), 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := outputs.Values()[0].Data; !slices.Equal(got, three) {
			t.Errorf("three times 1 is %v", got)
		}
		outputs.Close()
		_ = e.session.Close()
	}
}
