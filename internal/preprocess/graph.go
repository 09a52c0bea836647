// The TensorFlow graph that turns pixels into a tensor.

package preprocess

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	tf "github.com/galeone/tensorflow/tensorflow/go"
	"github.com/galeone/tensorflow/tensorflow/go/op"
	tg "github.com/galeone/tfgo"

	"flightsvc/internal/savedmodel"
)

// source is a kind of pixels: the channels and element type of a tensor [height, width, channels].
type source struct {
	// order names the channels: L is grey, A alpha. Decoded files have "L", "LA", "RGB" or "RGBA", image structs "L",
	// "BGR" or "BGRA".
	order string
	dtype savedmodel.DType // Uint8 or Float32
}

// sources are all kinds of pixels that pictures have.
var sources = []source{
	{"L", savedmodel.Uint8}, {"LA", savedmodel.Uint8}, {"RGB", savedmodel.Uint8}, {"RGBA", savedmodel.Uint8},
	{"BGR", savedmodel.Uint8}, {"BGRA", savedmodel.Uint8},
	{"L", savedmodel.Float32}, {"BGR", savedmodel.Float32}, {"BGRA", savedmodel.Float32},
}

// luma is the share of each channel in grey, by ITU-R BT.601.
var luma = map[byte]float32{'R': 0.299, 'G': 0.587, 'B': 0.114}

// head names the tensors for one kind of pixels: pixels is fed; resized is the result in the Spec's size, "" if the
// Spec does not say how to resize; own is the result in the picture's size, which only a Decoder needs.
type head struct{ pixels, resized, own string }

// graph is what TensorFlow runs for a Spec: one part from a file to pixels, and a head for each kind of pixels, to the
// results [1, height, width, channels].
type graph struct {
	def                    []byte
	file, decoded          string
	heads                  map[source]head
	begin, box, size, pads string // geometry, fed as int32: [3], [3], [2], [4, 2]
}

// builder adds operations to a graph; each needs a scope, and so a name, of its own.
type builder struct {
	root                   *op.Scope
	spec                   Spec
	begin, box, size, pads tf.Output
}

func (b *builder) scope() *op.Scope { return tg.NewScope(b.root) }

func (b *builder) placeholder(dt tf.DataType, shape tf.Shape) tf.Output {
	return op.Placeholder(b.scope(), dt, op.PlaceholderShape(shape))
}

// name returns the name of an operation's output, as feeds and fetches spell it.
func name(o tf.Output) string { return o.Op.Name() + ":0" }

// buildGraph builds the graph of a Spec that newConverter has checked.
func buildGraph(spec Spec) (*graph, error) {
	b := &builder{root: tg.NewRoot(), spec: spec}
	b.begin = b.placeholder(tf.Int32, tf.MakeShape(3))
	b.box = b.placeholder(tf.Int32, tf.MakeShape(3))
	b.size = b.placeholder(tf.Int32, tf.MakeShape(2))
	b.pads = b.placeholder(tf.Int32, tf.MakeShape(4, 2))

	// 0 keeps the channels of the file.
	channels := int64(3)
	if spec.Channels == "" {
		channels = 0
	}
	file := b.placeholder(tf.String, tf.ScalarShape())
	decoded := op.DecodeImage(b.scope(), file, op.DecodeImageChannels(channels), op.DecodeImageExpandAnimations(false))

	g := &graph{
		file: name(file), decoded: name(decoded), heads: map[source]head{},
		begin: name(b.begin), box: name(b.box), size: name(b.size), pads: name(b.pads),
	}
	for _, s := range sources {
		pixels := b.placeholder(tf.DataType(s.dtype), tf.MakeShape(-1, -1, int64(len(s.order))))
		head := head{pixels: name(pixels)}
		if spec.Resize != "" {
			head.resized = name(op.Identity(b.scope(), b.convert(pixels, s, true)))
		}
		if spec.DType == 0 {
			head.own = name(op.Identity(b.scope(), b.convert(pixels, s, false)))
		}
		if err := b.root.Err(); err != nil {
			return nil, fmt.Errorf("build the image graph: %w", err)
		}
		g.heads[s] = head
	}
	built, err := b.root.Finalize()
	if err != nil {
		return nil, fmt.Errorf("build the image graph: %w", err)
	}
	var def bytes.Buffer
	if _, err := built.WriteTo(&def); err != nil {
		return nil, fmt.Errorf("serialise the image graph: %w", err)
	}
	g.def = def.Bytes()
	return g, nil
}

