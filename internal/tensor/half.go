package tensor

import "math"

// float16 is IEEE 754 binary16; bfloat16 is the upper half of a float32. Arrow's float16.New is not used: it truncates,
// TensorFlow rounds to nearest even.

// The bits of infinity in both 16-bit types; larger values, without the sign, are NaN.
const (
	infHalf   = 0x7c00
	infBfloat = 0x7f80
)

// toHalf rounds to float16, to nearest even; what is too large becomes infinity.
func toHalf(x float32) uint16 {
	b := math.Float32bits(x)
	sign, b := uint16(b>>16)&0x8000, b&0x7fffffff
	switch {
	case b > 0x7f800000:
		return sign | 0x7e00
	case b >= 0x47800000: // 65536
		return sign | infHalf
	case b >= 0x38800000: // normal: drop 13 bits and 112 of the exponent; a carry increments the exponent
		return sign | uint16((b-112<<23+0xfff+b>>13&1)>>13)
	}
	// Subnormal: adding 0.5 rounds to multiples of 2^-24, the smallest float16.
	return sign | uint16(math.Float32bits(math.Float32frombits(b)+0.5)-math.Float32bits(0.5))
}

// FromHalf converts a float16, exactly.
func FromHalf(h uint16) float32 {
	sign, b := uint32(h&0x8000)<<16, uint32(h&0x7fff)
	switch {
	case b >= infHalf:
		b = 0x7f800000 | b<<13
	case b >= 0x400:
		b = b<<13 + 112<<23
	default:
		b = math.Float32bits(float32(b) * 0x1p-24)
	}
	return math.Float32frombits(sign | b)
}

// toBfloat rounds to bfloat16, to nearest even; what is too large becomes infinity.
func toBfloat(x float32) uint16 {
	b := math.Float32bits(x)
	if b&0x7fffffff > 0x7f800000 {
		return uint16(b>>16) | 0x40 // NaN stays NaN
	}
	return uint16((b + 0x7fff + b>>16&1) >> 16)
}

// FromBfloat converts a bfloat16, exactly.
func FromBfloat(h uint16) float32 { return math.Float32frombits(uint32(h) << 16) }
