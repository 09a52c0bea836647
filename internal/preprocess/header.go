// Headers of pictures, read by hand: Go's decoders would allocate what a header claims, and do not read EXIF or count
// scans.

package preprocess

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"image/gif"
	"iter"

	"golang.org/x/image/bmp"
)

// header is what a file says about its picture before the pixels. Both sides are at least 1.
type header struct {
	format        string // "BMP", "GIF", "JPEG" or "PNG"
	width, height int    // as stored, before orientation
	channels      int    // of a pixel, at most
	orientation   int    // of EXIF, 1 to 8; 1, also without EXIF, is as stored
	scans         int    // of a JPEG
	coefficients  int    // of a pixel, if libjpeg keeps those of the whole picture while it decodes; else 0
	least         int64  // bytes that the file must have, 0 if unknown
}

// String describes the picture for errors, for instance "a JPEG picture of 451x300".
func (h header) String() string {
	return fmt.Sprintf("a %s picture of %dx%d", h.format, h.width, h.height)
}

// readHeader reads a header. It checks nothing that the decoder checks later, and is not ok if it finds no size.
func readHeader(encoded []byte) (h header, ok bool) {
	switch {
	case bytes.HasPrefix(encoded, []byte(pngSignature)):
		h = readPNG(encoded)
	case bytes.HasPrefix(encoded, []byte("\xff\xd8\xff")):
		h = readJPEG(encoded)
	case bytes.HasPrefix(encoded, []byte("GIF8")):
		if config, err := gif.DecodeConfig(bytes.NewReader(encoded)); err == nil {
			h = header{format: "GIF", width: config.Width, height: config.Height, channels: 3, orientation: 1}
		}
	case bytes.HasPrefix(encoded, []byte("BM")):
		if config, err := bmp.DecodeConfig(bytes.NewReader(encoded)); err == nil {
			h = header{format: "BMP", width: config.Width, height: config.Height, channels: 3, orientation: 1}
			bits := int64(binary.LittleEndian.Uint16(encoded[28:])) // of a pixel
			h.least = (int64(h.width)*bits + 31) / 32 * 4 * int64(h.height)
		}
	}
	return h, h.width > 0 && h.height > 0
}

const pngSignature = "\x89PNG\r\n\x1a\n"

// readPNG reads the IHDR chunk, which must come first: its length and name, width and height in 4 bytes each, bit depth
// and colour type. A picture with a palette has alpha if a tRNS chunk comes before the pixels.
func readPNG(encoded []byte) header {
	if len(encoded) < 26 || string(encoded[12:16]) != "IHDR" {
		return header{}
	}
	width, height := binary.BigEndian.Uint32(encoded[16:]), binary.BigEndian.Uint32(encoded[20:])
	h := header{format: "PNG", width: int(width), height: int(height), channels: 4, orientation: 1}
	switch encoded[25] {
	case 0:
		h.channels = 1
	case 2:
		h.channels = 3
	case 3:
		h.channels = 3
		for chunk := range pngChunks(encoded) {
			if name := string(chunk[4:8]); name == "tRNS" {
				h.channels = 4
			} else if name != "IDAT" {
				continue
			}
			break
		}
	}
	return h
}

// pngChunks yields the chunks of a PNG up to IEND: 4 bytes of length, 4 of name, the data, and 4 of checksum. The last
// one may be cut off after its name.
func pngChunks(encoded []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for rest := encoded[len(pngSignature):]; len(rest) >= 8; {
			size := 4 + 4 + uint64(binary.BigEndian.Uint32(rest)) + 4
			chunk := rest[:min(size, uint64(len(rest)))]
			if !yield(chunk) || string(chunk[4:8]) == "IEND" {
				return
			}
			rest = rest[len(chunk):]
		}
	}
}

// onlyPixels returns a PNG without the chunks that its pixels do not need, because libpng inflates each compressed text
// to as much as 8 MB and keeps a thousand of them. It keeps the critical chunks, whose names begin with a capital
// letter, and tRNS, the transparency. TensorFlow ignores all others, such as gamma, colour profile and significant
// bits. If there are none, it returns the file itself.
func onlyPixels(encoded []byte) []byte {
	needed := func(chunk []byte) bool { return chunk[4]&0x20 == 0 || string(chunk[4:8]) == "tRNS" }
	size, all := len(pngSignature), true
	for chunk := range pngChunks(encoded) {
		if needed(chunk) {
			size += len(chunk)
		} else {
			all = false
		}
	}
	if all {
		return encoded
	}
	kept := append(make([]byte, 0, size), pngSignature...)
	for chunk := range pngChunks(encoded) {
		if needed(chunk) {
			kept = append(kept, chunk...)
		}
	}
	return kept
}

