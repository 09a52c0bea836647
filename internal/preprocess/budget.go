package preprocess

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// Limits bound what pictures may take. All are at least 1.
type Limits struct {
	Pixels  int64 // the most pixels of a picture, and of a Spec
	Bytes   int64 // the most bytes of an encoded picture
	Working int64 // the bytes that pictures in work may take together
}

// Budget holds the Limits of a process and what of them is in use. All graphs and
// decoders of the process share one.
type Budget struct {
	limits  Limits
	working *semaphore.Weighted
}

// NewBudget makes a Budget of which nothing is in use.
func NewBudget(limits Limits) *Budget {
	return &Budget{limits, semaphore.NewWeighted(limits.Working)}
}

// acquire waits until the bytes are free, in order of coming, and returns how to
// give them back. What is larger than the whole budget waits for all of it. The
// error is ctx's.
func (b *Budget) acquire(ctx context.Context, bytes int64) (release func(), err error) {
	bytes = min(bytes, b.limits.Working)
	if err := b.working.Acquire(ctx, bytes); err != nil {
		return nil, err
	}
	return func() { b.working.Release(bytes) }, nil
}

// working estimates the most bytes that a picture takes until its tensor is
// copied: h says what it is, encoded is the length of its file, size the bytes of
// one channel of a pixel.
func (c *converter) working(h header, encoded, size int64) int64 {
	pixels, channels := int64(h.width)*int64(h.height), int64(h.channels)
	if c.spec.Channels != "" {
		channels = 3
	}
	decoded := pixels * channels * size
	bytes := encoded + decoded
	switch {
	case h.format == "JPEG" && h.progressive:
		bytes += pixels * int64(h.channels) * 2 // its coefficients
	case h.format == "GIF":
		bytes += pixels
	case h.format == "BMP":
		bytes += pixels * 4
	}
	if h.orientation > 1 {
		bytes += decoded
	}
	switch {
	case c.spec.Height == 0 && c.spec.Channels == "L":
		return bytes + pixels*(3+3+1)*4
	case c.spec.Height == 0:
		return bytes + 2*decoded // in the other order, and the caller's
	case c.spec.Fit == "crop":
		bytes += decoded // the box
	}
	if c.spec.Antialias {
		bytes += int64(c.spec.Height) * int64(max(h.width, h.height)) * channels * 4 // rows done, columns not
	}
	return bytes + int64(c.spec.Height)*int64(c.spec.Width)*channels*4*3
}
