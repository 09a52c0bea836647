// Package preprocess turns the bytes of one encoded picture into the tensor that an
// image network takes: decode, crop, resize, normalise. What may enter is a way to
// describe and to run that one transformation. tfgo builds its graph and
// TensorFlow's own kernels run it, so that its numbers are those of
// tf.image.resize; internal/tensorflow runs it, so that its tensors are freed at
// once and its errors keep TensorFlow's code. Batches, columns and what to do with
// a bad row belong to the caller.
package preprocess

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	tf "github.com/galeone/tensorflow/tensorflow/go"
	"github.com/galeone/tensorflow/tensorflow/go/op"
	tg "github.com/galeone/tfgo"

	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

// maxPixels is the most pixels that a picture may have. It is where Pillow raises
// DecompressionBombError: twice its Image.MAX_IMAGE_PIXELS, which is a quarter of a
// gigabyte of 3-byte pixels.
const maxPixels = 2 * 89_478_485

// Spec says what the tensor should look like.
type Spec struct {
	// Height and Width of the tensor in pixels. The picture's largest centred box
	// of this aspect is resized to it, bilinearly, with half-pixel centres and
	// without antialias.
	Height, Width int
	// Scale and Offset make x*Scale+Offset of a channel's value x, which is 0 to
	// 255; in the order red, green, blue.
	Scale, Offset [3]float32
}

// Graph runs one Spec. Its methods may be called from several goroutines at once.
type Graph struct {
	spec         Spec
	session      *tensorflow.Session
	input, fetch string
}

// New builds the graph of a Spec and opens a session on it. A Spec without height
// or width, or with more than 178,956,970 pixels, is an *tensorflow.Error with
// InvalidArgument.
func New(spec Spec) (*Graph, error) {
	if spec.Height <= 0 || spec.Width <= 0 || spec.Width > maxPixels/spec.Height {
		return nil, invalid("a picture cannot be resized to %dx%d; each side must be at least 1, and %d pixels are the most",
			spec.Width, spec.Height, maxPixels)
	}
	root := tg.NewRoot()
	input, output := build(root, spec)
	graph, err := root.Finalize()
	if err != nil {
		return nil, fmt.Errorf("build the image graph: %w", err)
	}
	var def bytes.Buffer
	if _, err := graph.WriteTo(&def); err != nil {
		return nil, fmt.Errorf("serialise the image graph: %w", err)
	}
	// Rows run in parallel, each in the thread of its caller.
	session, err := tensorflow.FromGraphDef(def.Bytes(), tensorflow.Options{IntraOpThreads: 1, InterOpThreads: -1})
	if err != nil {
		return nil, err
	}
	return &Graph{spec: spec, session: session, input: input.Op.Name() + ":0", fetch: output.Op.Name() + ":0"}, nil
}

// build adds the graph to root: from the encoded bytes, a scalar string, to float32
// [1, height, width, 3].
func build(root *op.Scope, spec Spec) (input, output tf.Output) {
	scope := func() *op.Scope { return tg.NewScope(root) } // each operation needs a name of its own
	pair := func(h, w int) tf.Output { return tg.Const(root, []int64{int64(h), int64(w)}) }
	axis, zero := tg.Const(root, int32(0)), tg.Const(root, []int64{0})

	input = op.Placeholder(scope(), tf.String, op.PlaceholderShape(tf.ScalarShape()))
	picture := op.DecodeImage(scope(), input, op.DecodeImageChannels(3), op.DecodeImageExpandAnimations(false))

	// Pairs of height and width: the picture's size, the largest box of the aspect
	// that fits in it, and where the box begins.
	size := op.Slice(scope(), op.Shape(scope(), picture, op.ShapeOutType(tf.Int64)), zero, tg.Const(root, []int64{2}))
	ofOtherSide := op.FloorDiv(scope(),
		op.Mul(scope(), op.ReverseV2(scope(), size, zero), pair(spec.Height, spec.Width)),
		pair(spec.Width, spec.Height))
	box := op.Maximum(scope(), op.Minimum(scope(), size, ofOtherSide), pair(1, 1))
	begin := op.FloorDiv(scope(), op.Sub(scope(), size, box), pair(2, 2))

	cropped := op.Slice(scope(), picture,
		op.ConcatV2(scope(), []tf.Output{begin, zero}, axis),
		op.ConcatV2(scope(), []tf.Output{box, tg.Const(root, []int64{3})}, axis))
	resized := op.ResizeBilinear(scope(), op.ExpandDims(scope(), cropped, axis),
		tg.Const(root, []int32{int32(spec.Height), int32(spec.Width)}), op.ResizeBilinearHalfPixelCenters(true))
	normalised := tg.NewTensor(root, resized).Mul(tg.Const(root, spec.Scale[:])).Add(tg.Const(root, spec.Offset[:]))
	return input, normalised.Output
}

// Run decodes one JPEG or PNG and writes the tensor to dst, which must have
// Height*Width*3*4 bytes: float32 in the machine's byte order, rows from the top,
// red, green, blue. Grey becomes RGB, alpha is dropped, orientation tags are not
// looked at. encoded is copied and dst is not kept; both may lie on the Go heap.
//
// A picture that cannot be decoded, or has more than 178,956,970 pixels, is an
// *tensorflow.Error with InvalidArgument, whose message holds nothing of the
// picture but format and size; dst is then left as it was.
func (g *Graph) Run(encoded []byte, dst []byte) error {
	if want := g.spec.Height * g.spec.Width * 3 * 4; len(dst) != want {
		return fmt.Errorf("a picture of %dx%d needs %d bytes of the batch, got %d", g.spec.Width, g.spec.Height, want, len(dst))
	}
	header, ok := readHeader(encoded)
	if !ok {
		return invalid("%d bytes that are neither a JPEG nor a PNG picture", len(encoded))
	}
	if header.width > maxPixels/header.height {
		return invalid("%v has more than %d pixels", header, maxPixels)
	}
	in, err := tensorflow.NewStrings(nil, 1, func(int) []byte { return encoded })
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := g.session.Run(0, []tensorflow.Feed{{Name: g.input, Tensor: in}}, []string{g.fetch})
	if err != nil {
		return explain(header, err)
	}
	defer out[0].Close()
	if got := out[0].Bytes(); out[0].DType() != savedmodel.Float32 || len(got) != len(dst) {
		return fmt.Errorf("the image graph made a %v tensor of shape %v", out[0].DType(), out[0].Shape())
	}
	copy(dst, out[0].Bytes())
	return nil
}

// Close waits for the runs under way and frees the session.
func (g *Graph) Close() error { return g.session.Close() }

// explain says which picture TensorFlow could not decode, and keeps of its message
// what is not about the graph.
func explain(h header, err error) error {
	var e *tensorflow.Error
	if !errors.As(err, &e) || e.Code != tensorflow.InvalidArgument {
		return err
	}
	reason, _, _ := strings.Cut(e.Message, "\n")
	return invalid("%v cannot be decoded: %s", h, reason)
}

func invalid(format string, args ...any) error {
	return &tensorflow.Error{Code: tensorflow.InvalidArgument, Message: fmt.Sprintf(format, args...)}
}
