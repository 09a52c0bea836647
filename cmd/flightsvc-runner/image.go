// The engine of the built-in model image, which makes Spark's image structs of pictures.

package main

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/preprocess"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// imageEngine decodes pictures before the run, as other models do, so that a bad picture makes only its own row
// refused. Between decoding and the run a picture is one string: its pixels, then height, width, nChannels and mode.
// The run splits these strings into the output columns.
type imageEngine struct {
	decoders *graphs[*preprocess.Decoder]
}

const (
	imageNumbers = 4 // height, width, nChannels and mode
	trailerBytes = 4 * imageNumbers
)

// maxImageBytes bounds the pixels of one picture; the rest of MaxRowBytes is for the other fields of its row.
const maxImageBytes = tensor.MaxRowBytes - 1<<20

func newImageEngine(setup control.Setup) *imageEngine {
	return &imageEngine{decoders: newGraphs(setup, preprocess.NewDecoder)}
}

// Model returns the signature of the built-in model.
func (e *imageEngine) Model() *savedmodel.Model { return protocol.ImageModel }

// Pictures returns a decoder for each input.
func (e *imageEngine) Pictures(wanted map[string]protocol.Preprocess) (tensor.Pictures, error) {
	// One decoder serves all sizes, so the number of decoders does not depend on the sizes that callers ask for.
	sizeless := map[string]protocol.Preprocess{}
	for input, p := range wanted {
		p.Size = nil
		sizeless[input] = p
	}
	byInput, err := e.decoders.of(sizeless)
	if err != nil {
		return nil, err
	}
	return &images{decoders: e.decoders, byInput: byInput, wanted: wanted}, nil
}

// images decodes pictures to the strings that Run splits.
type images struct {
	decoders *graphs[*preprocess.Decoder]
	byInput  map[string]*preprocess.Decoder
	wanted   map[string]protocol.Preprocess
}

// size returns the height and width to resize pictures to, or 0 and 0 to keep their own.
func (m *images) size(input string) (height, width int) {
	if size := m.wanted[input].Size; size != nil {
		return size[0], size[1]
	}
	return 0, 0
}

// Bytes is part of tensor.Pictures.
func (m *images) Bytes(input string, picture tensor.Picture) int64 {
	height, width := m.size(input)
	return m.byInput[input].Bytes(picture, height, width) + trailerBytes
}

// Decode is part of tensor.Pictures.
func (m *images) Decode(
	ctx context.Context, input string, pictures []tensor.Picture, _ memory.Allocator,
) (tensor.Value, map[int]string, error) {
	value := tensor.Value{DType: savedmodel.String, Shape: []int64{int64(len(pictures))},
		Strings: make([][]byte, len(pictures))}
	height, width := m.size(input)
	refused, err := m.decoders.each(ctx, input, pictures, func(ctx context.Context, i int) error {
		if size := m.Bytes(input, pictures[i]); size > maxImageBytes {
			return fault.New(fault.BadRequest,
				"the pixels of the picture have %d MiB, more than the limit of %d MiB; ask for a smaller size",
				size>>20, maxImageBytes>>20)
		}
		pixels, err := m.byInput[input].Run(ctx, pictures[i], height, width)
		if err != nil {
			return err
		}
		whole := pixels.Data
		for _, n := range [imageNumbers]int32{int32(pixels.Height), int32(pixels.Width), int32(pixels.Channels),
			tensor.ImageMode(pixels)} {
			whole = binary.LittleEndian.AppendUint32(whole, uint32(n))
		}
		value.Strings[i] = whole
		return nil
	})
	return value, refused, err
}

// Run splits the strings of pictures into the fetched outputs.
func (e *imageEngine) Run(feeds []tensor.Feed, fetches []string, _ time.Duration) (batch.Outputs, error) {
	defer tensor.ReleaseFeeds(feeds)
	pictures := feeds[0].Value.Strings
	outputs := make(arrays, len(fetches))
	for i, fetch := range fetches {
		out := tensor.Value{DType: savedmodel.String, Shape: []int64{int64(len(pictures))}}
		number := map[string]int{"height": 0, "width": 1, "nChannels": 2, "mode": 3}
		at, isNumber := number[fetch]
		switch {
		case isNumber:
			out.DType = savedmodel.Int32
			for _, p := range pictures {
				trailer := p[len(p)-trailerBytes:]
				out.Data = append(out.Data, trailer[4*at:4*at+4]...)
			}
		case fetch == "data":
			for _, p := range pictures {
				out.Strings = append(out.Strings, p[:len(p)-trailerBytes])
			}
		default:
			return nil, fault.New(fault.Internal, "the model %s has no output %q", protocol.Image, fetch)
		}
		outputs[i] = out
	}
	return outputs, nil
}

// arrays are outputs in Go memory.
type arrays []tensor.Value

// Values is part of batch.Outputs.
func (a arrays) Values() []tensor.Value { return a }

// Close is part of batch.Outputs.
func (a arrays) Close() {}

// Interface guards.
var (
	_ engine          = (*imageEngine)(nil)
	_ tensor.Pictures = (*images)(nil)
)