// convert adds the steps of a Spec that follow decoding and orientation.
func (b *builder) convert(x tf.Output, s source, resize bool) tf.Output {
	if resize {
		x = op.Slice(b.scope(), x, b.begin, b.box)
	}
	x = op.ExpandDims(b.scope(), x, tg.Const(b.root, int32(0)))
	if resize {
		x = b.resize(x)
	}
	if resize && b.spec.Fit == "pad" {
		x = op.Pad(b.scope(), x, b.pads)
	}
	x = b.channels(x, s.order)
	if b.spec.affine() {
		// The constants are as long as a row of the result: with one value for each channel TensorFlow would multiply
		// three values at a time, which is slow.
		n := 3
		if b.spec.Channels == "L" {
			n = 1
		}
		row := func(channels [3]float32) tf.Output {
			return tg.Const(b.root, slices.Repeat(channels[:n], b.spec.Width))
		}
		rows := func(columns ...int32) tf.Output {
			return tg.Const(b.root, append([]int32{1, int32(b.spec.Height)}, columns...))
		}
		x = op.Reshape(b.scope(), b.cast(x, tf.Float), rows(int32(b.spec.Width*n)))
		x = op.Add(b.scope(), op.Mul(b.scope(), x, row(b.spec.Scale)), row(b.spec.Offset))
		x = op.Reshape(b.scope(), x, rows(int32(b.spec.Width), int32(n)))
	}
	if b.spec.DType == 0 {
		return b.cast(x, tf.DataType(s.dtype))
	}
	return b.cast(x, tf.DataType(b.spec.DType))
}

// resize adds the operations of tf.image.resize.
func (b *builder) resize(x tf.Output) tf.Output {
	switch {
	case b.spec.Antialias:
		kernel := map[string]string{"bilinear": "triangle", "bicubic": "keyscubic"}[b.spec.Resize]
		sides := op.Slice(b.scope(), b.box, tg.Const(b.root, []int32{0}), tg.Const(b.root, []int32{2}))
		scale := op.RealDiv(b.scope(), b.cast(b.size, tf.Float), b.cast(sides, tf.Float))
		return b.scope().AddOperation(tf.OpSpec{
			Type:  "ScaleAndTranslate",
			Input: []tf.Input{x, b.size, scale, tg.Const(b.root, []float32{0, 0})},
			Attrs: map[string]any{"kernel_type": kernel, "antialias": true},
		}).Output(0)
	case b.spec.Resize == "nearest":
		return op.ResizeNearestNeighbor(b.scope(), x, b.size, op.ResizeNearestNeighborHalfPixelCenters(true))
	case b.spec.Resize == "bicubic":
		return op.ResizeBicubic(b.scope(), x, b.size, op.ResizeBicubicHalfPixelCenters(true))
	case b.spec.Resize == "area":
		return op.ResizeArea(b.scope(), x, b.size)
	default:
		return op.ResizeBilinear(b.scope(), x, b.size, op.ResizeBilinearHalfPixelCenters(true))
	}
}

// channels brings the last dimension of x from the order of the source to that of
// the Spec.
func (b *builder) channels(x tf.Output, from string) tf.Output {
	to := b.spec.Channels
	if to == "" {
		to = map[string]string{"L": "L", "LA": "BGRA", "RGB": "BGR", "RGBA": "BGRA", "BGR": "BGR", "BGRA": "BGRA"}[from]
	}
	last := tg.Const(b.root, int32(-1))
	if to == "L" && from != "L" && from != "LA" {
		weights := make([]float32, len(from))
		for i := range weights {
			weights[i] = luma[from[i]]
		}
		weighted := op.Mul(b.scope(), b.cast(x, tf.Float), tg.Const(b.root, weights))
		return op.Sum(b.scope(), weighted, last, op.SumKeepDims(true))
	}
	if from == to {
		return x
	}
	if len(from) == 3 && len(to) == 3 {
		return op.ReverseV2(b.scope(), x, tg.Const(b.root, []int32{-1})) // faster than GatherV2
	}
	index := make([]int32, len(to))
	for i := range index {
		index[i] = int32(max(strings.IndexByte(from, to[i]), 0)) // a grey picture's only channel stands for each colour
	}
	return op.GatherV2(b.scope(), x, tg.Const(b.root, index), last)
}

// cast adds a cast to another element type. For whole numbers it rounds, halves to even, and saturates.
func (b *builder) cast(x tf.Output, to tf.DataType) tf.Output {
	from := x.DataType()
	if from == to {
		return x
	}
	switch {
	case from == tf.Float && to == tf.Uint8:
		x = op.ClipByValue(b.scope(), op.Round(b.scope(), x), tg.Const(b.root, float32(0)),
			tg.Const(b.root, float32(255)))
	case from == tf.Float && to == tf.Int32:
		wide := op.Cast(b.scope(), op.Round(b.scope(), x), tf.Double) // float32 has no 2^31-1
		x = op.ClipByValue(b.scope(), wide, tg.Const(b.root, float64(-1<<31)), tg.Const(b.root, float64(1<<31-1)))
	}
	return op.Cast(b.scope(), x, to)
}
