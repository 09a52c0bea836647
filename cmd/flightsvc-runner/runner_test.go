// Tests of both engines with real models, and of what ends a runner before it serves.

package main

import (
	"bytes"
	"context"
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

	"golang.org/x/sync/errgroup"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// loadModel opens one of the models of pyspark-shim/tests/make_models.py, for two cores.
func loadModel(t *testing.T, name string) *loaded {
	t.Helper()
	return loadSetup(t, control.Setup{Model: name, Cores: 2})
}

func loadSetup(t *testing.T, setup control.Setup) *loaded {
	t.Helper()
	setup.Dir = filepath.Join("..", "..", "build", "models", setup.Model)
	setup.MaxImagePixels, setup.MaxImageBytes = 1<<20, 1<<20
	e, err := load(setup)
	if err != nil {
		t.Fatalf("%v; make build/models/.done makes the models", err)
	}
	t.Cleanup(func() { _ = e.session.Close() })
	return e
}

// TestRunsOverlap has two runs at once of a session with one thread a run; neither ends before both have begun.
func TestRunsOverlap(t *testing.T) {
	e := loadSetup(t, control.Setup{Model: "meeting", Cores: 1, Batching: control.Batching{NumBatchThreads: 2}})
	mem := &offheap.Allocator{}
	var runs errgroup.Group
	for range 2 {
		runs.Go(func() error {
			feeds := []tensor.Feed{feed(t, e, "x", mem, []int64{1, 1}, make([]byte, 4))}
			outputs, err := e.Run(feeds, fetches(e), 20*time.Second)
			if err == nil {
				outputs.Close()
			}
			return err
		})
	}
	if err := runs.Wait(); err != nil {
		t.Error(err)
	}
}

// feed is a value for an input of the default signature, in memory from mem.
func feed(t *testing.T, e *loaded, input string, mem *offheap.Allocator, shape []int64, data []byte,
	texts ...string) tensor.Feed {
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

func fetches(e *loaded) (names []string) {
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
	e, mem := loadModel(t, "ints"), &offheap.Allocator{}
	var working sync.WaitGroup
	for i := range int64(8) {
		working.Go(func() {
			out, err := e.Run([]tensor.Feed{feed(t, e, "i", mem, []int64{2, 3}, numbers(i, 2, 3, -4, 1<<40, 6))},
				fetches(e), time.Minute)
			if err != nil {
				t.Error(err)
				return
			}
			defer out.Close()
			doubled, total := out.Values()[0], out.Values()[1]
			if !bytes.Equal(doubled.Data, numbers(2*i, 4, 6, -8, 1<<41, 12)) ||
				!bytes.Equal(total.Data, numbers(i+5, 1<<40+2)) || !slices.Equal(doubled.Shape, []int64{2, 3}) {
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
	e := loadModel(t, "strings")
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
	e := loadModel(t, "slow")
	million := []byte{0x00, 0x24, 0x74, 0x4b} // 1.6e7 as float32: turns of the model's loop
	_, err := e.Run([]tensor.Feed{feed(t, e, "x", mem, []int64{1, 1}, million)}, fetches(e), 50*time.Millisecond)
	expect.Fault(t, err, fault.Deadline, "run_timeout_ms (50)")

	ints := loadModel(t, "ints")
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

	_, err = open(control.Setup{Model: "m", Dir: t.TempDir()})
	expect.Fault(t, err, fault.NotFound, "is not a SavedModel")
}

// blackPicture is a black PNG with sides of so many pixels.
func blackPicture(t *testing.T, side int) tensor.Picture {
	t.Helper()
	var encoded bytes.Buffer
	if err := png.Encode(&encoded, image.NewRGBA(image.Rect(0, 0, side, side))); err != nil {
		t.Fatal(err)
	}
	return tensor.Picture{Data: encoded.Bytes()}
}

func TestPictures(t *testing.T) {
	e, mem := loadModel(t, "pictures"), &offheap.Allocator{}
	black := blackPicture(t, 5)
	wanted := map[string]protocol.Preprocess{"image": {Size: []int{4, 4}, Resize: "bilinear", Fit: "crop",
		Channels: "RGB", DType: "float32"}}
	for range 2 {
		pictures, err := e.Pictures(wanted)
		if err != nil {
			t.Fatal(err)
		}
		if size := pictures.Bytes("image", black); size != 4*4*3*4 {
			t.Errorf("a picture becomes %d bytes", size)
		}
		value, refused, err := pictures.Decode(t.Context(), "image",
			[]tensor.Picture{black, {Data: []byte("no picture")}, black}, mem)
		if err != nil {
			t.Fatal(err)
		}
		if len(refused) != 1 || refused[1] == "" || !slices.Equal(value.Shape, []int64{3, 4, 4, 3}) {
			t.Errorf("refused %v, shape %v", refused, value.Shape)
		}
		zero := make([]byte, 4*4*3*4)
		if !bytes.Equal(value.Data[:len(zero)], zero) || !bytes.Equal(value.Data[2*len(zero):], zero) {
			t.Error("a black picture is not black")
		}
		value.Release()

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := pictures.Decode(ctx, "image", []tensor.Picture{black}, mem); !errors.Is(err, context.Canceled) {
			t.Errorf("after its stream has ended: %v", err)
		}
	}
	if len(e.graphs.built) != 1 {
		t.Errorf("%d graphs for one spec", len(e.graphs.built))
	}
	if mem.Live() != 0 {
		t.Errorf("%d bytes were not freed", mem.Live())
	}
}

// TestImage runs the built-in model as handlers do.
func TestImage(t *testing.T) {
	e, err := open(control.Setup{Model: protocol.Image, Cores: 2, MaxImagePixels: 1_000, MaxImageBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	pictures, err := e.Pictures(map[string]protocol.Preprocess{protocol.ImageInput: {}})
	if err != nil {
		t.Fatal(err)
	}
	grey := tensor.Picture{Data: []byte{1, 2, 3, 4, 5, 6}, Height: 2, Width: 3, Channels: 1, DType: savedmodel.Uint8}
	if size := pictures.Bytes("image", blackPicture(t, 5)); size < 5*5*3 || size > 200 {
		t.Errorf("a picture of 5x5 becomes %d bytes", size)
	}
	cells := []tensor.Picture{grey, blackPicture(t, 100), blackPicture(t, 5)}
	value, refused, err := pictures.Decode(t.Context(), "image", cells, nil)
	if err != nil || len(refused) != 1 || !strings.Contains(refused[1], "1000 pixels") {
		t.Fatalf("refused %v, %v", refused, err)
	}
	kept := value.Take([]int{0, 2}, nil)
	outputs, err := e.Run([]tensor.Feed{{Tensor: "image", Value: kept}},
		[]string{"data", "height", "mode", "nChannels", "width"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer outputs.Close()
	got := outputs.Values()
	if !bytes.Equal(got[0].Strings[0], grey.Data) || len(got[0].Strings[1]) != 5*5*4 {
		t.Errorf("the data are %v", got[0].Strings)
	}
	for i, want := range map[int][]byte{1: {2, 0, 0, 0, 5, 0, 0, 0}, 2: {0, 0, 0, 0, 24, 0, 0, 0},
		3: {1, 0, 0, 0, 4, 0, 0, 0}, 4: {3, 0, 0, 0, 5, 0, 0, 0}} {
		if !bytes.Equal(got[i].Data, want) || !slices.Equal(got[i].Shape, []int64{2}) {
			t.Errorf("output %d is %v", i, got[i])
		}
	}
}

func TestKinds(t *testing.T) {
	for _, c := range []struct {
		err  error
		kind fault.Kind
		text string
	}{
		{&tensorflow.Error{Code: tensorflow.InvalidArgument, Message: "bad\n\t[[node]]"}, fault.BadRequest, "bad"},
		{fmt.Errorf("around: %w", &tensorflow.Error{Code: tensorflow.ResourceExhausted, Message: "full"}),
			fault.Exhausted, "full"},
		{&tensorflow.Error{Code: tensorflow.DeadlineExceeded, Message: "late"}, fault.Deadline, "late"},
		{&tensorflow.Error{Code: tensorflow.NotFound, Message: "nope"}, fault.Internal, "nope"},
		{fault.New(fault.Precondition, "one line"), fault.Precondition, "one line"},
		{errors.New("plain"), fault.Internal, "plain"},
	} {
		if got := kindOf(c.err); got != c.kind || firstLine(c.err) != c.text {
			t.Errorf("%v is %d, %q; want %d, %q", c.err, got, firstLine(c.err), c.kind, c.text)
		}
	}
}

// TestRun covers errors before a runner serves; cmd/flightsvc tests the rest with the real program.
func TestRun(t *testing.T) {
	silent := &reporter{out: json.NewEncoder(io.Discard)}
	for input, text := range map[string]string{"": "do not run it yourself", "{}": "do not run it yourself",
		"noise\n": "setup: ", `{"log_level":"loud"}` + "\n": "loud"} {
		if err := run(strings.NewReader(input), silent); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q gives %v", input, err)
		}
	}
	// The input must stay open: its end would end this process.
	input, front := io.Pipe()
	go func() {
		_ = json.NewEncoder(front).Encode(control.Setup{Model: "m", Dir: "/nope", LogLevel: "info"})
	}()
	var reports bytes.Buffer
	err := run(input, &reporter{out: json.NewEncoder(&reports)})
	expect.Fault(t, err, fault.NotFound, "/nope is not a SavedModel")
	var report control.Report
	if err := json.Unmarshal(reports.Bytes(), &report); err != nil || report.Kind != fault.NotFound ||
		report.Error != "/nope is not a SavedModel: it has no saved_model.pb" || report.Ready || report.Build == "" {
		t.Errorf("the report is %s, %v", &reports, err)
	}
}
