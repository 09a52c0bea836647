// Tests against TensorFlow in Python: answers, errors, lent memory, threads, deadlines and leaks.

package tensorflow_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	tf "github.com/galeone/tensorflow/tensorflow/go"
	"github.com/galeone/tensorflow/tensorflow/go/op"
	tg "github.com/galeone/tfgo"

	"flightsvc/internal/expect"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

// The tensors of the test models, as their signatures name them.
const (
	mlpX, mlpY         = "serving_default_x:0", "StatefulPartitionedCall:0"
	slowX, slowY       = "serving_default_x:0", "PartitionedCall:0"
	stringsS, stringsU = "serving_default_s:0", "PartitionedCall:1"
)

// oracle is one case of testdata/oracle.py.
type oracle struct {
	Name, Model    string
	Feeds, Answers []struct {
		Name, DType string
		Shape       []int64
		Data        json.RawMessage
	}
}

// root is the repository's folder.
const root = "../.."

func TestMain(m *testing.M) {
	code := m.Run()
	if live := tensorflow.Live(); code == 0 && live != 0 {
		fmt.Fprintf(os.Stderr, "%d tensors or buffers leaked\n", live)
		code = 1
	}
	os.Exit(code)
}

// TestAnswers compares every model, signature and row count with TensorFlow in Python.
func TestAnswers(t *testing.T) {
	cmd := exec.Command(filepath.Join(root, ".venv/bin/python"), "testdata/oracle.py",
		filepath.Join(root, "build/models"))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("TensorFlow in Python must answer the models first: %v\n%s\n"+
			"Make the models with: .venv/bin/python pyspark-shim/tests/make_models.py build/models", err, &stderr)
	}
	cases := decode[[]oracle](t, out)
	sessions := map[string]*tensorflow.Session{}
	var worst float64
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			s := sessions[c.Model]
			if s == nil {
				s = load(t, c.Model)
				sessions[c.Model] = s
			}
			var feeds []tensorflow.Feed
			var fetches []string
			for _, f := range c.Feeds {
				feeds = append(feeds, tensorflow.Feed{Name: f.Name, Tensor: fromJSON(t, f.DType, f.Shape, f.Data)})
			}
			for _, a := range c.Answers {
				fetches = append(fetches, a.Name)
			}
			got := run(t, s, feeds, fetches...)
			for i, want := range c.Answers {
				if got[i].DType().String() != want.DType || !slices.Equal(got[i].Shape(), want.Shape) {
					t.Fatalf("%s is %v %v, want %s %v", want.Name, got[i].DType(), got[i].Shape(), want.DType,
						want.Shape)
				}
				switch got[i].DType() {
				case savedmodel.Float32:
					expected := decode[[]float32](t, want.Data)
					for j, v := range view[float32](got[i]) {
						off := math.Abs(float64(v - expected[j]))
						worst = max(worst, off)
						if off > 1e-6+1e-5*math.Abs(float64(expected[j])) {
							t.Fatalf("%s[%d] = %v, want %v", want.Name, j, v, expected[j])
						}
					}
				case savedmodel.Int64:
					if expected := decode[[]int64](t, want.Data); !slices.Equal(view[int64](got[i]), expected) {
						t.Fatalf("%s = %v, want %v", want.Name, view[int64](got[i]), expected)
					}
				case savedmodel.String:
					for j, text := range decode[[][]byte](t, want.Data) {
						if !bytes.Equal(got[i].String(j), text) {
							t.Fatalf("%s[%d] = %.40q, want %.40q", want.Name, j, got[i].String(j), text)
						}
					}
				}
			}
		})
	}
	for _, s := range sessions {
		closed(t, s)
	}
	t.Logf("%d cases, largest difference of a float: %.2g", len(cases), worst)
}

