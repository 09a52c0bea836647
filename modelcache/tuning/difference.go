// Agreement: whether the answers of two configurations, or of two forms of a model, are the same but for rounding.

package tuning

import (
	"bytes"
	"encoding/binary"
	"math"
	"slices"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// tolerance bounds the difference of two answers: |ours - theirs| <= relative |theirs| + absolute max|theirs|, with
// the maximum over an output. Half precision has only 11 bits (float16) or 8 (bfloat16): there half replaces both.
// Values of all other types must be equal.
type tolerance struct{ relative, absolute, half float64 }

var (
	// ofForms is what docs/numerics.md demands of a model at different batch sizes.
	ofForms = tolerance{relative: 1e-4, absolute: 1e-5, half: 2e-2}
	// ofChoices has ten times the former, because oneDNN may be on or off: 5.9e-6 of the greatest value were measured.
	ofChoices = tolerance{relative: 1e-3, absolute: 1e-4, half: 2e-2}
)

// Agree returns nil if the answers of a form of a model are those of the saved form, else a Precondition fault.
func Agree(ours, saved []control.Tensor) error {
	switch share := differenceOf(ours, saved, ofForms); {
	case share == math.MaxFloat64:
		return fault.New(fault.Precondition, "its folded form answered the same rows with other values, or with other "+
			"types or shapes")
	case share > 1:
		return fault.New(fault.Precondition, "its folded form's answers to the same rows differ by %.3g times what "+
			"docs/numerics.md allows", share)
	}
	return nil
}

// differenceOf returns the largest difference between two sets of answers as a share of the tolerance; above 1 they do
// not agree. It returns math.MaxFloat64 where they cannot be compared, or must be equal and are not.
func differenceOf(ours, theirs []control.Tensor, within tolerance) float64 {
	if len(ours) != len(theirs) {
		return math.MaxFloat64
	}
	worst := 0.0
	for i := range ours {
		a, b := ours[i], theirs[i]
		if a.Name != b.Name || a.DType != b.DType || !slices.Equal(a.Shape, b.Shape) || len(a.Data) != len(b.Data) {
			return math.MaxFloat64
		}
		x, floats := numbersOf(a)
		y, _ := numbersOf(b)
		if !floats {
			if !bytes.Equal(a.Data, b.Data) || !slices.EqualFunc(a.Strings, b.Strings, bytes.Equal) {
				return math.MaxFloat64
			}
			continue
		}
		relative, absolute := within.relative, within.absolute
		if a.DType == savedmodel.Float16 || a.DType == savedmodel.Bfloat16 {
			relative, absolute = within.half, within.half
		}
		greatest := 0.0
		for _, v := range y {
			if !math.IsNaN(v) && !math.IsInf(v, 0) {
				greatest = max(greatest, math.Abs(v))
			}
		}
		for j := range y {
			if x[j] == y[j] || math.IsNaN(x[j]) && math.IsNaN(y[j]) {
				continue
			}
			share := math.Abs(x[j]-y[j]) / (relative*math.Abs(y[j]) + absolute*greatest)
			if math.IsNaN(share) || math.IsInf(share, 0) {
				return math.MaxFloat64
			}
			worst = max(worst, share)
		}
	}
	return worst
}

// numbersOf returns the elements of a floating-point output, false for an output of another type.
func numbersOf(o control.Tensor) ([]float64, bool) {
	size := o.DType.Size()
	var at func([]byte) float64
	switch o.DType {
	case savedmodel.Float32:
		at = func(b []byte) float64 { return float64(math.Float32frombits(binary.LittleEndian.Uint32(b))) }
	case savedmodel.Float64:
		at = func(b []byte) float64 { return math.Float64frombits(binary.LittleEndian.Uint64(b)) }
	case savedmodel.Bfloat16:
		at = func(b []byte) float64 { return float64(tensor.FromBfloat(binary.LittleEndian.Uint16(b))) }
	case savedmodel.Float16:
		at = func(b []byte) float64 { return float64(tensor.FromHalf(binary.LittleEndian.Uint16(b))) }
	default:
		return nil, false
	}
	list := make([]float64, len(o.Data)/size)
	for i := range list {
		list[i] = at(o.Data[i*size:])
	}
	return list, true
}
