package preprocess

import (
	"context"

	"golang.org/x/sync/semaphore"

	"flightsvc/internal/tensor"
)

// Limits bound what pictures may take. All are at least 1.
type Limits struct {
	Pixels  int64 // the most pixels of a picture, and of a Spec
	Bytes   int64 // the most bytes of an encoded picture
	Working int64 // the bytes that all pictures being worked on may take; one alone may take more
}

// Budget holds the Limits of a process and how much of Working is in use. All graphs and decoders of the process share
// one.
type Budget struct {
	limits  Limits
	working *semaphore.Weighted
}

// NewBudget makes a Budget that is not in use.
func NewBudget(limits Limits) *Budget {
	return &Budget{limits, semaphore.NewWeighted(limits.Working)}
}

// acquire waits until the bytes are free, in order of arrival, and returns a function that frees them. More bytes than
// the whole budget wait for all of it. The error is ctx's.
func (b *Budget) acquire(ctx context.Context, bytes int64) (release func(), err error) {
	bytes = min(bytes, b.limits.Working)
	if err := b.working.Acquire(ctx, bytes); err != nil {
		return nil, err
	}
	return func() { b.working.Release(bytes) }, nil
}

// working estimates the most bytes that a picture takes at once until its tensor is copied; h is the picture's header.
func (s Spec) working(h header, p tensor.Picture) int64 {
	encoded, size := int64(len(p.Data)), int64(max(p.DType.Size(), 1)) // size is that of a channel
	pixels, channels := int64(h.width)*int64(h.height), int64(h.channels)
	if s.Channels != "" {
		channels = max(channels, 3)
	}
	decoded := pixels * channels * size
	held := encoded + decoded
	switch h.format {
	case "PNG":
		held += encoded // the copy that onlyPixels makes
	case "GIF":
		held += pixels
	case "BMP":
		held += pixels * 4
	}
	decoding := pixels * int64(h.coefficients) * 2
	if h.orientation > 1 {
		decoding = max(decoding, decoded)
	}
	if s.Height == 0 {
		if s.Channels == "L" {
			return held + max(decoding, pixels*(3+3+1)*4)
		}
		return held + max(decoding, 2*decoded) // once with the channels in order, once for the caller
	}
	resizing := int64(s.Height) * int64(s.Width) * channels * 4 * 3
	if s.Fit == "crop" {
		resizing += decoded // the box
	}
	if s.Antialias { // between the two passes only the height is resized
		columns := h.width
		if h.orientation >= 5 {
			columns = h.height
		}
		resizing += int64(s.Height) * int64(columns) * channels * 4
	}
	return held + max(decoding, resizing)
}