func TestBadModels(t *testing.T) {
	truncated := copyOf(t, "mlp")
	shrink(t, filepath.Join(truncated, "variables/variables.data-00000-of-00001"))
	garbage := copyOf(t, "mlp")
	expect.Write(t, filepath.Join(garbage, "saved_model.pb"), "not a protocol buffer")
	half := copyOf(t, "mlp")
	shrink(t, filepath.Join(half, "saved_model.pb"))
	file := filepath.Join(t.TempDir(), "file")
	expect.Write(t, file, "")
	serve := []string{"serve"}
	for _, c := range []struct {
		name, dir string
		tags      []string
	}{
		{"no folder", filepath.Join(t.TempDir(), "nothing"), serve},
		{"empty folder", t.TempDir(), serve},
		{"a file", file, serve},
		{"no such tag", model("mlp"), []string{"train"}},
		{"no tag", model("mlp"), nil},
		{"truncated variables.data", truncated, serve},
		{"garbage in saved_model.pb", garbage, serve},
		{"half a saved_model.pb", half, serve},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := tensorflow.Load(c.dir, c.tags, tensorflow.Options{})
			if s != nil || err == nil {
				t.Fatal("loaded")
			}
			var e *tensorflow.Error
			if !errors.As(err, &e) || e.Code == tensorflow.OK || e.Message == "" {
				t.Fatalf("not an Error with code and message: %#v", err)
			}
			t.Logf("%v: %.120s", e.Code, e.Message)
		})
	}
	_, err := tensorflow.FromGraphDef([]byte("not a graph"), tensorflow.Options{})
	wantCode(t, err, tensorflow.InvalidArgument)

	// TensorFlow takes a model without the folder for one that has no variables.
	bare := copyOf(t, "mlp")
	if err := os.RemoveAll(filepath.Join(bare, "variables")); err != nil {
		t.Fatal(err)
	}
	s := loadFrom(t, bare, tensorflow.Options{})
	defer closed(t, s)
	x := allocate(t, savedmodel.Float32, 1, 512)
	_, err = s.Run(0, feed(mlpX, x), []string{mlpY})
	wantCode(t, err, tensorflow.FailedPrecondition)
}

func TestBadRuns(t *testing.T) {
	s := load(t, "mlp")
	good := allocate(t, savedmodel.Float32, 2, 512)
	narrow := allocate(t, savedmodel.Float32, 2, 511)
	ints := allocate(t, savedmodel.Int64, 2, 512)
	gone := allocate(t, savedmodel.Float32, 2, 512)
	gone.Close()
	for _, c := range []struct {
		name    string
		feeds   []tensorflow.Feed
		fetches []string
		want    tensorflow.Code
	}{
		{"wrong shape", feed(mlpX, narrow), []string{mlpY}, tensorflow.InvalidArgument},
		{"wrong dtype", feed(mlpX, ints), []string{mlpY}, tensorflow.InvalidArgument},
		{"nothing fed", nil, []string{mlpY}, tensorflow.InvalidArgument},
		{"nothing fetched", feed(mlpX, good), nil, tensorflow.InvalidArgument},
		{"fed twice", append(feed(mlpX, good), feed(mlpX, good)...), []string{mlpY}, tensorflow.InvalidArgument},
		{"closed tensor", feed(mlpX, gone), []string{mlpY}, tensorflow.InvalidArgument},
		{"no such feed", feed("x:0", good), []string{mlpY}, tensorflow.NotFound},
		{"no such fetch", feed(mlpX, good), []string{"y:0"}, tensorflow.NotFound},
		{"no such output", feed(mlpX, good), []string{"StatefulPartitionedCall:9"}, tensorflow.NotFound},
		{"no index", feed(mlpX, good), []string{"StatefulPartitionedCall"}, tensorflow.InvalidArgument},
		{"a control input", feed(mlpX, good), []string{"^StatefulPartitionedCall:-1"}, tensorflow.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := s.Run(0, c.feeds, c.fetches)
			if got != nil || codeOf(err) != c.want {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
			t.Logf("%.160v", err)
			run(t, s, feed(mlpX, good), mlpY) // the next request works
		})
	}
	closed(t, s)
	closed(t, s)
	_, err := s.Run(0, feed(mlpX, good), []string{mlpY})
	wantCode(t, err, tensorflow.FailedPrecondition)
}

