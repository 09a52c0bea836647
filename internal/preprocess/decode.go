// Decoding: from a picture's file to its pixels as they are shown.

package preprocess

import (
	"bytes"
	"fmt"
	"image"
	"image/gif"
	"io"

	"golang.org/x/image/bmp"

	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// pixels makes the pixel tensor of a picture that check has accepted. The caller closes the tensor.
func (c *converter) pixels(p tensor.Picture, h header) (*tensorflow.Tensor, source, error) {
	if !p.Encoded() {
		pixels, err := tensorflow.Allocate(p.DType, []int64{int64(p.Height), int64(p.Width), int64(p.Channels)})
		if err != nil {
			return nil, source{}, err
		}
		copy(pixels.Bytes(), p.Data)
		return pixels, source{map[int]string{1: "L", 3: "BGR", 4: "BGRA"}[p.Channels], p.DType}, nil
	}
	var pixels *tensorflow.Tensor
	var err error
	switch h.format {
	case "GIF":
		pixels, err = paint(h, gif.Decode, p.Data)
	case "BMP":
		pixels, err = paint(h, bmp.Decode, p.Data)
	case "PNG":
		pixels, err = c.decode(onlyPixels(p.Data))
	default:
		pixels, err = c.decode(p.Data)
	}
	if err != nil {
		return nil, source{}, err
	}
	if h.orientation > 1 {
		stored := pixels
		pixels, err = turn(stored, h.orientation)
		stored.Close()
		if err != nil {
			return nil, source{}, err
		}
	}
	channels := int(pixels.Shape()[2])
	return pixels, source{map[int]string{1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels], savedmodel.Uint8}, nil
}

// decode lets TensorFlow decode a JPEG or PNG to uint8 [height, width, channels].
func (c *converter) decode(encoded []byte) (*tensorflow.Tensor, error) {
	file, err := tensorflow.NewStrings(nil, 1, func(int) []byte { return encoded })
	if err != nil {
		return nil, err
	}
	defer file.Close()
	out, err := c.session.Run(0, []tensorflow.Feed{{Name: c.graph.file, Tensor: file}}, []string{c.graph.decoded})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// paint decodes a GIF or BMP and paints its first frame on a black canvas of uint8 [height, width, 3]; transparent
// pixels are black. TensorFlow's decoder knows only some kinds of BMP, and makes all frames of a GIF.
func paint(h header, decode func(io.Reader) (image.Image, error), encoded []byte) (*tensorflow.Tensor, error) {
	frame, err := decode(bytes.NewReader(encoded))
	if err != nil {
		return nil, invalid("its first frame is damaged, cut off, or not within the picture")
	}
	bounds := frame.Bounds() // both decoders refuse a frame that is not within the picture
	pixels, err := tensorflow.Allocate(savedmodel.Uint8, []int64{int64(h.height), int64(h.width), 3})
	if err != nil {
		return nil, err
	}
	canvas := pixels.Bytes()
	clear(canvas)
	var from []byte // 4 bytes of a pixel: red, green, blue, alpha; with a palette, 1 byte: its entry
	var stride int  // bytes of a row
	var palette *[256][3]byte
	switch frame := frame.(type) {
	case *image.Paletted:
		palette = new([256][3]byte)
		for i, c := range frame.Palette {
			r, g, b, _ := c.RGBA()
			palette[i] = [3]byte{byte(r >> 8), byte(g >> 8), byte(b >> 8)}
		}
		from, stride = frame.Pix, frame.Stride
	case *image.RGBA:
		from, stride = frame.Pix, frame.Stride
	case *image.NRGBA:
		from, stride = frame.Pix, frame.Stride
	default:
		pixels.Close()
		return nil, fmt.Errorf("%v was decoded to %T", h, frame)
	}
	for y := range bounds.Dy() {
		to := canvas[((bounds.Min.Y+y)*h.width+bounds.Min.X)*3:][:bounds.Dx()*3]
		row := from[y*stride:]
		if palette != nil {
			for _, entry := range row[:bounds.Dx()] {
				c := &palette[entry]
				to[0], to[1], to[2] = c[0], c[1], c[2]
				to = to[3:]
			}
			continue
		}
		for ; len(to) > 0; to, row = to[3:], row[4:] {
			to[0], to[1], to[2] = row[0], row[1], row[2]
		}
	}
	return pixels, nil
}

// turn returns the picture as it is shown. EXIF's orientation, 2 to 8, says where the first row and the first column of
// the stored pixels, uint8, belong.
func turn(stored *tensorflow.Tensor, orientation int) (*tensorflow.Tensor, error) {
	height, width, channels := int(stored.Shape()[0]), int(stored.Shape()[1]), int(stored.Shape()[2])
	// start is where the first shown pixel is stored; down and right lead from a pixel to the next shown row and
	// column.
	start, down, right := 0, width*channels, channels
	switch orientation {
	case 3, 4, 6, 7: // the last stored row is the first, or the first column
		start += (height - 1) * down
		down = -down
	}
	switch orientation {
	case 2, 3, 7, 8:
		start += (width - 1) * right
		right = -right
	}
	if orientation >= 5 { // rows are stored as columns
		height, width = width, height
		down, right = right, down
	}
	shown, err := tensorflow.Allocate(savedmodel.Uint8, []int64{int64(height), int64(width), int64(channels)})
	if err != nil {
		return nil, err
	}
	from, to := stored.Bytes(), shown.Bytes()
	for y := range height {
		at := start + y*down
		for range width {
			for c := range channels {
				to[c] = from[at+c]
			}
			to = to[channels:]
			at += right
		}
	}
	return shown, nil
}
