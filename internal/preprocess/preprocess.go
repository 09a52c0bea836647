// Package preprocess turns one picture into the tensor that an image network takes, or into another picture. What may
// enter is a way to describe and to run that one transformation; batches, columns and what to do with a bad row belong
// to the caller. TensorFlow's own kernels run it, so that its numbers are those of tf.image: tfgo builds the graph, and
// internal/tensorflow runs it, because it frees tensors at once and keeps the codes of TensorFlow's errors.
//
// The steps, in order: check limits by the header; decode to uint8; orient by EXIF; crop; resize with half-pixel
// centres; pad; order channels; scale and offset; cast. TensorFlow decodes JPEG and PNG, Go decodes BMP and the first
// frame of a GIF. An image struct has its pixels already.
package preprocess

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// Limits that no setting raises.
const (
	// maxScans is the most scans of a JPEG, maxScanned the most pixels of all scans together if there are several.
	// Encoders write about ten. However few bytes a scan has, decoding passes over the whole picture for it: 2^30
	// pixels take about two seconds.
	maxScans   = 100
	maxScanned = 1 << 30
	// maxSide is the most pixels of a side of a picture or of a result: twice what a JPEG can have. TensorFlow's
	// kernels have limits of their own above it.
	maxSide = 1 << 17
	// maxWorking is the most bytes that a single picture may take while it is worked on. The Budget does not bound
	// a single picture: acquire lets one that is larger than the whole budget run alone.
	maxWorking = 2 << 30
)

// Spec describes the result. It can be the key of a map.
type Spec struct {
	Height, Width int    // of the result in pixels
	Resize        string // "bilinear", "nearest", "bicubic" or "area", as in tf.image.resize
	Antialias     bool   // only bilinear and bicubic
	// Fit says what is resized. "crop": the picture's largest centred box with the result's aspect ratio; "stretch":
	// the whole picture; "pad": the whole picture, which keeps its aspect ratio and gets black borders, as in
	// tf.image.resize_with_pad.
	Fit string
	// Channels is "RGB", "BGR" or "L". In RGB and BGR all channels of a grey picture are equal. L is
	// 0.299 R + 0.587 G + 0.114 B of the resized values. Alpha is dropped.
	Channels string
	// Scale and Offset turn a channel's value x, which is 0 to 255 for pictures of uint8, into x*Scale+Offset. They
	// are in the order of Channels; for L the first counts.
	Scale, Offset [3]float32
	// DType is Float32, Float64, Float16, Bfloat16, Uint8 or Int32. For whole numbers values are rounded, halves to
	// even, and saturate; NaN becomes any number.
	DType savedmodel.DType
}

// Bytes returns the bytes of one row's tensor, [Height, Width, channels].
func (s Spec) Bytes() int64 {
	channels := int64(3)
	if s.Channels == "L" {
		channels = 1
	}
	return int64(s.Height) * int64(s.Width) * channels * int64(s.DType.Size())
}

// affine reports whether Scale and Offset change anything.
func (s Spec) affine() bool {
	return s.Scale != [3]float32{1, 1, 1} || s.Offset != [3]float32{}
}

// Graph makes tensors of pictures as one Spec says. It is safe for concurrent use.
type Graph struct{ converter }

// New builds the graph of a Spec and opens a session on it. It returns a *tensorflow.Error with InvalidArgument for a
// Spec with an unknown value, without height or width, with more pixels than the budget's limit, or with more Bytes
// than tensor.MaxTensorBytes.
func New(spec Spec, budget *Budget) (*Graph, error) {
	dtypes := []savedmodel.DType{savedmodel.Float32, savedmodel.Float64, savedmodel.Float16,
		savedmodel.Bfloat16, savedmodel.Uint8, savedmodel.Int32}
	if !slices.Contains(dtypes, spec.DType) {
		return nil, invalid("a picture cannot become a tensor of %v", spec.DType)
	}
	if !slices.Contains([]string{"RGB", "BGR", "L"}, spec.Channels) {
		return nil, invalid("a picture cannot become a tensor of channels %q; they are RGB, BGR or L", spec.Channels)
	}
	if err := checkSize(spec.Height, spec.Width, budget.limits); err != nil {
		return nil, err
	}
	if spec.Bytes() > tensor.MaxTensorBytes {
		return nil, invalid("a picture of %dx%d becomes a tensor of %d MiB; the maximum is %d, give a smaller size",
			spec.Width, spec.Height, spec.Bytes()>>20, tensor.MaxTensorBytes>>20)
	}
	c, err := newConverter(spec, budget)
	if err != nil {
		return nil, err
	}
	return &Graph{*c}, nil
}

