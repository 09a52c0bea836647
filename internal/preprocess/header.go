package preprocess

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"image/gif"

	"golang.org/x/image/bmp"
)

// header is what a file says of its picture before the pixels come. Both sides are
// at least 1.
type header struct {
	format        string // "BMP", "GIF", "JPEG" or "PNG"
	width, height int    // as stored, before orientation
	channels      int    // at most, of the file or of its pixels
	orientation   int    // of EXIF: 1 as it is, to 8; 1 where there is none
	scans         int    // of a JPEG, at most
	progressive   bool   // a JPEG whose coefficients must all be kept while it is decoded
	least         int64  // bytes that the file must have, where that is known
}

// String describes the picture for errors, for instance "a JPEG picture of 451x300".
func (h header) String() string {
	return fmt.Sprintf("a %s picture of %dx%d", h.format, h.width, h.height)
}

// readHeader reads what a file says of itself, and nothing that the decoder checks
// anyway. It is not ok when there is no size to be found.
func readHeader(encoded []byte) (h header, ok bool) {
	switch {
	case bytes.HasPrefix(encoded, []byte("\x89PNG\r\n\x1a\n")):
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

// readPNG reads the IHDR chunk, which must come first: its length and name, then
// width and height in 4 bytes each, bits and kind of colour.
func readPNG(encoded []byte) header {
	if len(encoded) < 26 || string(encoded[12:16]) != "IHDR" {
		return header{}
	}
	width, height := binary.BigEndian.Uint32(encoded[16:]), binary.BigEndian.Uint32(encoded[20:])
	channels := 4
	switch encoded[25] {
	case 0:
		channels = 1
	case 2:
		channels = 3
	}
	return header{format: "PNG", width: int(width), height: int(height), channels: channels, orientation: 1}
}

// readJPEG walks the segments up to the frame header (SOF): a marker, 0xff and a
// kind, then, for most kinds, two bytes of length that count themselves. Bytes
// between segments are skipped, as libjpeg does.
func readJPEG(encoded []byte) header {
	h := header{format: "JPEG"}
	rest := encoded[2:]
	for {
		at := bytes.IndexByte(rest, 0xff)
		if at < 0 {
			return header{}
		}
		for rest = rest[at:]; len(rest) > 0 && rest[0] == 0xff; {
			rest = rest[1:]
		}
		if len(rest) < 9 { // the kind, and the frame header up to its number of components
			return header{}
		}
		kind := rest[0]
		rest = rest[1:]
		segment := rest[:min(int(binary.BigEndian.Uint16(rest)), len(rest))]
		switch {
		case kind == 0x00, kind == 0x01, kind >= 0xd0 && kind <= 0xd8:
			continue // a stuffed byte, TEM, a restart, SOI: no length
		case kind == 0xd9, kind == 0xda:
			return header{} // end of image, or a scan before the frame header
		case kind == 0xe1 && h.orientation == 0:
			h.orientation = readOrientation(segment)
		case kind >= 0xc0 && kind <= 0xcf && kind != 0xc4 && kind != 0xc8 && kind != 0xcc:
			h.height, h.width = int(binary.BigEndian.Uint16(rest[3:])), int(binary.BigEndian.Uint16(rest[5:]))
			h.channels = int(rest[7])
			h.orientation = max(h.orientation, 1)
			h.scans = bytes.Count(rest, []byte("\xff\xda")) // a scan begins so; a comment may, too
			h.progressive = kind != 0xc0 && kind != 0xc1 || h.scans > 1
			return h
		}
		rest = rest[len(segment):]
	}
}

// readOrientation reads the orientation, 1 to 8, of an APP1 segment, which begins
// with its length. It is 0 where the segment is not EXIF, and 1 where its EXIF has
// no orientation or is broken: such a picture is shown as it is.
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
	// The first directory: the number of its entries, then 12 bytes for each: tag,
	// type, count, value.
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
