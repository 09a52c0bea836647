// Pictures: columns of files or of Spark's image structs, whose cells a decoder turns into tensors.

package tensor

import (
	"context"
	"fmt"
	"slices"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Picture is one cell of a column of pictures; it views the column's memory.
type Picture struct {
	// Data is an encoded file if Height is 0, else pixels: rows from the top, the channels of a pixel interleaved in
	// the order of Spark's image struct, which is grey, or blue, green, red, alpha.
	Data []byte

	Height, Width int
	Channels      int              // 1, 3 or 4
	DType         savedmodel.DType // of a channel: Uint8 or Float32
}

// Encoded reports whether Data is an encoded file.
func (p Picture) Encoded() bool { return p.Height == 0 }

// Pictures makes tensors of pictures. It is safe for concurrent use.
type Pictures interface {
	// Bytes returns how many bytes a picture has in the input's tensor, without decoding it; it is an estimate if that
	// depends on the content.
	Bytes(input string, picture Picture) int64
	// Decode makes a value with one row for each picture, in order. refused holds a reason for each picture that
	// cannot be decoded, whose row of the value is undefined. The end of ctx ends the work.
	Decode(ctx context.Context, input string, pictures []Picture, mem memory.Allocator) (value Value,
		refused map[int]string, err error)
}

// imageModes holds the pixel formats of Spark's images by their mode, which is OpenCV's number of the type.
var imageModes = map[int32]struct {
	channels int
	dtype    savedmodel.DType
}{
	0: {1, savedmodel.Uint8}, 16: {3, savedmodel.Uint8}, 24: {4, savedmodel.Uint8},
	5: {1, savedmodel.Float32}, 21: {3, savedmodel.Float32}, 29: {4, savedmodel.Float32},
}

// ImageMode returns Spark's mode of a picture of pixels.
func ImageMode(p Picture) int32 {
	for mode, kind := range imageModes {
		if kind.channels == p.Channels && kind.dtype == p.DType {
			return mode
		}
	}
	panic(fmt.Sprintf("no picture has %d channels of %v", p.Channels, p.DType))
}

// pictureColumn reads the cells of a column of pictures.
type pictureColumn struct {
	fields []int // positions of height, width, nChannels, mode and data in Spark's image struct; nil for files
}

// bindPictures checks how a column holds pictures: as files or as image structs.
func (in *boundInput) bindPictures(field arrow.Field) error {
	t := field.Type
	if dictionary, ok := t.(*arrow.DictionaryType); ok {
		t = dictionary.ValueType
	}
	in.pictures = &pictureColumn{}
	if holdsBytes(t) {
		return nil
	}
	refused := fault.New(fault.BadRequest, "input %q takes pictures and wants a column of files (binary) or of "+
		"Spark's image struct; column %q is %s", in.spec.Name, in.name, typeText(field.Type))
	s, ok := field.Type.(*arrow.StructType)
	if !ok {
		return refused
	}
	for _, name := range []string{"height", "width", "nChannels", "mode", "data"} {
		at, ok := s.FieldIdx(name)
		if !ok || name == "data" && !holdsBytes(s.Field(at).Type) ||
			name != "data" && s.Field(at).Type.ID() != arrow.INT32 {
			return refused
		}
		in.pictures.fields = append(in.pictures.fields, at)
	}
	return nil
}

func holdsBytes(t arrow.DataType) bool {
	switch t.ID() {
	case arrow.BINARY, arrow.LARGE_BINARY, arrow.BINARY_VIEW, arrow.NULL: // all rows of the last are null
		return true
	}
	return false
}

// nulls marks the rows without a picture; nil for none.
func (p *pictureColumn) nulls(column arrow.Array) []bool {
	all := nulls(column, 0)
	for _, at := range p.fields {
		field := column.(*array.Struct).Field(at)
		for row := 0; field.NullN() > 0 && row < column.Len(); row++ {
			if field.IsNull(row) {
				all = marked(all, row, column.Len())
			}
		}
	}
	return all
}

// reader returns a function that reads the picture of a row that is not null; reason is why it is not valid, or "".
func (p *pictureColumn) reader(column arrow.Array) func(row int) (picture Picture, reason string) {
	if p.fields == nil {
		at := bytesAt(column)
		return func(row int) (Picture, string) { return Picture{Data: at(row)}, "" }
	}
	s := column.(*array.Struct)
	number := func(i int) *array.Int32 { return s.Field(p.fields[i]).(*array.Int32) }
	height, width, channels, mode := number(0), number(1), number(2), number(3)
	data := bytesAt(s.Field(p.fields[4]))
	return func(row int) (Picture, string) {
		return pixels(height.Value(row), width.Value(row), channels.Value(row), mode.Value(row), data(row))
	}
}

// screen refuses the rows that take part and have no valid picture.
func (p *pictureColumn) screen(column arrow.Array, rows *Rows, refuse func(row int, reason string)) {
	if p.fields == nil {
		return // files are checked when they are decoded
	}
	read := p.reader(column)
	for _, row := range rows.Positions() {
		if _, reason := read(row); reason != "" {
			refuse(row, reason)
		}
	}
}

// pixels returns the picture of a row of Spark's image struct.
func pixels(height, width, channels, mode int32, data []byte) (Picture, string) {
	kind, known := imageModes[mode]
	switch {
	case mode == -1 || height == -1 || width == -1:
		return Picture{}, "an image that Spark has marked as invalid (mode -1)"
	case !known:
		return Picture{},
			fmt.Sprintf("an image of mode %d; want 0, 16 or 24 (CV_8UC1, 3, 4) or 5, 21 or 29 (CV_32FC1, 3, 4)", mode)
	case int(channels) != kind.channels:
		return Picture{}, fmt.Sprintf("an image of mode %d with nChannels %d; that mode has %d", mode, channels,
			kind.channels)
	case height < 1 || width < 1:
		return Picture{}, fmt.Sprintf("an image with height %d and width %d", height, width)
	}
	pixel := int64(kind.channels * kind.dtype.Size())
	if int64(height) > int64(len(data)) || int64(width) > int64(len(data)) ||
		int64(height)*int64(width)*pixel != int64(len(data)) {
		return Picture{},
			fmt.Sprintf("an image of height %d, width %d and mode %d, whose data have %d bytes; "+
				"want height * width * %d", height, width, mode, len(data), pixel)
	}
	return Picture{Data: data, Height: int(height), Width: int(width), Channels: kind.channels, DType: kind.dtype}, ""
}

// Cut returns the ends of the slices of a record batch whose pictures become at most limit bytes of tensors, or are a
// single row; the last end is the number of rows. A record batch without pictures, or without rows, is one slice.
func (b *Binding) Cut(rec arrow.Record, pictures Pictures, limit int64) []int64 {
	rows := int(rec.NumRows())
	if !slices.ContainsFunc(b.inputs, func(in boundInput) bool { return in.pictures != nil }) {
		return []int64{int64(rows)}
	}
	sizes := make([]int64, rows)
	for i := range b.inputs {
		in := &b.inputs[i]
		if in.pictures == nil {
			continue
		}
		column := rec.Column(in.at)
		null, read := in.pictures.nulls(column), in.pictures.reader(column)
		for row := range rows {
			if null != nil && null[row] {
				continue
			}
			if picture, reason := read(row); reason == "" {
				sizes[row] += pictures.Bytes(in.spec.Name, picture)
			}
		}
	}
	var ends []int64
	held := int64(0)
	for row, size := range sizes {
		if held > 0 && held+size > limit {
			ends, held = append(ends, int64(row)), 0
		}
		held += size
	}
	return append(ends, int64(rows))
}
