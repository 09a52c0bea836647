package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"flightsvc/handlers"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
	"flightsvc/modelcache"
)

// load opens one of the models of pyspark-shim/tests/make_models.py.
func load(t *testing.T, name string) *engine {
	t.Helper()
	e, err := open(modelcache.Setup{Model: name, Dir: filepath.Join("..", "..", "build", "models", name), Cores: 2})
	if err != nil {
		t.Fatalf("%v; make build/models/.done makes the models", err)
	}
	t.Cleanup(func() { _ = e.session.Close() })
	return e
}

// feed is a value for an input of the default signature, in memory from mem.
func feed(t *testing.T, e *engine, input string, mem *offheap.Allocator, shape []int64, data []byte, texts ...string) tensor.Feed {
	t.Helper()
	for _, spec := range e.Model().Signatures[savedmodel.DefaultSignature].Inputs {
		if spec.Name != input {
			continue
		}
		if spec.DType == savedmodel.String {
			value := tensor.Value{DType: spec.DType, Shape: shape}
			for _, text := range texts {
				value.Strings = append(value.Strings, []byte(text))
			}
			return tensor.Feed{Tensor: spec.Tensor, Value: value}
		}
		value := tensor.Allocate(spec.DType, shape, mem)
		copy(value.Data, data)
		return tensor.Feed{Tensor: spec.Tensor, Value: value}
	}
	t.Fatalf("no input %s", input)
	return tensor.Feed{}
}

func fetches(e *engine) (names []string) {
	for _, spec := range e.Model().Signatures[savedmodel.DefaultSignature].Outputs {
		names = append(names, spec.Tensor)
	}
	return names
}

func numbers(values ...int64) []byte {
	var data []byte
	for _, v := range values {
		data = binary.LittleEndian.AppendUint64(data, uint64(v))
	}
	return data
}

