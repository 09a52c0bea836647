package preprocess

import "flightsvc/internal/tensor"

// Bytes returns how many bytes of pixels Run makes of a picture at most, by its header; 0 where that cannot
// be read.
func (d *Decoder) Bytes(p tensor.Picture) int64 {
	h, size := header{width: p.Width, height: p.Height, channels: p.Channels}, int64(p.DType.Size())
	if p.Encoded() {
		var ok bool
		if h, ok = readHeader(p.Data); !ok {
			return 0
		}
		size = 1
	}
	if d.spec.Height > 0 {
		h.height, h.width = d.spec.Height, d.spec.Width
	}
	return int64(h.height) * int64(h.width) * int64(h.channels) * size
}
