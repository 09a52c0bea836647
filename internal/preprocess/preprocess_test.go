package preprocess

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/jpeg"
	"image/png"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"flightsvc/internal/fuzztest"
	"flightsvc/internal/tensorflow"
)

// oracle is one case of testdata/oracle.py.
type oracle struct {
	Picture, Tensor string
	Height, Width   int
	Scale, Offset   [3]float32
}

func (o oracle) spec() Spec { return Spec{o.Height, o.Width, o.Scale, o.Offset} }

var square = Spec{224, 224, [3]float32{1. / 128, 1. / 128, 1. / 128}, [3]float32{-127. / 128, -127. / 128, -127. / 128}}

// folder is where the oracle writes its pictures and tensors.
var folder string

// ask runs the oracle, once, and returns its cases.
var ask = sync.OnceValues(func() (cases []oracle, err error) {
	python := filepath.Join(repositoryRoot(), ".venv/bin/python")
	if output, err := exec.Command(python, "testdata/oracle.py", folder).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("TensorFlow in Python must preprocess the pictures first: %w\n%s", err, output)
	}
	text, err := os.ReadFile(filepath.Join(folder, "cases.json"))
	if err == nil {
		err = json.Unmarshal(text, &cases)
	}
	return cases, err
})

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	var err error
	if folder, err = os.MkdirTemp("", "flightsvc-preprocess-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(folder)
	code := m.Run()
	if live := tensorflow.Live(); code == 0 && live != 0 {
		fmt.Fprintf(os.Stderr, "%d tensors or buffers leaked\n", live)
		code = 1
	}
	return code
}

// TestAnswers compares every picture and Spec with TensorFlow in Python.
func TestAnswers(t *testing.T) {
	cases, err := ask()
	if err != nil || len(cases) < 100 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	graphs := map[Spec]*Graph{}
	var worst float64
	for _, c := range cases {
		t.Run(fmt.Sprintf("%s/%dx%d", c.Picture, c.Width, c.Height), func(t *testing.T) {
			if graphs[c.spec()] == nil {
				graphs[c.spec()] = newGraph(t, c.spec())
			}
			got := make([]byte, c.Height*c.Width*3*4)
			if err := graphs[c.spec()].Run(read(t, c.Picture), got); err != nil {
				t.Fatal(err)
			}
			want := floats(read(t, c.Tensor))
			for i, v := range floats(got) {
				off := math.Abs(float64(v-want[i])) / max(1, math.Abs(float64(want[i])))
				worst = max(worst, off)
				if !(off <= 1e-5) {
					t.Fatalf("value %d is %v, want %v", i, v, want[i])
				}
			}
		})
	}
	for _, g := range graphs {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d cases, largest relative difference %.2g", len(cases), worst)
}

func TestBadPictures(t *testing.T) {
	g := newGraph(t, square)
	defer g.Close()
	rocket, chelsea := read(t, "rocket.jpg"), read(t, "chelsea.png")
	crc := bytes.Clone(chelsea)
	crc[len(crc)/2] ^= 0xff
	secret := "the text of a row"
	for _, c := range []struct {
		name    string
		encoded []byte
	}{
		{"empty", nil},
		{"text", []byte(secret)},
		{"a GIF", []byte("GIF89a\x01\x00\x01\x00\x00\x00\x00;")},
		{"JPEG signature", []byte("\xff\xd8\xff")},
		{"JPEG of markers", []byte(strings.Repeat("\xff\xd8\xff\xe0\x00\x02", 10) + secret)},
		{"JPEG header only", rocket[:300]},
		{"half a JPEG", rocket[:len(rocket)/2]},
		{"JPEG of a bad length", append(append([]byte("\xff\xd8\xff\xe0\xff\xff"), secret...), rocket...)},
		{"PNG signature", chelsea[:8]},
		{"PNG header only", chelsea[:40]},
		{"half a PNG", chelsea[:len(chelsea)/2]},
		{"damaged PNG", crc},
		{"PNG without width", pngOf(0, 10)},
		{"PNG bomb", pngOf(20_000, 20_000)},
		{"thin PNG bomb", pngOf(math.MaxInt32, 2)},
		{"PNG bomb of 2^32", pngOf(math.MaxUint32, math.MaxUint32)},
		{"JPEG bomb", jpegOf(65_000, 65_000)},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := bytes.Repeat([]byte{7}, 224*224*3*4)
			start := time.Now()
			err := g.Run(c.encoded, dst)
			var e *tensorflow.Error
			if !errors.As(err, &e) || e.Code != tensorflow.InvalidArgument {
				t.Fatalf("got %v, want InvalidArgument", err)
			}
			if strings.Contains(err.Error(), secret) || strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("the message holds the row or runs over lines: %q", err)
			}
			if strings.Contains(c.name, "bomb") && !strings.Contains(err.Error(), "178956970") {
				t.Errorf("a bomb was not refused for its size: %v", err)
			}
			if bytes.ContainsFunc(dst, func(r rune) bool { return r != 7 }) {
				t.Error("dst was written to")
			}
			t.Logf("after %v: %v", time.Since(start).Round(time.Microsecond), err)
			if err := g.Run(rocket, dst); err != nil {
				t.Fatalf("the next picture: %v", err)
			}
		})
	}
	if err := g.Run(rocket, make([]byte, 10)); err == nil {
		t.Error("a short dst was accepted")
	}
}

