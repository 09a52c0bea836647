// Tests against tf.image, with damaged and malicious pictures, and of memory.

package preprocess

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"image"
	"image/color/palette"
	"image/gif"
	"image/jpeg"
	"image/png"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/image/bmp"

	"flightsvc/internal/fuzztest"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// oracle is one case of testdata/oracle.py.
type oracle struct {
	Picture   string
	Raw       []int // height, width, channels of an image struct; nil for a file
	RawType   string
	Decoder   bool
	Spec      Spec
	Tensor    string // the file of the answer
	DType     string
	Shape     []int
	Tolerance float64 // for float32 and float64, relative unless Absolute; other types may differ by 1
	Absolute  bool
}

func (o oracle) String() string {
	s := o.Spec
	return fmt.Sprintf("%s/%dx%d-%s-%v-%s-%s-%s", o.Picture, s.Width, s.Height, s.Resize, s.Antialias, s.Fit,
		s.Channels, o.DType)
}

// cell is the picture as it comes from a column.
func (o oracle) cell(t testing.TB) tensor.Picture {
	p := tensor.Picture{Data: read(t, o.Picture)}
	if o.Raw != nil {
		p.Height, p.Width, p.Channels, p.DType = o.Raw[0], o.Raw[1], o.Raw[2], dtypes[o.RawType]
	}
	return p
}

var dtypes = map[string]savedmodel.DType{
	"float32": savedmodel.Float32, "float64": savedmodel.Float64, "float16": savedmodel.Float16,
	"bfloat16": savedmodel.Bfloat16, "uint8": savedmodel.Uint8, "int32": savedmodel.Int32,
}

var square = Spec{
	Height: 224, Width: 224, Resize: "bilinear", Fit: "crop", Channels: "RGB", DType: savedmodel.Float32,
	Scale: [3]float32{1. / 128, 1. / 128, 1. / 128}, Offset: [3]float32{-127. / 128, -127. / 128, -127. / 128},
}

var limits = Limits{Pixels: 178_956_970, Bytes: 64 << 20, Working: 1 << 30}

// folder is where the oracle writes its pictures and tensors.
var folder string