func TestBadTensors(t *testing.T) {
	huge := []int64{math.MaxInt64, 3}
	for _, shape := range [][]int64{{-1}, {2, -3}, huge, {math.MaxInt64, 3, 0}, {math.MaxInt64}, make([]int64, 300)} {
		_, err := tensorflow.Allocate(savedmodel.Float32, shape)
		wantCode(t, err, tensorflow.InvalidArgument)
		released := 0
		_, err = tensorflow.NewTensor(savedmodel.Float32, shape, nil, func() { released++ })
		wantCode(t, err, tensorflow.InvalidArgument)
		if released != 1 {
			t.Errorf("NewTensor of shape %.40v released %d times", shape, released)
		}
	}
	_, err := tensorflow.NewStrings(huge, 1, nil)
	wantCode(t, err, tensorflow.InvalidArgument)
	_, err = tensorflow.NewStrings([]int64{2}, 1, nil) // another number
	wantCode(t, err, tensorflow.InvalidArgument)
	_, err = tensorflow.Allocate(savedmodel.String, []int64{2})
	wantCode(t, err, tensorflow.InvalidArgument)
	_, err = tensorflow.Allocate(savedmodel.Float32, []int64{1 << 50}) // 4 PiB
	wantCode(t, err, tensorflow.ResourceExhausted)
	_, err = tensorflow.NewTensor(savedmodel.Float32, []int64{2}, offHeap(t, 12), nil) // 12 bytes for 8
	wantCode(t, err, tensorflow.InvalidArgument)
}

// TestNoCopy shows that an aligned input stays where it is, and that its release
// comes once, when the last tensor that shares the memory is closed.
func TestNoCopy(t *testing.T) {
	scope := tg.NewRoot()
	x := op.Placeholder(scope.SubScope("x"), tf.Float)
	y := op.Identity(scope.SubScope("y"), x)
	s := session(t, scope)

	data := offHeap(t, 4*1000)
	fill(data)
	released := 0
	in, err := tensorflow.NewTensor(savedmodel.Float32, []int64{10, 100}, data, func() { released++ })
	if err != nil {
		t.Fatal(err)
	}
	if &in.Bytes()[0] != &data[0] {
		t.Error("the input was copied")
	}
	got, err := s.Run(0, feed(name(x), in), []string{name(y)})
	if err != nil {
		t.Fatal(err)
	}
	if &got[0].Bytes()[0] != &data[0] {
		t.Error("the identity was copied")
	}
	in.Close()
	in.Close()
	if released != 0 {
		t.Error("released while an output shares the memory")
	}
	if !bytes.Equal(got[0].Bytes(), data) {
		t.Error("the identity differs")
	}
	got[0].Close()
	if released != 1 {
		t.Errorf("released %d times, want once", released)
	}

	off, err := tensorflow.NewTensor(savedmodel.Float32, []int64{10}, data[4:44], func() { released++ })
	if err != nil {
		t.Fatal(err)
	}
	if released != 2 || !bytes.Equal(off.Bytes(), data[4:44]) {
		t.Error("unaligned data is copied and released at once")
	}
	off.Close()
	if released != 2 {
		t.Errorf("unaligned data was released %d times", released-1)
	}
	if off.Bytes() != nil {
		t.Error("Bytes of a closed tensor")
	}
}