// Run writes the tensor of a picture to dst, which must have Spec.Bytes() bytes: in the machine's byte order, rows from
// the top, the channels of a pixel together. The picture is copied and dst is not kept; both may lie on the Go heap. An
// error leaves dst as it was.
//
// Run waits while other pictures use the budget. If ctx ends first, the error is ctx's. A picture that cannot be
// decoded, whose numbers do not agree, that is over a limit, or for which there is no memory is a *tensorflow.Error
// with InvalidArgument; its message is one line and tells nothing about the picture but format and size.
func (g *Graph) Run(ctx context.Context, p tensor.Picture, dst []byte) error {
	if want := g.spec.Bytes(); int64(len(dst)) != want {
		return fmt.Errorf("a picture of %dx%d needs %d bytes of the batch, got %d",
			g.spec.Width, g.spec.Height, want, len(dst))
	}
	return g.run(ctx, g.spec, p, func(result *tensorflow.Tensor) error {
		if got := result.Bytes(); result.DType() != g.spec.DType || len(got) != len(dst) {
			return fmt.Errorf("the image graph made a %v tensor of shape %v", result.DType(), result.Shape())
		}
		copy(dst, result.Bytes())
		return nil
	})
}

// Decoder makes pictures of any size of pictures, as one Spec says. It is safe for concurrent use.
type Decoder struct{ converter }

// NewDecoder builds the graph of a Spec and opens a session on it. Without Resize, Antialias and Fit pictures can only
// keep their size. Channels is "BGR", "L", or "" for the picture's own: grey, or blue, green, red, and alpha if the
// picture has it. Height, Width, Scale, Offset and DType are ignored: Run is given the size, and pixels keep their
// element type. Errors are those of New.
func NewDecoder(spec Spec, budget *Budget) (*Decoder, error) {
	if !slices.Contains([]string{"", "BGR", "L"}, spec.Channels) {
		return nil, invalid("a picture cannot have channels %q; they are BGR, L or its own", spec.Channels)
	}
	spec.Height, spec.Width = 0, 0
	spec.Scale, spec.Offset, spec.DType = [3]float32{1, 1, 1}, [3]float32{}, 0
	c, err := newConverter(spec, budget)
	if err != nil {
		return nil, err
	}
	return &Decoder{*c}, nil
}

// Run returns the picture as height x width pixels, or in its own size if both are 0. The pixels lie in Go memory that
// the caller owns and to which 16 bytes can be appended without a copy. p is copied. Waiting and errors are those of
// Graph.Run. A size that New would refuse is InvalidArgument, too; a size for a decoder without Resize is another
// error.
//
// A BMP or GIF is always blue, green, red. A PNG with a transparent colour has alpha only if it has a palette.
func (d *Decoder) Run(ctx context.Context, p tensor.Picture, height, width int) (tensor.Picture, error) {
	var made tensor.Picture
	spec, err := d.sized(height, width)
	if err != nil {
		return made, err
	}
	err = d.run(ctx, spec, p, func(result *tensorflow.Tensor) error {
		shape, pixels := result.Shape(), result.Bytes() // [1, height, width, channels]
		made = tensor.Picture{
			Data:   append(make([]byte, 0, len(pixels)+16), pixels...),
			Height: int(shape[1]), Width: int(shape[2]), Channels: int(shape[3]), DType: result.DType(),
		}
		return nil
	})
	return made, err
}

// sized returns the Spec for one call.
func (d *Decoder) sized(height, width int) (Spec, error) {
	spec := d.spec
	if height == 0 && width == 0 {
		return spec, nil
	}
	if spec.Resize == "" {
		return spec, fmt.Errorf("a decoder without resize cannot make a picture of %dx%d", width, height)
	}
	spec.Height, spec.Width = height, width
	return spec, checkSize(height, width, d.budget.limits)
}

