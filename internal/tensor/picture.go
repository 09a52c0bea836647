package tensor

import "flightsvc/internal/savedmodel"

// Picture is one cell of a column of pictures: a view of the column's memory, valid as long as that is.
type Picture struct {
	// Data is an encoded file where Height is 0, else pixels: rows from the top, the channels of a
	// pixel together, in the order of Spark's image struct: grey, or blue, green, red, alpha.
	Data []byte

	Height, Width int
	Channels      int              // 1, 3 or 4
	DType         savedmodel.DType // of a channel: Uint8 or Float32
}

// Encoded reports whether Data is an encoded file.
func (p Picture) Encoded() bool { return p.Height == 0 }