// TestStrings sends elements through an operation that copies them one by one, and
// reads the copies after the input is gone.
func TestStrings(t *testing.T) {
	texts := [][]byte{{}, []byte("a"), bytes.Repeat([]byte("b"), 22), bytes.Repeat([]byte("c"), 23), {0, 0xff, 0},
		bytes.Repeat([]byte("long"), 250_000)}
	scope := tg.NewRoot()
	x := op.Placeholder(scope.SubScope("x"), tf.String)
	y := op.GatherV2(scope.SubScope("y"), x, op.Const(scope.SubScope("i"), []int32{5, 4, 3, 2, 1, 0}),
		op.Const(scope.SubScope("axis"), int32(0)))
	s := session(t, scope)
	in, err := tensorflow.NewStrings([]int64{2, 3}, 6, func(i int) []byte { return texts[i] })
	if err != nil {
		t.Fatal(err)
	}
	if in.Len() != 6 || in.DType() != savedmodel.String || in.Bytes() != nil {
		t.Errorf("made %d elements of %v, bytes %v", in.Len(), in.DType(), in.Bytes())
	}
	for i, text := range texts {
		if !bytes.Equal(in.String(i), text) {
			t.Errorf("element %d = %.30q, want %.30q", i, in.String(i), text)
		}
	}
	in.Close()
	if in, err = tensorflow.NewStrings([]int64{6}, 6, func(i int) []byte { return texts[i] }); err != nil {
		t.Fatal(err)
	}
	got, err := s.Run(0, feed(name(x), in), []string{name(y)})
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	for i := range texts {
		if want := texts[5-i]; !bytes.Equal(got[0].String(i), want) {
			t.Errorf("element %d = %.30q, want %.30q", i, got[0].String(i), want)
		}
	}
	got[0].Close()
}

func TestDeadline(t *testing.T) {
	s := load(t, "slow")
	turns := func(n float32) []tensorflow.Feed {
		x := allocate(t, savedmodel.Float32, 1, 1)
		view[float32](x)[0] = n
		return feed(slowX, x)
	}
	start := time.Now()
	_, err := s.Run(200*time.Millisecond, turns(1e8), []string{slowY})
	took := time.Since(start)
	if codeOf(err) != tensorflow.DeadlineExceeded {
		t.Fatalf("after %v: %v", took, err)
	}
	if took < 200*time.Millisecond || took > 5*time.Second {
		t.Errorf("a deadline of 200 ms came after %v", took)
	}
	t.Logf("DeadlineExceeded after %v", took)
	for _, timeout := range []time.Duration{0, time.Minute} {
		got, err := s.Run(timeout, turns(10), []string{slowY})
		if err != nil {
			t.Fatalf("with timeout %v after the deadline: %v", timeout, err)
		}
		if v := view[float32](got[0])[0]; v != 10 {
			t.Errorf("answer %v, want 10", v)
		}
		got[0].Close()
	}

	// Close waits for a run.
	ended := make(chan error, 1)
	started := make(chan struct{})
	feeds := turns(1e8)
	go func() {
		close(started)
		_, err := s.Run(300*time.Millisecond, feeds, []string{slowY})
		ended <- err
	}()
	<-started
	closed(t, s)
	if code := codeOf(<-ended); code != tensorflow.DeadlineExceeded && code != tensorflow.FailedPrecondition {
		t.Errorf("a run during Close gave %v", code)
	}
}

func TestConcurrent(t *testing.T) {
	s := load(t, "mlp")
	x := allocate(t, savedmodel.Float32, 16, 512)
	for i, v := range view[float32](x) {
		view[float32](x)[i] = v + float32(i%7)
	}
	feeds := feed(mlpX, x)
	want := slices.Clone(run(t, s, feeds, mlpY)[0].Bytes())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				got, err := s.Run(time.Minute, feeds, []string{mlpY})
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got[0].Bytes(), want) {
					t.Error("concurrent runs differ")
				}
				got[0].Close()
			}
		})
	}
	wg.Wait()
}

