package preprocess

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// header is what a picture says of itself before its pixels come. Both sides are at
// least 1.
type header struct {
	format        string // "JPEG" or "PNG"
	width, height int
}

// String describes the picture for errors, for instance "a JPEG picture of 451x300".
func (h header) String() string {
	return fmt.Sprintf("a %s picture of %dx%d", h.format, h.width, h.height)
}

// readHeader reads the size of a JPEG or PNG, and nothing that the decoder checks
// anyway. It is not ok when there is no size to be found.
func readHeader(encoded []byte) (header, bool) {
	var h header
	switch {
	case bytes.HasPrefix(encoded, []byte("\x89PNG\r\n\x1a\n")):
		h = readPNG(encoded)
	case bytes.HasPrefix(encoded, []byte("\xff\xd8\xff")):
		h = readJPEG(encoded)
	}
	return h, h.width > 0 && h.height > 0
}

// readPNG reads the IHDR chunk, which must come first: its length and name, then
// width and height in 4 bytes each.
func readPNG(encoded []byte) header {
	if len(encoded) < 24 || string(encoded[12:16]) != "IHDR" {
		return header{}
	}
	width, height := binary.BigEndian.Uint32(encoded[16:]), binary.BigEndian.Uint32(encoded[20:])
	return header{"PNG", int(width), int(height)}
}

// readJPEG walks the segments up to the frame header (SOF): a marker, 0xff and a
// kind, then, for most kinds, two bytes of length that count themselves. Bytes
// between segments are skipped, as libjpeg does.
func readJPEG(encoded []byte) header {
	rest := encoded[2:]
	for {
		at := bytes.IndexByte(rest, 0xff)
		if at < 0 {
			return header{}
		}
		for rest = rest[at:]; len(rest) > 0 && rest[0] == 0xff; {
			rest = rest[1:]
		}
		if len(rest) < 8 { // the kind, and the frame header up to its width
			return header{}
		}
		kind := rest[0]
		rest = rest[1:]
		switch {
		case kind == 0x00, kind == 0x01, kind >= 0xd0 && kind <= 0xd8:
			continue // a stuffed byte, TEM, a restart, SOI: no length
		case kind == 0xd9, kind == 0xda:
			return header{} // end of image, or a scan before the frame header
		case kind >= 0xc0 && kind <= 0xcf && kind != 0xc4 && kind != 0xc8 && kind != 0xcc:
			height, width := binary.BigEndian.Uint16(rest[3:]), binary.BigEndian.Uint16(rest[5:])
			return header{"JPEG", int(width), int(height)}
		}
		rest = rest[min(int(binary.BigEndian.Uint16(rest)), len(rest)):]
	}
}