func TestEngineRuns(t *testing.T) {
	e, mem := load(t, "ints"), &offheap.Allocator{}
	var working sync.WaitGroup
	for i := range int64(8) {
		working.Go(func() {
			out, err := e.Run([]tensor.Feed{feed(t, e, "i", mem, []int64{2, 3}, numbers(i, 2, 3, -4, 1<<40, 6))}, fetches(e), time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			defer out.Close()
			doubled, total := out.Values()[0], out.Values()[1]
			if !bytes.Equal(doubled.Data, numbers(2*i, 4, 6, -8, 1<<41, 12)) || !bytes.Equal(total.Data, numbers(i+5, 1<<40+2)) || !slices.Equal(doubled.Shape, []int64{2, 3}) {
				t.Errorf("doubled %v of %v, total %v", doubled.Data, doubled.Shape, total.Data)
			}
		})
	}
	working.Wait()
	if mem.Live() != 0 {
		t.Errorf("%d bytes of inputs were not freed", mem.Live())
	}
}

func TestEngineRunsStrings(t *testing.T) {
	e := load(t, "strings")
	long := strings.Repeat("x", 100)
	out, err := e.Run([]tensor.Feed{feed(t, e, "s", nil, []int64{3}, nil, "a", "", long)}, fetches(e), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	got := map[savedmodel.DType]string{}
	for _, v := range out.Values() {
		got[v.DType] = fmt.Sprintf("%s %v", v.Strings, v.Data)
	}
	if want := fmt.Sprintf("%s []", []string{"A", "", strings.ToUpper(long)}); got[savedmodel.String] != want {
		t.Errorf("upper is %s, want %s", got[savedmodel.String], want)
	}
	if want := fmt.Sprintf("[] %v", numbers(1, 0, 100)); got[savedmodel.Int64] != want {
		t.Errorf("length is %s, want %s", got[savedmodel.Int64], want)
	}
}

func TestEngineFails(t *testing.T) {
	mem := &offheap.Allocator{}
	e := load(t, "slow")
	million := []byte{0x00, 0x24, 0x74, 0x4b} // 1.6e7 as float32: turns of the model's loop
	_, err := e.Run([]tensor.Feed{feed(t, e, "x", mem, []int64{1, 1}, million)}, fetches(e), 50*time.Millisecond)
	expect.Fault(t, err, fault.Deadline, "run_timeout_ms (50)")

	ints := load(t, "ints")
	_, err = ints.Run([]tensor.Feed{feed(t, ints, "i", mem, []int64{1, 3}, numbers(1, 2, 3))}, []string{"nope:0"}, 0)
	expect.Fault(t, err, fault.Internal, "TensorFlow refused it", `no tensor "nope:0"`)

	short := feed(t, ints, "i", mem, []int64{1, 3}, numbers(1, 2, 3))
	short.Value.Shape = []int64{2, 3}
	good := feed(t, ints, "i", mem, []int64{1, 3}, numbers(1, 2, 3))
	_, err = ints.Run([]tensor.Feed{short, good}, fetches(ints), 0)
	expect.Fault(t, err, fault.BadRequest, "make input tensors", "48 bytes, 24 were given")
	if mem.Live() != 0 {
		t.Errorf("%d bytes of inputs were not freed", mem.Live())
	}

	_, err = open(modelcache.Setup{Model: "m", Dir: t.TempDir()})
	expect.Fault(t, err, fault.NotFound, "is not a SavedModel")
}

func TestPictures(t *testing.T) {
	e, mem := load(t, "pictures"), &offheap.Allocator{}
	var picture bytes.Buffer
	if err := png.Encode(&picture, image.NewRGBA(image.Rect(0, 0, 5, 5))); err != nil {
		t.Fatal(err)
	}
	specs := map[string]handlers.Preprocess{"image": {Size: []int{4, 4}}}
	for range 2 {
		decode, err := e.Pictures(specs)
		if err != nil {
			t.Fatal(err)
		}
		value, refused, err := decode("image", [][]byte{picture.Bytes(), []byte("no picture"), picture.Bytes()}, mem)
		if err != nil {
			t.Fatal(err)
		}
		if len(refused) != 1 || refused[1] == "" || !slices.Equal(value.Shape, []int64{3, 4, 4, 3}) {
			t.Errorf("refused %v, shape %v", refused, value.Shape)
		}
		black := make([]byte, 4*4*3*4)
		if !bytes.Equal(value.Data[:len(black)], black) || !bytes.Equal(value.Data[2*len(black):], black) {
			t.Error("a black picture is not black")
		}
		value.Release()
	}
	if len(e.graphs) != 1 {
		t.Errorf("%d graphs for one spec", len(e.graphs))
	}
	if mem.Live() != 0 {
		t.Errorf("%d bytes were not freed", mem.Live())
	}
}

func TestKinds(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind fault.Kind
		text string
	}{
		{&tensorflow.Error{Code: tensorflow.InvalidArgument, Message: "bad\n\t[[node]]"}, fault.BadRequest, "bad"},
		{fmt.Errorf("around: %w", &tensorflow.Error{Code: tensorflow.ResourceExhausted, Message: "full"}), fault.Exhausted, "full"},
		{&tensorflow.Error{Code: tensorflow.DeadlineExceeded, Message: "late"}, fault.Deadline, "late"},
		{&tensorflow.Error{Code: tensorflow.NotFound, Message: "nope"}, fault.Internal, "nope"},
		{fault.New(fault.Precondition, "first\nsecond"), fault.Precondition, "first"},
		{errors.New("plain"), fault.Internal, "plain"},
	} {
		if got := kindOf(c.err); got != c.kind || firstLine(c.err) != c.text {
			t.Errorf("%v is %d, %q; want %d, %q", c.err, got, firstLine(c.err), c.kind, c.text)
		}
	}
}

// TestRun covers what goes wrong before a runner serves; cmd/flightsvc tests the rest on the real program.
func TestRun(t *testing.T) {
	silent := &reporter{out: json.NewEncoder(io.Discard)}
	for input, part := range map[string]string{"": "not for the command line", "{}": "not for the command line", "noise\n": "setup: ", `{"log_level":"loud"}` + "\n": "loud"} {
		if err := run(strings.NewReader(input), silent); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q gives %v", input, err)
		}
	}
	// The input must stay open: its end would end this process.
	input, front := io.Pipe()
	go func() {
		_ = json.NewEncoder(front).Encode(modelcache.Setup{Model: "m", Dir: "/nope", LogLevel: "info"})
	}()
	var reports bytes.Buffer
	err := run(input, &reporter{out: json.NewEncoder(&reports)})
	expect.Fault(t, err, fault.NotFound, "/nope is not a SavedModel")
	var report modelcache.Report
	if err := json.Unmarshal(reports.Bytes(), &report); err != nil || report.Kind != fault.NotFound || report.Error != "/nope is not a SavedModel: it has no saved_model.pb" || report.Ready || report.Build == "" {
		t.Errorf("the report is %s, %v", &reports, err)
	}
}