func TestBadSpecs(t *testing.T) {
	for _, s := range []Spec{{}, {Height: 224}, {Height: -1, Width: 224}, {Height: math.MaxInt32, Width: math.MaxInt32}} {
		g, err := New(s)
		var e *tensorflow.Error
		if g != nil || !errors.As(err, &e) || e.Code != tensorflow.InvalidArgument {
			t.Errorf("New(%+v): %v", s, err)
		}
	}
}

// TestConcurrent runs one Graph from several goroutines, good pictures among bad.
func TestConcurrent(t *testing.T) {
	g := newGraph(t, square)
	pictures := [][]byte{read(t, "rocket.jpg"), read(t, "chelsea.png"), read(t, "camera.png"), []byte("neither")}
	want := make([][]byte, len(pictures))
	for i, p := range pictures {
		want[i] = make([]byte, 224*224*3*4)
		if err := g.Run(p, want[i]); (err != nil) != (i == 3) {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			dst := make([]byte, 224*224*3*4)
			for i := range 25 {
				p := (worker + i) % len(pictures)
				if err := g.Run(pictures[p], dst); (err != nil) != (p == 3) {
					t.Errorf("picture %d: %v", p, err)
				}
				if p != 3 && !bytes.Equal(dst, want[p]) {
					t.Errorf("picture %d differs", p)
				}
			}
		})
	}
	wg.Wait()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if err := g.Run(pictures[0], make([]byte, 224*224*3*4)); err == nil {
		t.Error("a closed graph ran")
	}
}

// FuzzHeader looks for bytes that make readHeader panic, loop, or disagree with
// the standard library about a size.
func FuzzHeader(f *testing.F) {
	var asPNG, asJPEG bytes.Buffer
	picture := image.NewRGBA(image.Rect(0, 0, 9, 5))
	if err := errors.Join(png.Encode(&asPNG, picture), jpeg.Encode(&asJPEG, picture, nil)); err != nil {
		f.Fatal(err)
	}
	f.Add(asPNG.Bytes())
	f.Add(asJPEG.Bytes())
	f.Add(pngOf(3, 4))
	f.Add(jpegOf(5, 6))
	f.Fuzz(func(t *testing.T, encoded []byte) {
		fuzztest.Bounded(t, 64<<20, func() {
			h, ok := readHeader(encoded)
			if ok && (h.width <= 0 || h.height <= 0) {
				t.Fatalf("%+v", h)
			}
			decode := jpeg.DecodeConfig
			if bytes.HasPrefix(encoded, []byte("\x89PNG")) {
				decode = png.DecodeConfig
			}
			var config image.Config
			config, err := decode(bytes.NewReader(encoded))
			if ok && err == nil && (config.Width != h.width || config.Height != h.height) {
				t.Fatalf("%+v, the standard library says %dx%d", h, config.Width, config.Height)
			}
		})
	})
}

func BenchmarkRun(b *testing.B) {
	picture, err := png.Decode(bytes.NewReader(read(b, "chelsea.png")))
	if err != nil {
		b.Fatal(err)
	}
	var encoded bytes.Buffer
	if err := jpeg.Encode(&encoded, picture, &jpeg.Options{Quality: 90}); err != nil {
		b.Fatal(err)
	}
	g := newGraph(b, square)
	defer g.Close()
	for _, goroutines := range []int{1, 2} {
		b.Run(fmt.Sprintf("JPEG=451x300/goroutines=%d", goroutines), func(b *testing.B) {
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range goroutines {
				wg.Go(func() {
					dst := make([]byte, 224*224*3*4)
					for left.Add(-1) >= 0 {
						if err := g.Run(encoded.Bytes(), dst); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "images/s")
		})
	}
}

func newGraph(t testing.TB, spec Spec) *Graph {
	t.Helper()
	g, err := New(spec)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// read reads a file of the oracle's.
func read(t testing.TB, name string) []byte {
	t.Helper()
	if _, err := ask(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// floats reads little-endian float32.
func floats(raw []byte) []float32 {
	v := make([]float32, len(raw)/4)
	for i := range v {
		v[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return v
}

// pngOf makes the beginning of a PNG that says it has this size.
func pngOf(width, height uint32) []byte {
	b := []byte("\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR")
	b = binary.BigEndian.AppendUint32(b, width)
	b = binary.BigEndian.AppendUint32(b, height)
	return append(b, 8, 2, 0, 0, 0)
}

// jpegOf makes the beginning of a JPEG that says it has this size.
func jpegOf(width, height uint16) []byte {
	b := []byte{0xff, 0xd8, 0xff, 0xe0, 0, 4, 0xff, 0xc0, 0xff, 0xff, 0xc0, 0, 17, 8}
	b = binary.BigEndian.AppendUint16(b, height)
	b = binary.BigEndian.AppendUint16(b, width)
	return append(b, 3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1)
}

// repositoryRoot walks up to the folder of go.mod.
func repositoryRoot() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	panic("no go.mod above the working folder")
}