// Bytes returns the most bytes of pixels that Run can return for this picture and size, or 0 if Run refuses the size,
// or the picture by its header.
func (d *Decoder) Bytes(p tensor.Picture, height, width int) int64 {
	spec, err := d.sized(height, width)
	if err != nil {
		return 0
	}
	h, err := check(spec, p, d.budget.limits)
	if err != nil {
		return 0
	}
	channels := h.channels
	if height == 0 {
		height, width = h.height, h.width
	}
	if d.spec.Channels != "" {
		channels = len(d.spec.Channels)
	}
	return int64(height) * int64(width) * int64(channels) * int64(max(p.DType.Size(), 1))
}

// converter runs one Spec.
type converter struct {
	spec    Spec
	budget  *Budget
	graph   *graph
	session *tensorflow.Session
}

// checkSize refuses a size to which no picture can be resized.
func checkSize(height, width int, limits Limits) error {
	if min(height, width) < 1 || max(height, width) > maxSide || int64(width) > limits.Pixels/int64(height) {
		return invalid("a picture cannot be resized to %dx%d; a side has 1 to %d pixels, and the maximum is %d pixels",
			width, height, maxSide, limits.Pixels)
	}
	return nil
}

// newConverter checks the fields of a Spec that Graph and Decoder share, builds the graph and opens the session. The
// Spec of a Decoder, which has no DType, may lack the fields for resizing.
func newConverter(spec Spec, budget *Budget) (*converter, error) {
	if spec.DType != 0 || spec.Resize != "" || spec.Fit != "" || spec.Antialias {
		if !slices.Contains([]string{"crop", "stretch", "pad"}, spec.Fit) {
			return nil, invalid("a picture cannot be fitted by %q; crop, stretch and pad are known", spec.Fit)
		}
		if !slices.Contains([]string{"bilinear", "nearest", "bicubic", "area"}, spec.Resize) {
			return nil, invalid("a picture cannot be resized by %q; bilinear, nearest, bicubic and area are known",
				spec.Resize)
		}
		if spec.Antialias && spec.Resize != "bilinear" && spec.Resize != "bicubic" {
			return nil, invalid("there is no antialias with %s; only bilinear and bicubic have it", spec.Resize)
		}
	}
	graph, err := buildGraph(spec)
	if err != nil {
		return nil, err
	}
	// Pictures run in parallel, each in the thread of its caller.
	session, err := tensorflow.FromGraphDef(graph.def, tensorflow.Options{IntraOpThreads: 1, InterOpThreads: -1})
	if err != nil {
		return nil, err
	}
	graph.def = nil
	return &converter{spec, budget, graph, session}, nil
}

// Close waits for the runs under way and frees the session.
func (c *converter) Close() error { return c.session.Close() }

// run converts a picture as spec says, which is the converter's with the size of this call. use may read the result,
// [1, height, width, channels], until it returns.
func (c *converter) run(ctx context.Context, spec Spec, p tensor.Picture, use func(*tensorflow.Tensor) error) error {
	h, err := check(spec, p, c.budget.limits)
	if err != nil {
		return err
	}
	release, err := c.budget.acquire(ctx, spec.working(h, p))
	if err != nil {
		return err
	}
	defer release()
	pixels, from, err := c.pixels(p, h)
	if err != nil {
		return explain(h, err)
	}
	result, err := c.convert(spec, pixels, from)
	pixels.Close()
	if err != nil {
		return explain(h, err)
	}
	defer result.Close()
	return use(result)
}