// readJPEG reads the frame header (SOF), the orientation, and the number of scans.
func readJPEG(encoded []byte) header {
	h := header{format: "JPEG"}
	var frame byte // the kind of the frame header, 0 before it
	var components int
	for kind, segment := range jpegSegments(encoded) {
		switch {
		case kind == 0xe1 && h.orientation == 0:
			h.orientation = readOrientation(segment)
		case kind >= 0xc0 && kind <= 0xcf && kind != 0xc4 && kind != 0xc8 && kind != 0xcc && frame == 0:
			if len(segment) < 8 {
				return header{}
			}
			frame = kind
			h.height, h.width = int(binary.BigEndian.Uint16(segment[3:])), int(binary.BigEndian.Uint16(segment[5:]))
			components = int(segment[7])
			h.channels = min(components, 3)
			h.least = leastOfJPEG(kind, segment)
			h.orientation = max(h.orientation, 1)
		case kind == 0xda && frame == 0:
			return header{} // a scan before the frame header
		case kind == 0xda:
			h.scans++
		}
	}
	if baseline := frame == 0xc0 || frame == 0xc1; !baseline || h.scans > 1 {
		h.coefficients = components
	}
	return h
}

// leastOfJPEG returns the fewest bytes that the scans of a JPEG with this frame header can have, or 0 if that is not
// known. A Huffman code has at least one bit; a block of 8x8 values takes two codes, in a progressive picture one. The
// check is needed because libjpeg fills what is missing before the end marker with grey: it would make 13,000x13,000
// pixels of 600 bytes.
func leastOfJPEG(kind byte, frame []byte) int64 {
	bits := map[byte]int64{0xc0: 2, 0xc1: 2, 0xc2: 1}[kind]
	height, width, components := int64(frame[3])<<8|int64(frame[4]), int64(frame[5])<<8|int64(frame[6]), int(frame[7])
	if len(frame) < 8+3*components {
		return 0
	}
	var most [2]int64 // samples of a component, across and down
	for i := range components {
		sampling := int64(frame[8+3*i+1])
		most = [2]int64{max(most[0], sampling>>4), max(most[1], sampling&15)}
	}
	blocks := int64(0)
	for i := range components {
		sampling := int64(frame[8+3*i+1])
		if most[0]*most[1] > 0 {
			blocks += (width*(sampling>>4) + 8*most[0] - 1) / (8 * most[0]) *
				((height*(sampling&15) + 8*most[1] - 1) / (8 * most[1]))
		}
	}
	return blocks * bits / 8
}

// jpegSegments yields the kind of each marker that has a segment, and the segment, which begins with two bytes of
// length that count themselves; the last one may be cut off. Like libjpeg it skips bytes between segments, such as the
// data of a scan. It ends at the end marker, since the film of a moving photo may follow.
func jpegSegments(encoded []byte) iter.Seq2[byte, []byte] {
	return func(yield func(byte, []byte) bool) {
		for rest := encoded[2:]; ; {
			at := bytes.IndexByte(rest, 0xff)
			if at < 0 {
				return
			}
			for rest = rest[at:]; len(rest) > 0 && rest[0] == 0xff; {
				rest = rest[1:]
			}
			if len(rest) < 3 {
				return
			}
			kind := rest[0]
			rest = rest[1:]
			switch {
			case kind == 0x00, kind == 0x01, kind >= 0xd0 && kind <= 0xd8:
				continue // a stuffed byte, TEM, a restart, SOI: these have no segment
			case kind == 0xd9:
				return
			}
			segment := rest[:min(int(binary.BigEndian.Uint16(rest)), len(rest))]
			if !yield(kind, segment) {
				return
			}
			rest = rest[len(segment):]
		}
	}
}

// readOrientation returns the orientation, 1 to 8, in an APP1 segment, which begins with its length. It returns 0 if
// the segment is not EXIF, and 1, as stored, if its EXIF has no orientation or is broken.
func readOrientation(segment []byte) int {
	tiff, ok := bytes.CutPrefix(segment[min(2, len(segment)):], []byte("Exif\x00\x00"))
	if !ok {
		return 0
	}
	var order binary.ByteOrder = binary.LittleEndian
	if bytes.HasPrefix(tiff, []byte("MM\x00*")) {
		order = binary.BigEndian
	} else if !bytes.HasPrefix(tiff, []byte("II*\x00")) {
		return 1
	}
	// The first directory is the number of its entries, then 12 bytes for each: tag, type, count, value.
	if len(tiff) < 8 {
		return 1
	}
	directory := tiff[min(uint64(order.Uint32(tiff[4:])), uint64(len(tiff))):]
	if len(directory) < 2 {
		return 1
	}
	entries := directory[2:]
	for range order.Uint16(directory) {
		if len(entries) < 12 {
			break
		}
		const tag, short = 0x0112, 3
		if order.Uint16(entries) == tag {
			if v := order.Uint16(entries[8:]); order.Uint16(entries[2:]) == short && v >= 1 && v <= 8 {
				return int(v)
			}
			break
		}
		entries = entries[12:]
	}
	return 1
}
