package preprocess

import "math"

// geometry is the box of a picture that is resized, its size afterwards, and where it lies in the tensor, in pixels of
// the picture as it is shown, after orientation.
type geometry struct {
	y, x, height, width int // the box in the picture
	rows, columns       int // what it is resized to
	top, left           int // where the resized box begins in the tensor; the rest is black
}

// geometry fits a picture of height x width into the Spec. All sides are at least 1.
func (s Spec) geometry(height, width int) geometry {
	g := geometry{height: height, width: width, rows: s.Height, columns: s.Width}
	switch s.Fit {
	case "crop":
		g.height = max(min(height, width*s.Height/s.Width), 1)
		g.width = max(min(width, height*s.Width/s.Height), 1)
		g.y, g.x = (height-g.height)/2, (width-g.width)/2
	case "pad":
		// In float32 as in tf.image.resize_with_pad, whose rounding is visible: a side that should fill the tensor may
		// lack a pixel.
		ratio := max(float32(width)/float32(s.Width), float32(height)/float32(s.Height))
		g.rows, g.top = padded(float32(height)/ratio, s.Height)
		g.columns, g.left = padded(float32(width)/ratio, s.Width)
	}
	return g
}

// padded returns the length of a resized side and where it begins in the tensor's side, whole.
func padded(side float32, whole int) (length, begin int) {
	length = min(max(int(math.Floor(float64(side))), 1), whole)
	begin = max(int(math.Floor(float64((float32(whole)-side)/2))), 0)
	return length, min(begin, whole-length)
}