// check reads what a picture says about itself, and refuses it if it is over a limit or would be while it is worked on.
func check(spec Spec, p tensor.Picture, limits Limits) (header, error) {
	var h header
	if p.Encoded() {
		if int64(len(p.Data)) > limits.Bytes {
			return h, invalid("a file of %d bytes; the maximum is %d", len(p.Data), limits.Bytes)
		}
		var ok bool
		if h, ok = readHeader(p.Data); !ok {
			return h, invalid("%d bytes that are no JPEG, PNG or GIF picture, and no BMP without compression",
				len(p.Data))
		}
	} else {
		h = header{format: "decoded", width: p.Width, height: p.Height, channels: p.Channels, orientation: 1}
		if p.Width <= 0 || p.Height <= 0 || !slices.Contains([]int{1, 3, 4}, p.Channels) ||
			p.DType != savedmodel.Uint8 && p.DType != savedmodel.Float32 {
			return h, invalid("%v with %d channels of %v; it needs pixels, of 1, 3 or 4 channels of uint8 or float32",
				h, p.Channels, p.DType)
		}
	}
	if int64(h.width) > limits.Pixels/int64(h.height) {
		return h, invalid("%v has more than %d pixels", h, limits.Pixels)
	}
	if max(h.width, h.height) > maxSide {
		return h, invalid("%v has a side of more than %d pixels", h, maxSide)
	}
	want := int64(h.width) * int64(h.height) * int64(h.channels) * int64(p.DType.Size())
	if !p.Encoded() && int64(len(p.Data)) != want {
		return h, invalid("%v with %d channels of %v needs %d bytes and has %d",
			h, p.Channels, p.DType, want, len(p.Data))
	}
	if h.scans > maxScans {
		return h, invalid("%v has %d scans; the maximum is %d", h, h.scans, maxScans)
	}
	if scanned := int64(h.scans) * int64(h.width) * int64(h.height); h.scans > 1 && scanned > maxScanned {
		return h, invalid("%v has %d pixels in its %d scans; the maximum is %d", h, scanned, h.scans, maxScanned)
	}
	if needs := spec.working(h, p); needs > maxWorking {
		return h, invalid("%v needs %d MiB of memory; the maximum is %d", h, (needs-1)>>20+1, maxWorking>>20)
	}
	if int64(len(p.Data)) < h.least {
		return h, invalid("%v is cut off: it has %d bytes and needs %d", h, len(p.Data), h.least)
	}
	return h, nil
}

// convert runs the graph from pixels to the result.
func (c *converter) convert(spec Spec, pixels *tensorflow.Tensor, from source) (*tensorflow.Tensor, error) {
	head, ok := c.graph.heads[from]
	if !ok {
		return nil, fmt.Errorf("a picture was decoded to shape %v", pixels.Shape())
	}
	feeds := []tensorflow.Feed{{Name: head.pixels, Tensor: pixels}}
	feed := func(name string, shape []int64, values ...int) error {
		t, err := tensorflow.Allocate(savedmodel.Int32, shape)
		if err != nil {
			return err
		}
		for i, v := range values {
			binary.NativeEndian.PutUint32(t.Bytes()[4*i:], uint32(int32(v)))
		}
		feeds = append(feeds, tensorflow.Feed{Name: name, Tensor: t})
		return nil
	}
	defer func() {
		for _, f := range feeds[1:] {
			f.Tensor.Close()
		}
	}()
	result := head.own
	if spec.Height > 0 {
		result = head.resized
		g := spec.geometry(int(pixels.Shape()[0]), int(pixels.Shape()[1]))
		err := errors.Join(
			feed(c.graph.begin, []int64{3}, g.y, g.x, 0),
			feed(c.graph.box, []int64{3}, g.height, g.width, -1),
			feed(c.graph.size, []int64{2}, g.rows, g.columns),
			feed(c.graph.pads, []int64{4, 2},
				0, 0, g.top, spec.Height-g.rows-g.top, g.left, spec.Width-g.columns-g.left, 0, 0))
		if err != nil {
			return nil, err
		}
	}
	out, err := c.session.Run(0, feeds, []string{result})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// nodes matches the names of nodes of the graph in TensorFlow's messages.
var nodes = regexp.MustCompile(`\s*(\[\[)?\{\{[^}]*\}\}(\]\])?\s*`)

// explain turns an error of TensorFlow into one that names the picture and not the nodes of the graph. All failures of
// kernels count as the picture's, also lack of memory, since a smaller picture may fit. Errors of a session that was
// closed or cancelled stay as they are.
func explain(h header, err error) error {
	var e *tensorflow.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case tensorflow.Cancelled, tensorflow.DeadlineExceeded, tensorflow.FailedPrecondition:
		return err
	}
	reason, _, _ := strings.Cut(e.Message, "\n")
	reason = strings.TrimSpace(nodes.ReplaceAllString(reason, " "))
	return invalid("%v cannot be decoded: %s", h, reason)
}

func invalid(format string, args ...any) error {
	return &tensorflow.Error{Code: tensorflow.InvalidArgument, Message: fmt.Sprintf(format, args...)}
}
