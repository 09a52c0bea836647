// Preprocess: how a runner decodes pictures, as JSON in a descriptor.

package protocol

import (
	"encoding/json"
	"fmt"

	"flightsvc/internal/savedmodel"
)

// Preprocess says how the pictures of an input become a tensor of [batch, height, width, channels]. For the built-in
// model it says how a picture becomes another one; no field is required then.
type Preprocess struct {
	Size      []int    `json:"size,omitempty"`   // height, width
	Resize    string   `json:"resize,omitempty"` // "bilinear", "nearest", "bicubic", "area"
	Antialias bool     `json:"antialias,omitempty"`
	Fit       string   `json:"fit,omitempty"`      // "crop", "stretch", "pad"
	Channels  string   `json:"channels,omitempty"` // "RGB", "BGR", "L"
	Scale     channels `json:"scale,omitempty"`    // default 1
	Offset    channels `json:"offset,omitempty"`   // default 0
	DType     string   `json:"dtype,omitempty"`    // default: that of the input
}

// maxSide is the largest height and width in Size.
const maxSide = 1 << 14

// pictureTypes are the element types that a picture's tensor may have, by name.
var pictureTypes = map[string]savedmodel.DType{
	"float32": savedmodel.Float32, "float64": savedmodel.Float64, "float16": savedmodel.Float16,
	"bfloat16": savedmodel.Bfloat16, "uint8": savedmodel.Uint8, "int32": savedmodel.Int32,
}

// PictureTypes lists the names in pictureTypes, for errors.
const PictureTypes = "float32, float64, float16, bfloat16, uint8 or int32"

// UnmarshalJSON is part of json.Unmarshaler.
func (p *Preprocess) UnmarshalJSON(data []byte) error {
	type plain Preprocess
	return Decode(data, (*plain)(p))
}

// channels are numbers, one for each channel. In JSON a number alone stands for all channels.
type channels []float32

// UnmarshalJSON is part of json.Unmarshaler.
func (c *channels) UnmarshalJSON(data []byte) error {
	var one *float32
	if json.Unmarshal(data, &one) == nil && one != nil {
		*c = channels{*one, *one, *one}
		return nil
	}
	var list []float32
	if err := json.Unmarshal(data, &list); err != nil || len(list) != 1 && len(list) != 3 {
		return fmt.Errorf("scale and offset take a number or a list with one for each channel")
	}
	*c = list
	return nil
}

// Scales returns the factor of each channel; the first is that of a grey picture.
func (p *Preprocess) Scales() [3]float32 { return p.Scale.or(1) }

// Offsets returns what is added to each channel after scaling; the first is that of a grey picture.
func (p *Preprocess) Offsets() [3]float32 { return p.Offset.or(0) }

// or returns the three numbers, or the given default for each.
func (c channels) or(fallback float32) [3]float32 {
	switch len(c) {
	case 0:
		return [3]float32{fallback, fallback, fallback}
	case 1:
		return [3]float32{c[0], c[0], c[0]}
	}
	return [3]float32(c)
}

// checkPictures sets the defaults of preprocess and refuses what this server cannot do for any model.
func (d *Descriptor) checkPictures() error {
	builtIn := d.Model == Image
	if builtIn && len(d.Preprocess) == 0 {
		d.Preprocess = map[string]Preprocess{ImageInput: {}}
	}
	for name, p := range d.Preprocess {
		check := p.check
		if builtIn {
			check = p.checkBuiltIn
		}
		if err := check(); err != nil {
			return fmt.Errorf("preprocess of %q: %w", name, err)
		}
		d.Preprocess[name] = p
	}
	return nil
}

func (p *Preprocess) check() error {
	if p.Size == nil {
		return fmt.Errorf("size is missing; want [height, width]")
	}
	if err := p.checkResize(); err != nil {
		return err
	}
	if err := choose("channels", &p.Channels, "RGB", "BGR", "L"); err != nil {
		return err
	}
	for name, numbers := range map[string]channels{"scale": p.Scale, "offset": p.Offset} {
		three := numbers.or(0)
		number := len(numbers) == 3 && three[0] == three[1] && three[0] == three[2]
		if numbers != nil && len(numbers) != p.ChannelCount() && !number {
			return fmt.Errorf("%s has %d numbers, but %s has %d channels",
				name, len(numbers), p.Channels, p.ChannelCount())
		}
	}
	if p.DType != "" && p.Type() == 0 {
		return fmt.Errorf("dtype is %q; pictures become %s", p.DType, PictureTypes)
	}
	return nil
}

// checkBuiltIn is check for the built-in model, which makes pictures of pictures.
func (p *Preprocess) checkBuiltIn() error {
	if p.Scale != nil || p.Offset != nil || p.DType != "" {
		return fmt.Errorf("scale, offset and dtype are for tensors; the model %q makes pictures, leave them out", Image)
	}
	if p.Size == nil && (p.Resize != "" || p.Antialias || p.Fit != "") {
		return fmt.Errorf("resize, antialias and fit need a size")
	}
	if err := p.checkResize(); err != nil {
		return err
	}
	return choose("channels", &p.Channels, "", "BGR", "L")
}

func (p *Preprocess) checkResize() error {
	if p.Size != nil && (len(p.Size) != 2 ||
		p.Size[0] < 1 || p.Size[1] < 1 || p.Size[0] > maxSide || p.Size[1] > maxSide) {
		return fmt.Errorf("size must be [height, width], each from 1 to %d", maxSide)
	}
	if p.Size == nil {
		return nil
	}
	if err := choose("resize", &p.Resize, "bilinear", "nearest", "bicubic", "area"); err != nil {
		return err
	}
	if p.Antialias && p.Resize != "bilinear" && p.Resize != "bicubic" {
		return fmt.Errorf("antialias works with bilinear and bicubic, not with %s", p.Resize)
	}
	return choose("fit", &p.Fit, "crop", "stretch", "pad")
}

// ChannelCount returns the last dimension of the tensor.
func (p *Preprocess) ChannelCount() int {
	if p.Channels == "L" {
		return 1
	}
	return 3
}

// Type returns the element type of the tensor, or 0 if pictures cannot have the type DType.
func (p *Preprocess) Type() savedmodel.DType { return pictureTypes[p.DType] }