// TestThreads shows that each session has threads of its own, whatever the first
// session of the process had, and gives them back. The margins are for threads of
// Go's own.
func TestThreads(t *testing.T) {
	x := allocate(t, savedmodel.Float32, 64, 512)
	for _, c := range []struct {
		o           tensorflow.Options
		least, most int
	}{
		{tensorflow.Options{IntraOpThreads: 1, InterOpThreads: -1}, 0, 8},
		{tensorflow.Options{IntraOpThreads: 30, InterOpThreads: -1}, 25, 35},
		{tensorflow.Options{IntraOpThreads: 20, InterOpThreads: 40}, 55, 65},
		{tensorflow.Options{IntraOpThreads: 1, InterOpThreads: -1}, 0, 8},
	} {
		before := threads(t)
		s := loadFrom(t, model("mlp"), c.o)
		run(t, s, feed(mlpX, x), mlpY)
		during := threads(t)
		closed(t, s)
		after := threads(t)
		t.Logf("%+v: %d threads before, %d with the session, %d after", c.o, before, during, after)
		if during-before < c.least || during-before > c.most {
			t.Errorf("%+v made %d threads, want %d to %d", c.o, during-before, c.least, c.most)
		}
		if after-before > 8 {
			t.Errorf("%+v left %d threads", c.o, after-before)
		}
	}
}

// TestMemory runs 4 MB batches and long strings many times: resident memory must
// stay where it was after the first runs. FLIGHTSVC_SOAK_RUNS sets how many.
func TestMemory(t *testing.T) {
	runs, warm := 400, 100
	if text := os.Getenv("FLIGHTSVC_SOAK_RUNS"); text != "" {
		var err error
		if runs, err = strconv.Atoi(text); err != nil || runs < 2000 {
			t.Fatalf("FLIGHTSVC_SOAK_RUNS=%q, want a number of at least 2000", text)
		}
		warm = 1000
	}
	batch := make([]byte, 4*2048*512)
	fill(batch)
	for _, c := range []struct {
		name, model, fetch string
		feed               func() (string, *tensorflow.Tensor, error)
	}{
		{"4 MB batch", "mlp", mlpY, func() (string, *tensorflow.Tensor, error) {
			data := mapped(t, len(batch))
			copy(data, batch)
			x, err := tensorflow.NewTensor(savedmodel.Float32, []int64{2048, 512}, data,
				func() { _ = syscall.Munmap(data) })
			return mlpX, x, err
		}},
		{"1,000 strings of 1 kB", "strings", stringsU, func() (string, *tensorflow.Tensor, error) {
			text := bytes.Repeat([]byte("text"), 250)
			x, err := tensorflow.NewStrings([]int64{1000}, 1000, func(int) []byte { return text })
			return stringsS, x, err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := load(t, c.model)
			var first int
			start := time.Now()
			for i := range runs {
				name, x, err := c.feed()
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.Run(0, feed(name, x), []string{c.fetch})
				if err != nil {
					t.Fatal(err)
				}
				x.Close()
				got[0].Close()
				if i == warm-1 {
					first = resident(t)
				}
			}
			grown := resident(t) - first
			t.Logf("%d runs in %v: %d MB resident after the first %d, %+.1f MB since", runs,
				time.Since(start).Round(time.Millisecond), first>>20, warm, float64(grown)/(1<<20))
			if grown > 100<<20 {
				t.Errorf("resident memory grew by %d MB", grown>>20)
			}
		})
	}
}

// feed feeds one tensor.
func feed(name string, tensor *tensorflow.Tensor) []tensorflow.Feed {
	return []tensorflow.Feed{{Name: name, Tensor: tensor}}
}

// load opens a test model.
func load(t testing.TB, name string) *tensorflow.Session {
	t.Helper()
	return loadFrom(t, model(name), tensorflow.Options{})
}