// ask runs the oracle, once, and returns its cases.
var ask = sync.OnceValues(func() (cases []oracle, err error) {
	oracle := exec.Command("../../.venv/bin/python", "testdata/oracle.py", folder)
	if output, err := oracle.CombinedOutput(); err != nil {
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
	if err != nil || len(cases) < 600 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	budget := NewBudget(limits)
	graphs, decoders := map[Spec]*Graph{}, map[Spec]*Decoder{}
	worst := map[string]float64{}
	all := t // closes graphs and decoders
	for _, c := range cases {
		t.Run(c.String(), func(t *testing.T) {
			c.Spec.DType = dtypes[c.DType]
			var got []byte
			if c.Decoder {
				of := c.Spec // one decoder makes all sizes
				of.Height, of.Width, of.DType = 0, 0, 0
				if decoders[of] == nil {
					decoders[of] = newDecoder(all, of, budget)
				}
				made, err := decoders[of].Run(t.Context(), c.cell(t), c.Spec.Height, c.Spec.Width)
				if err != nil {
					t.Fatal(err)
				}
				if shape := []int{made.Height, made.Width, made.Channels}; !slices.Equal(shape, c.Shape) ||
					made.DType != c.Spec.DType {
					t.Fatalf("a picture of %v %v, want %v", shape, made.DType, c.Shape)
				}
				got = made.Data
			} else {
				if graphs[c.Spec] == nil {
					graphs[c.Spec] = newGraph(all, c.Spec, budget)
				}
				got = make([]byte, c.Spec.Bytes())
				if err := graphs[c.Spec].Run(t.Context(), c.cell(t), got); err != nil {
					t.Fatal(err)
				}
			}
			want := values(read(t, c.Tensor), c.Spec.DType)
			if len(want) != c.Shape[0]*c.Shape[1]*c.Shape[2] || len(values(got, c.Spec.DType)) != len(want) {
				t.Fatalf("%d bytes, want %d values", len(got), len(want))
			}
			for i, v := range values(got, c.Spec.DType) {
				off, most := math.Abs(v-want[i]), c.Tolerance
				switch {
				case c.DType != "float32" && c.DType != "float64":
					most = 1 // of whole numbers, or of the bits of halves
				case !c.Absolute:
					off /= max(1, math.Abs(want[i]))
				}
				worst[c.DType] = max(worst[c.DType], off)
				if !(off <= most) {
					t.Fatalf("value %d is %v, want %v", i, v, want[i])
				}
			}
		})
	}
	t.Logf("%d cases, %d graphs, %d decoders, largest differences %v", len(cases), len(graphs), len(decoders), worst)
}

func TestBadPictures(t *testing.T) {
	g := newGraph(t, square, NewBudget(limits))
	d := newDecoder(t, Spec{}, NewBudget(limits))
	rocket, chelsea := read(t, "rocket.jpg"), read(t, "chelsea.png")
	crc := bytes.Clone(chelsea)
	crc[len(crc)/2] ^= 0xff
	secret := "the text of a row"
	progressive, film, bitmap := read(t, "made_progressive.jpg"), read(t, "made.gif"), read(t, "made_24.bmp")
	scan := progressive[bytes.LastIndex(progressive, []byte("\xff\xda")) : len(progressive)-2]
	scans := append(bytes.Clone(progressive[:len(progressive)-2]), bytes.Repeat(scan, 100)...)
	large := bytes.Clone(progressive)
	frame := bytes.Index(large, []byte("\xff\xc2"))
	copy(large[frame+5:], "\x2e\xe0\x2e\xe0") // 12000x12000, in 10 scans
	long := append(pngOf(maxSide+1, 1), make([]byte, 4000)...)
	compressed, deep, wide := bytes.Clone(bitmap), bytes.Clone(bitmap), bytes.Clone(bitmap)
	compressed[30], deep[28] = 1, 16
	copy(wide[18:], "\x00\x30\x00\x00\x00\x30\x00\x00") // 12288x12288, below the limit
	outside := bytes.Clone(film)
	copy(outside[6:], "\x05\x00\x05\x00") // a canvas of 5x5
	var small bytes.Buffer
	if err := jpeg.Encode(&small, image.NewGray(image.Rect(0, 0, 8, 8)), nil); err != nil {
		t.Fatal(err)
	}
	hollow := small.Bytes() // ends with the end marker, as a whole picture does
	frame = bytes.Index(hollow, []byte("\xff\xc0"))
	copy(hollow[frame+5:], "\x32\xc8\x32\xc8") // 13000x13000
	for _, c := range []struct {
		name    string
		encoded []byte
	}{
		{"empty", nil},
		{"JPEG of hardly any bytes", hollow},
		{"text", []byte(secret)},
		{"GIF signature", film[:6]},
		{"GIF without a frame", []byte("GIF89a\x01\x00\x01\x00\x00\x00\x00;")},
		{"GIF of an unknown block", []byte("GIF89a\x01\x00\x01\x00\x00\x00\x00" + secret)},
		{"GIF without width", []byte("GIF89a\x00\x00\x01\x00\x00\x00\x00;")},
		{"half a GIF", film[:len(film)/2]},
		{"GIF frame beyond the canvas", outside},
		{"GIF bomb", append([]byte("GIF89a\xff\xff\xff\xff"), film[10:]...)},
		{"BMP signature", bitmap[:2]},
		{"BMP header only", bitmap[:54]},
		{"half a BMP", bitmap[:len(bitmap)/2]},
		{"BMP compressed", compressed},
		{"BMP of 16 bits", deep},
		{"BMP far too short", wide},
		{"BMP bomb", append(append(bytes.Clone(bitmap[:18]), "\x30\x75\x00\x00\x30\x75\x00\x00"...), bitmap[26:]...)},
		{"JPEG of many scans", scans},
		{"JPEG of a few large scans", large},
		{"PNG of a long side", long},
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
		{"PNG bomb", append(pngOf(30_000, 30_000), make([]byte, 4000)...)},
		{"PNG header of a large one", pngOf(13_000, 13_000)},
		{"thin PNG bomb", pngOf(math.MaxInt32, 2)},
		{"PNG bomb of 2^32", pngOf(math.MaxUint32, math.MaxUint32)},
		{"JPEG bomb", jpegOf(65_000, 65_000)},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := bytes.Repeat([]byte{7}, 224*224*3*4)
			start := time.Now()
			err := g.Run(t.Context(), tensor.Picture{Data: c.encoded}, dst)
			if !isInvalid(err) {
				t.Fatalf("got %v, want InvalidArgument", err)
			}
			if strings.Contains(err.Error(), secret) || strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("the message holds the row or runs over lines: %q", err)
			}
			if strings.Contains(c.name, "bomb") && !strings.Contains(err.Error(), "178956970") {
				t.Errorf("a bomb was not refused for its size: %v", err)
			}
			if strings.Contains(c.name, "scans") && !strings.Contains(err.Error(), "scans") {
				t.Errorf("it was not refused for its scans: %v", err)
			}
			if _, err := d.Run(t.Context(), tensor.Picture{Data: c.encoded}, 0, 0); !isInvalid(err) {
				t.Errorf("the decoder: %v, want InvalidArgument", err)
			}
			if bytes.ContainsFunc(dst, func(r rune) bool { return r != 7 }) {
				t.Error("dst was written to")
			}
			t.Logf("after %v: %v", time.Since(start).Round(time.Microsecond), err)
			if err := g.Run(t.Context(), tensor.Picture{Data: rocket}, dst); err != nil {
				t.Fatalf("the next picture: %v", err)
			}
		})
	}
	if err := g.Run(t.Context(), tensor.Picture{Data: rocket}, make([]byte, 10)); err == nil {
		t.Error("a short dst was accepted")
	}
}

