// Zstandard frames: how much memory a compressed buffer asks for, read from its headers before anything is decoded.

package handlers

import (
	"encoding/binary"

	"flightsvc/internal/fault"
)

// minWindow is the window that every decoder of Zstandard should support, by RFC 8878. Encoders ask for a larger one
// only for more data.
const minWindow = 8 << 20

// checkFrames refuses, by a panic with a fault, a compressed buffer whose Zstandard frames ask for a window of more
// than minWindow and more than twice the buffer's uncompressed size. It leaves all other mistakes in them to the
// decoder.
func checkFrames(buffer []byte) {
	const sizeBytes, plain = 8, -1 // a buffer begins with its uncompressed size; -1 says that it is not compressed
	if len(buffer) < sizeBytes {
		return
	}
	becomes, frames := int64(binary.LittleEndian.Uint64(buffer)), buffer[sizeBytes:]
	if becomes == plain {
		return
	}
	for len(frames) >= 4 {
		magic := binary.LittleEndian.Uint32(frames)
		if magic&^0xf == 0x184d2a50 { // a frame to skip
			if frames = frames[4:]; len(frames) < 4 {
				return
			}
			frames = skip(frames[4:], int64(binary.LittleEndian.Uint32(frames)))
			continue
		}
		if magic != 0xfd2fb528 {
			return
		}
		window, checksum, blocks := frameHeader(frames[4:])
		if window > max(minWindow, uint64(max(becomes, 0))*2) {
			panic(fault.New(fault.BadRequest, "a compressed buffer needs a window of %d MiB, more than twice its "+
				"uncompressed size", window>>20))
		}
		frames = skip(skipBlocks(blocks), checksum)
	}
}

// frameHeader reads what follows a frame's magic number. It returns the size of the frame's window, that of the
// checksum at its end, and the data from its first block on.
func frameHeader(data []byte) (window uint64, checksum int64, blocks []byte) {
	if len(data) == 0 {
		return 0, 0, nil
	}
	about := data[0]
	data = data[1:]
	single := about&(1<<5) != 0
	if about&(1<<2) != 0 {
		checksum = 4
	}
	if !single {
		if len(data) == 0 {
			return 0, 0, nil
		}
		base := uint64(1) << (10 + data[0]>>3)
		window = base + base/8*uint64(data[0]&7)
		data = data[1:]
	}
	data = skip(data, [...]int64{0, 1, 2, 4}[about&3]) // the dictionary's id
	width := [...]int{0, 2, 4, 8}[about>>6]
	if single && width == 0 {
		width = 1
	}
	if len(data) < width {
		return 0, 0, nil
	}
	if single {
		var size [8]byte
		copy(size[:], data[:width])
		window = binary.LittleEndian.Uint64(size[:])
	}
	return window, checksum, data[width:]
}

// skipBlocks returns what follows the last block of a frame.
func skipBlocks(data []byte) []byte {
	for len(data) >= 3 {
		about := uint32(data[0]) | uint32(data[1])<<8 | uint32(data[2])<<16
		size := int64(about >> 3)
		if about>>1&3 == 1 { // one byte, repeated
			size = 1
		}
		data = skip(data[3:], size)
		if about&1 != 0 {
			return data
		}
	}
	return nil
}

// skip returns data without its first n bytes.
func skip(data []byte, n int64) []byte { return data[min(n, int64(len(data))):] }