func loadFrom(t testing.TB, dir string, options tensorflow.Options) *tensorflow.Session {
	t.Helper()
	s, err := tensorflow.Load(dir, []string{"serve"}, options)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// session opens the graph of a scope for the length of the test.
func session(t testing.TB, scope *op.Scope) *tensorflow.Session {
	t.Helper()
	graph, err := scope.Finalize()
	if err != nil {
		t.Fatal(err)
	}
	var def bytes.Buffer
	if _, err := graph.WriteTo(&def); err != nil {
		t.Fatal(err)
	}
	s, err := tensorflow.FromGraphDef(def.Bytes(), tensorflow.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	return s
}

// name spells an output of a graph as Feed does.
func name(o tf.Output) string { return fmt.Sprintf("%s:%d", o.Op.Name(), o.Index) }

func closed(t testing.TB, s *tensorflow.Session) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// run runs the session, closes the answers with the test, and fails it on error.
func run(t testing.TB, s *tensorflow.Session, feeds []tensorflow.Feed, fetches ...string) []*tensorflow.Tensor {
	t.Helper()
	got, err := s.Run(0, feeds, fetches)
	if err != nil {
		t.Fatal(err)
	}
	for _, tensor := range got {
		t.Cleanup(tensor.Close)
	}
	return got
}

// allocate makes a zeroed tensor for the length of the test.
func allocate(t testing.TB, dt savedmodel.DType, shape ...int64) *tensorflow.Tensor {
	t.Helper()
	x, err := tensorflow.Allocate(dt, shape)
	if err != nil {
		t.Fatal(err)
	}
	clear(x.Bytes())
	t.Cleanup(x.Close)
	return x
}

// fromJSON makes a tensor of the oracle for the length of the test.
func fromJSON(t *testing.T, dtype string, shape []int64, data json.RawMessage) *tensorflow.Tensor {
	t.Helper()
	switch dtype {
	case "float32":
		x := allocate(t, savedmodel.Float32, shape...)
		copy(view[float32](x), decode[[]float32](t, data))
		return x
	case "int64":
		x := allocate(t, savedmodel.Int64, shape...)
		copy(view[int64](x), decode[[]int64](t, data))
		return x
	case "string":
		texts := decode[[][]byte](t, data)
		x, err := tensorflow.NewStrings(shape, len(texts), func(i int) []byte { return texts[i] })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(x.Close)
		return x
	}
	t.Fatalf("no tensor of %s here", dtype)
	return nil
}

func decode[T any](t *testing.T, data json.RawMessage) T {
	t.Helper()
	var v T
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// view reads the elements of a tensor in place.
func view[T any](x *tensorflow.Tensor) []T {
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(x.Bytes()))), x.Len())
}

func codeOf(err error) tensorflow.Code {
	var e *tensorflow.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return tensorflow.OK
}

// wantCode fails the test unless err is an Error with this code.
func wantCode(t testing.TB, err error, want tensorflow.Code) {
	t.Helper()
	if codeOf(err) != want {
		t.Errorf("got %v, want %v", err, want)
	}
}

// offHeap maps memory for the length of the test.
func offHeap(t testing.TB, size int) []byte {
	t.Helper()
	data := mapped(t, size)
	t.Cleanup(func() { _ = syscall.Munmap(data) })
	return data
}

func mapped(t testing.TB, size int) []byte {
	t.Helper()
	data, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func fill(data []byte) {
	for i := range data {
		data[i] = byte(i % 61)
	}
}

// resident returns the bytes of memory that the process holds.
func resident(t *testing.T) int {
	t.Helper()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// threads counts the threads of the process.
func threads(t *testing.T) int {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	return len(tasks)
}

func model(name string) string { return filepath.Join(root, "build/models", name) }

// copyOf copies a test model into a folder of the test's own.
func copyOf(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if err := os.CopyFS(dir, os.DirFS(model(name))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shrink halves a file.
func shrink(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, info.Size()/2)
	}
	if err != nil {
		t.Fatal(err)
	}
}