// TestBadStructs gives image structs whose numbers do not agree, or are too large.
func TestBadStructs(t *testing.T) {
	g, d := newGraph(t, square, NewBudget(limits)), newDecoder(t, Spec{}, NewBudget(limits))
	for name, p := range map[string]tensor.Picture{
		"too few bytes":   {Data: make([]byte, 11), Height: 2, Width: 2, Channels: 3, DType: savedmodel.Uint8},
		"too many bytes":  {Data: make([]byte, 13), Height: 2, Width: 2, Channels: 3, DType: savedmodel.Uint8},
		"no bytes":        {Height: 2, Width: 2, Channels: 3, DType: savedmodel.Uint8},
		"no width":        {Height: 2, Channels: 3, DType: savedmodel.Uint8},
		"Spark's invalid": {Height: -1, Width: -1, Channels: -1, DType: savedmodel.Uint8},
		"two channels":    {Data: make([]byte, 8), Height: 2, Width: 2, Channels: 2, DType: savedmodel.Uint8},
		"another type":    {Data: make([]byte, 16), Height: 2, Width: 2, Channels: 1, DType: savedmodel.Int32},
		"no type":         {Data: make([]byte, 4), Height: 2, Width: 2, Channels: 1},
		"too many pixels": {Data: make([]byte, 4), Height: math.MaxInt32, Width: math.MaxInt32, Channels: 1,
			DType: savedmodel.Uint8},
		"bytes as uint8": {Data: make([]byte, 12), Height: 2, Width: 2, Channels: 3, DType: savedmodel.Float32},
		"pixels over 2^63": {Data: make([]byte, 4), Height: math.MaxInt64, Width: math.MaxInt64, Channels: 4,
			DType: savedmodel.Float32},
	} {
		if err := g.Run(t.Context(), p, make([]byte, square.Bytes())); !isInvalid(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
		if _, err := d.Run(t.Context(), p, 0, 0); !isInvalid(err) {
			t.Errorf("%s: the decoder: %v, want InvalidArgument", name, err)
		}
		if bytes := d.Bytes(p, 0, 0); bytes != 0 {
			t.Errorf("%s: %d bytes", name, bytes)
		}
	}
}

// TestDecoderBytes compares Decoder.Bytes with what Run makes.
func TestDecoderBytes(t *testing.T) {
	grey := tensor.Picture{Data: make([]byte, 4*30), Height: 5, Width: 6, Channels: 1, DType: savedmodel.Float32}
	for _, c := range []struct {
		spec    Spec
		picture tensor.Picture
	}{
		{Spec{}, picture(t, "chelsea.png")}, {Spec{}, picture(t, "made_alpha.png")},
		{Spec{}, picture(t, "made_palette.png")}, {Spec{}, picture(t, "made_palette_alpha.png")},
		{Spec{}, picture(t, "made_cmyk.jpg")}, {Spec{}, picture(t, "made_grey.jpg")},
		{Spec{}, picture(t, "made_turned_6.jpg")}, {Spec{}, picture(t, "made_palette.bmp")},
		{Spec{}, grey},
		{Spec{Channels: "BGR"}, picture(t, "made_grey.jpg")},
		{Spec{Channels: "L"}, picture(t, "made_420.jpg")},
		{Spec{Height: 3, Width: 4, Resize: "area", Fit: "pad"}, grey},
	} {
		d := newDecoder(t, c.spec, NewBudget(limits))
		made, err := d.Run(t.Context(), c.picture, c.spec.Height, c.spec.Width)
		if got := d.Bytes(c.picture, c.spec.Height, c.spec.Width); err != nil || got != int64(len(made.Data)) ||
			got == 0 {
			t.Errorf("%+v: Bytes says %d, Run makes %d: %v", c.spec, got, len(made.Data), err)
		}
		if room := cap(made.Data) - len(made.Data); room < 16 {
			t.Errorf("%+v: room for %d bytes", c.spec, room)
		}
	}
}

// TestWholeNumbers rounds and saturates what only an image struct of floats holds.
func TestWholeNumbers(t *testing.T) {
	var data []byte
	floats := []float64{-5, 300, 2.5, 3.5, 3e9, -3e9, math.Inf(1), math.Inf(-1)}
	for _, v := range floats {
		data = binary.NativeEndian.AppendUint32(data, math.Float32bits(float32(v)))
	}
	p := tensor.Picture{Data: data, Height: 1, Width: len(floats), Channels: 1, DType: savedmodel.Float32}
	for dt, want := range map[savedmodel.DType][]float64{
		savedmodel.Uint8: {0, 255, 2, 4, 255, 0, 255, 0},
		savedmodel.Int32: {-5, 300, 2, 4, math.MaxInt32, math.MinInt32, math.MaxInt32, math.MinInt32},
	} {
		s := Spec{Height: 1, Width: len(floats), Resize: "nearest", Fit: "stretch", Channels: "L",
			Scale: [3]float32{1, 1, 1}, DType: dt}
		g := newGraph(t, s, NewBudget(limits))
		got := make([]byte, s.Bytes())
		if err := g.Run(t.Context(), p, got); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(values(got, dt), want) {
			t.Errorf("%v: %v, want %v", dt, values(got, dt), want)
		}
	}
}

// TestDecoderSizes refuses sizes that a decoder cannot make.
func TestDecoderSizes(t *testing.T) {
	d, own := newDecoder(t, Spec{Resize: "area", Fit: "pad"}, NewBudget(limits)),
		newDecoder(t, Spec{}, NewBudget(limits))
	p := picture(t, "made_3x2.png")
	for _, size := range [][2]int{{-1, 2}, {2, 0}, {0, 2}, {maxSide + 1, 1}, {maxSide, maxSide},
		{math.MaxInt, math.MaxInt}} {
		if _, err := d.Run(t.Context(), p, size[0], size[1]); !isInvalid(err) {
			t.Errorf("%v: %v, want InvalidArgument", size, err)
		}
		if bytes := d.Bytes(p, size[0], size[1]); bytes != 0 {
			t.Errorf("%v: %d bytes", size, bytes)
		}
	}
	if _, err := own.Run(t.Context(), p, 2, 3); err == nil {
		t.Error("a decoder without resize made another size")
	}
}

// TestPNGText decodes a PNG of text that inflates to 1.2 GB as fast as one without.
func TestPNGText(t *testing.T) {
	var text bytes.Buffer
	text.WriteString("text\x00\x00")
	w := zlib.NewWriter(&text)
	for range 8 {
		if _, err := w.Write(make([]byte, 1_000_000)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	chunk := binary.BigEndian.AppendUint32(nil, uint32(text.Len()))
	chunk = append(append(chunk, "zTXt"...), text.Bytes()...)
	chunk = binary.BigEndian.AppendUint32(chunk, crc32.ChecksumIEEE(chunk[4:]))
	plain := read(t, "made_interlaced.png")
	end := len(plain) - 12 // IEND
	bomb := slices.Concat(plain[:33], bytes.Repeat(chunk, 75), plain[33:end], bytes.Repeat(chunk, 75), plain[end:])

	if kept := onlyPixels(bomb); !bytes.Equal(kept, plain) {
		t.Errorf("%d bytes are kept of a PNG that has %d", len(kept), len(plain))
	}
	if kept := onlyPixels(plain); &kept[0] != &plain[0] {
		t.Error("a PNG of nothing else was copied")
	}
	d := newDecoder(t, Spec{}, NewBudget(limits))
	want, err := d.Run(t.Context(), tensor.Picture{Data: plain}, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	fuzztest.Bounded(t, 64<<20, func() {
		got, err := d.Run(t.Context(), tensor.Picture{Data: bomb}, 0, 0)
		if err != nil || !bytes.Equal(got.Data, want.Data) {
			t.Errorf("with text: %d bytes, %v", len(got.Data), err)
		}
	})
	for cut := range len(bomb) / 5000 { // wherever it is cut off
		onlyPixels(bomb[:8+cut*5000])
	}
}

// TestScans counts those of the picture, and none in a comment or behind its end.
func TestScans(t *testing.T) {
	for name, want := range map[string]int{"made_444.jpg": 1, "made_restarts.jpg": 1, "made_progressive.jpg": 10} {
		picture := read(t, name)
		comment := append([]byte("\xff\xd8\xff\xfe\x00\x22"), bytes.Repeat([]byte("\xff\xda"), 16)...)
		moving := slices.Concat(comment, picture[2:], bytes.Repeat([]byte("\xff\xda\x00\x02"), 1000))
		h, ok := readHeader(moving)
		if !ok || h.scans != want || (h.coefficients > 0) != (want > 1) {
			t.Errorf("%s: %+v, want %d scans", name, h, want)
		}
	}
}

// TestWorking refuses what a single picture would need, and no ordinary large one.
func TestWorking(t *testing.T) {
	thin := tensor.Picture{Data: make([]byte, 100_000*2), Height: 2, Width: 100_000, Channels: 1,
		DType: savedmodel.Uint8}
	antialias := square
	antialias.Height, antialias.Width, antialias.Fit, antialias.Antialias = 2000, 1, "stretch", true
	g := newGraph(t, antialias, NewBudget(limits))
	err := g.Run(t.Context(), thin, make([]byte, antialias.Bytes()))
	if !isInvalid(err) || !strings.Contains(err.Error(), "MiB of memory; the maximum is 2048") {
		t.Errorf("got %v", err)
	}
	for _, h := range []header{
		{format: "JPEG", width: 13_000, height: 13_000, channels: 3, orientation: 6},
		{format: "JPEG", width: 10_000, height: 10_000, channels: 3, orientation: 6, coefficients: 3},
		{format: "PNG", width: 13_000, height: 13_000, channels: 4, orientation: 1},
		{format: "BMP", width: 12_000, height: 12_000, channels: 3, orientation: 1},
	} {
		for _, s := range []Spec{square, {}} {
			if needs := s.working(h, tensor.Picture{Data: make([]byte, 1000)}); needs > maxWorking {
				t.Errorf("%v to %dx%d needs %d MiB", h, s.Width, s.Height, needs>>20)
			}
		}
	}
}

// TestExplain makes one line of what TensorFlow says, whatever its code, but for the
// end of a session.
func TestExplain(t *testing.T) {
	h := header{format: "PNG", width: 3, height: 2}
	for _, code := range []tensorflow.Code{tensorflow.InvalidArgument, tensorflow.ResourceExhausted,
		tensorflow.Internal} {
		err := explain(h, &tensorflow.Error{Code: code,
			Message: "{{function_node __wrapped__Resize}} OOM when allocating [[{{node Root/Resize}}]]\n\t more"})
		if !isInvalid(err) ||
			err.(*tensorflow.Error).Message != "a PNG picture of 3x2 cannot be decoded: OOM when allocating" {
			t.Errorf("%v: %v", code, err)
		}
	}
	for _, err := range []error{context.Canceled, &tensorflow.Error{Code: tensorflow.Cancelled},
		&tensorflow.Error{Code: tensorflow.FailedPrecondition}} {
		if explain(h, err) != err {
			t.Errorf("%v became %v", err, explain(h, err))
		}
	}
}

// TestBytesLimit refuses a file for its length, whatever it is.
func TestBytesLimit(t *testing.T) {
	rocket := picture(t, "rocket.jpg")
	few := Limits{Pixels: limits.Pixels, Bytes: int64(len(rocket.Data)) - 1, Working: 1 << 30}
	err := newGraph(t, square, NewBudget(few)).Run(t.Context(), rocket, make([]byte, square.Bytes()))
	if !isInvalid(err) || !strings.Contains(err.Error(), "the maximum is") {
		t.Errorf("got %v", err)
	}
}

// TestBudget holds as much as a large picture needs: another large one waits until
// its context ends, or until that is given back; a small one does not wait.
func TestBudget(t *testing.T) {
	budget := NewBudget(limits)
	g := newGraph(t, square, budget)
	large, small := picture(t, "made_progressive.jpg"), picture(t, "made_3x2.png")
	h, err := check(g.spec, large, limits)
	if err != nil {
		t.Fatal(err)
	}
	needs := g.spec.working(h, large)
	tight := limits
	tight.Working = 2*needs - 1
	*budget = *NewBudget(tight)

	held, err := budget.acquire(t.Context(), needs)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	dst := make([]byte, square.Bytes())
	if err := g.Run(short, large, dst); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside another large one: %v", err)
	}
	if bytes.ContainsFunc(dst, func(r rune) bool { return r != 0 }) {
		t.Error("dst was written to")
	}
	// Working is less than what this one needs besides, too, if small ones need much.
	if h, _ := check(g.spec, small, limits); g.spec.working(h, small) > needs-1 {
		t.Fatal("the small picture is not small")
	}
	if err := g.Run(t.Context(), small, dst); err != nil {
		t.Errorf("a small one: %v", err)
	}
	waiting := make(chan error)
	go func() { waiting <- g.Run(t.Context(), large, dst) }()
	held()
	if err := <-waiting; err != nil {
		t.Errorf("after the large one: %v", err)
	}

	// What is larger than all of the budget takes all of it, and gives it back.
	tight.Working = 1000
	*budget = *NewBudget(tight)
	for range 2 {
		if err := g.Run(t.Context(), large, dst); err != nil {
			t.Errorf("larger than the budget: %v", err)
		}
	}
	if !budget.working.TryAcquire(1000) {
		t.Error("the budget was not given back")
	}
}

// TestOrientation reads EXIF that is broken in many ways, all of which mean 1.
func TestOrientation(t *testing.T) {
	const little = "Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00"
	for _, c := range []struct {
		name, exif string
		want       int
	}{
		{"little-endian", little + "\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00", 6},
		{"big-endian", "Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x08\x00\x00",
			8},
		{"no EXIF", "http://ns.adobe.com/xap/1.0/\x00", 0},
		{"empty", "", 0},
		{"signature only", "Exif\x00\x00", 1},
		{"no byte order", "Exif\x00\x00XX*\x00\x08\x00\x00\x00\x01\x00", 1},
		{"no directory", "Exif\x00\x00II*\x00\x08\x00", 1},
		{"directory beyond the end", "Exif\x00\x00II*\x00\xff\xff\xff\xff\x01\x00", 1},
		{"directory of no entry", little, 1},
		{"half an entry", little + "\x12\x01\x03\x00\x01", 1},
		{"another tag", little + "\x13\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00", 1},
		{"another type", little + "\x12\x01\x02\x00\x01\x00\x00\x00\x06\x00\x00\x00", 1},
		{"orientation 0", little + "\x12\x01\x03\x00\x01\x00\x00\x00\x00\x00\x00\x00", 1},
		{"orientation 9", little + "\x12\x01\x03\x00\x01\x00\x00\x00\x09\x00\x00\x00", 1},
		{"65535 entries", "Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + strings.Repeat("\x00", 100), 1},
	} {
		segment := binary.BigEndian.AppendUint16(nil, uint16(2+len(c.exif)))
		segment = append(segment, c.exif...)
		if got := readOrientation(segment); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
		// In front of a good picture it is no reason to refuse it.
		rocket := read(t, "rocket.jpg")
		h, ok := readHeader(slices.Concat(rocket[:2], []byte("\xff\xe1"), segment, rocket[2:]))
		if !ok || h.orientation != max(c.want, 1) || h.width != 640 {
			t.Errorf("%s: %+v", c.name, h)
		}
	}
}

// TestGeometry checks for many sizes that boxes lie within pictures and tensors.
func TestGeometry(t *testing.T) {
	sides := []int{1, 2, 3, 7, 61, 224, 299, 300, 451, 640, 65_535}
	for _, fit := range []string{"crop", "stretch", "pad"} {
		for _, height := range sides {
			for _, width := range sides {
				for _, h := range sides {
					for _, w := range sides {
						g := Spec{Height: h, Width: w, Fit: fit}.geometry(height, width)
						if g.y < 0 || g.x < 0 || g.height < 1 || g.width < 1 || g.y+g.height > height ||
							g.x+g.width > width {
							t.Fatalf("%s %dx%d to %dx%d: a box of %+v", fit, width, height, w, h, g)
						}
						if g.top < 0 || g.left < 0 || g.rows < 1 || g.columns < 1 || g.top+g.rows > h ||
							g.left+g.columns > w {
							t.Fatalf("%s %dx%d to %dx%d: resized to %+v", fit, width, height, w, h, g)
						}
						if fit != "pad" && (g.rows != h || g.columns != w) ||
							fit != "crop" && (g.height != height || g.width != width) {
							t.Fatalf("%s %dx%d to %dx%d: %+v", fit, width, height, w, h, g)
						}
						if fit == "pad" && g.rows < h-1 && g.columns < w-1 {
							t.Fatalf("%dx%d to %dx%d: neither side is filled: %+v", width, height, w, h, g)
						}
					}
				}
			}
		}
	}
}

func TestBadSpecs(t *testing.T) {
	with := func(change func(*Spec)) Spec {
		s := square
		change(&s)
		return s
	}
	for _, s := range []Spec{
		{},
		with(func(s *Spec) { s.Height, s.Width = 0, 0 }),
		with(func(s *Spec) { s.Width = 0 }),
		with(func(s *Spec) { s.Height = -1 }),
		with(func(s *Spec) { s.Height, s.Width = math.MaxInt32, math.MaxInt32 }),
		with(func(s *Spec) { s.Height, s.Width = 1, maxSide+1 }),
		with(func(s *Spec) { s.Height, s.Width, s.DType = 9000, 9000, savedmodel.Float64 }), // 1.8 GiB
		with(func(s *Spec) { s.Resize = "lanczos3" }),
		with(func(s *Spec) { s.Resize = "" }),
		with(func(s *Spec) { s.Fit = "cover" }),
		with(func(s *Spec) { s.Channels = "RGBA" }),
		with(func(s *Spec) { s.Channels = "" }),
		with(func(s *Spec) { s.Resize, s.Antialias = "nearest", true }),
		with(func(s *Spec) { s.Resize, s.Antialias = "area", true }),
		with(func(s *Spec) { s.DType = savedmodel.Int64 }),
		with(func(s *Spec) { s.DType = 0 }),
	} {
		g, err := New(s, NewBudget(limits))
		if g != nil || !isInvalid(err) {
			t.Errorf("New(%+v): %v", s, err)
		}
		if s.Resize == square.Resize && s.Fit == square.Fit && !s.Antialias || s == (Spec{}) {
			continue // a decoder may have these
		}
		s.Channels = strings.Replace(s.Channels, "RGB", "BGR", 1)
		d, err := NewDecoder(s, NewBudget(limits))
		if d != nil || !isInvalid(err) {
			t.Errorf("NewDecoder(%+v): %v", s, err)
		}
	}
	if d, err := NewDecoder(square, NewBudget(limits)); d != nil || err == nil {
		t.Errorf("a decoder of RGB: %v", err)
	}
}

// TestConcurrent runs one Graph from several goroutines, good pictures among bad.
func TestConcurrent(t *testing.T) {
	g := newGraph(t, square, NewBudget(limits))
	pictures := []tensor.Picture{picture(t, "rocket.jpg"), picture(t, "chelsea.png"), {Data: []byte("neither")},
		picture(t, "camera.png"), picture(t, "made_film.gif"), picture(t, "made_palette.bmp"),
		picture(t, "made_turned_6.jpg")}
	want := make([][]byte, len(pictures))
	for i, p := range pictures {
		want[i] = make([]byte, 224*224*3*4)
		if err := g.Run(t.Context(), p, want[i]); (err != nil) != (i == 2) {
			t.Fatal(err)
		}
	}
	d := newDecoder(t, Spec{Resize: "area", Fit: "pad"}, g.budget)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			dst := make([]byte, 224*224*3*4)
			for i := range 25 {
				p := (worker + i) % len(pictures)
				if err := g.Run(t.Context(), pictures[p], dst); (err != nil) != (p == 2) {
					t.Errorf("picture %d: %v", p, err)
				}
				if p != 2 && !bytes.Equal(dst, want[p]) {
					t.Errorf("picture %d differs", p)
				}
				made, err := d.Run(t.Context(), pictures[p], 50, 60)
				if (err != nil) != (p == 2) || p != 2 && made.Height != 50 {
					t.Errorf("picture %d: %v", p, err)
				}
			}
		})
	}
	wg.Wait()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if err := g.Run(t.Context(), pictures[0], make([]byte, 224*224*3*4)); err == nil {
		t.Error("a closed graph ran")
	}
}

// FuzzHeader looks for bytes that make readHeader panic, loop, or disagree with
// other readers about a size.
func FuzzHeader(f *testing.F) {
	var asPNG, asJPEG, asGIF, asBMP bytes.Buffer
	picture := image.NewRGBA(image.Rect(0, 0, 9, 5))
	err := errors.Join(png.Encode(&asPNG, picture), jpeg.Encode(&asJPEG, picture, nil),
		gif.Encode(&asGIF, picture, nil), bmp.Encode(&asBMP, picture))
	if err != nil {
		f.Fatal(err)
	}
	for _, encoded := range []bytes.Buffer{asPNG, asJPEG, asGIF, asBMP} {
		f.Add(encoded.Bytes())
	}
	f.Add(pngOf(3, 4))
	f.Add(jpegOf(5, 6))
	exif := "\xff\xd8\xff\xe1\x00\x22Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00" +
		"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
	f.Add([]byte(exif + string(asJPEG.Bytes()[2:])))
	f.Fuzz(func(t *testing.T, encoded []byte) {
		fuzztest.Bounded(t, 64<<20, func() {
			h, ok := readHeader(encoded)
			if !ok {
				return
			}
			if h.width <= 0 || h.height <= 0 || h.orientation < 1 || h.orientation > 8 || h.scans < 0 || h.least < 0 {
				t.Fatalf("%+v", h)
			}
			decode := map[string]func(io.Reader) (image.Config, error){
				"PNG": png.DecodeConfig, "JPEG": jpeg.DecodeConfig, "GIF": gif.DecodeConfig, "BMP": bmp.DecodeConfig,
			}[h.format]
			config, err := decode(bytes.NewReader(encoded))
			if err == nil && (config.Width != h.width || config.Height != h.height) {
				t.Fatalf("%+v, another reader says %dx%d", h, config.Width, config.Height)
			}
		})
	})
}

// FuzzFrame looks for a GIF or BMP that makes paint panic or write beyond its canvas.
func FuzzFrame(f *testing.F) {
	var asGIF, asBMP bytes.Buffer
	picture := image.NewPaletted(image.Rect(0, 0, 9, 5), palette.Plan9)
	if err := errors.Join(gif.Encode(&asGIF, picture, nil), bmp.Encode(&asBMP, picture)); err != nil {
		f.Fatal(err)
	}
	f.Add(asGIF.Bytes())
	f.Add(asBMP.Bytes())
	f.Fuzz(func(t *testing.T, encoded []byte) {
		h, err := check(Spec{}, tensor.Picture{Data: encoded},
			Limits{Pixels: 1 << 16, Bytes: 1 << 20, Working: 1 << 20})
		if err != nil || h.format != "GIF" && h.format != "BMP" {
			return
		}
		fuzztest.Bounded(t, 64<<20, func() {
			decode := map[string]func(io.Reader) (image.Image, error){"GIF": gif.Decode, "BMP": bmp.Decode}[h.format]
			pixels, err := paint(h, decode, encoded)
			if err != nil {
				return
			}
			defer pixels.Close()
			if len(pixels.Bytes()) != h.height*h.width*3 {
				t.Fatalf("%v became %d bytes", h, len(pixels.Bytes()))
			}
		})
	})
}

func newGraph(t testing.TB, spec Spec, budget *Budget) *Graph {
	t.Helper()
	g, err := New(spec, budget)
	return closing(t, g, err)
}

func newDecoder(t testing.TB, spec Spec, budget *Budget) *Decoder {
	t.Helper()
	d, err := NewDecoder(spec, budget)
	return closing(t, d, err)
}

// closing closes what was made with the test.
func closing[T io.Closer](t testing.TB, made T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := made.Close(); err != nil {
			t.Error(err)
		}
	})
	return made
}

// isInvalid reports whether an error is one of a picture or a Spec.
func isInvalid(err error) bool {
	var e *tensorflow.Error
	return errors.As(err, &e) && e.Code == tensorflow.InvalidArgument
}

// picture reads a file of the oracle's as a picture.
func picture(t testing.TB, name string) tensor.Picture { return tensor.Picture{Data: read(t, name)} }

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

// values reads numbers in the machine's byte order; of half-precision types their
// bits, as whole numbers.
func values(raw []byte, dt savedmodel.DType) []float64 {
	v := make([]float64, len(raw)/dt.Size())
	for i := range v {
		at := raw[i*dt.Size():]
		switch dt {
		case savedmodel.Uint8:
			v[i] = float64(at[0])
		case savedmodel.Int32:
			v[i] = float64(int32(binary.NativeEndian.Uint32(at)))
		case savedmodel.Float32:
			v[i] = float64(math.Float32frombits(binary.NativeEndian.Uint32(at)))
		case savedmodel.Float64:
			v[i] = math.Float64frombits(binary.NativeEndian.Uint64(at))
		default:
			v[i] = float64(binary.NativeEndian.Uint16(at))
		}
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
