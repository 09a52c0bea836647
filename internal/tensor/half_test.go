package tensor

import (
	"math"
	"testing"
)

// TestHalves goes through all 16-bit floats: each widens to its value and back; a number between two rounds to the
// nearer, and from the middle to the even one.
func TestHalves(t *testing.T) {
	for name, c := range map[string]struct {
		to       func(float32) uint16
		from     func(uint16) float32
		mantissa int
		bias     int
		inf      uint16
	}{
		"float16":  {toHalf, FromHalf, 10, 15, infHalf},
		"bfloat16": {toBfloat, FromBfloat, 7, 127, infBfloat},
	} {
		t.Run(name, func(t *testing.T) {
			for bits := range uint16(0x8000) {
				got := c.from(bits)
				if negative := c.from(bits | 0x8000); math.Float32bits(negative) != math.Float32bits(got)|1<<31 {
					t.Fatalf("%#x is %v, with a sign %v", bits, got, negative)
				}
				if bits > c.inf {
					if back := c.to(got); !math.IsNaN(float64(got)) || back&0x7fff <= c.inf {
						t.Fatalf("the NaN %#x became %v, then %#x", bits, got, back)
					}
					continue
				}
				fraction, exponent := int(bits)&(1<<c.mantissa-1), int(bits>>c.mantissa)
				want := math.Ldexp(float64(fraction), 1-c.bias-c.mantissa)
				switch {
				case bits == c.inf:
					want = math.Inf(1)
				case exponent > 0:
					want = math.Ldexp(float64(fraction+(1<<c.mantissa)), exponent-c.bias-c.mantissa)
				}
				if float64(got) != want || c.to(got) != bits || c.to(-got) != bits|0x8000 {
					t.Fatalf("%#x is %v, want %v; back it is %#x", bits, got, want, c.to(got))
				}
				if bits >= c.inf {
					continue
				}
				next := float64(c.from(bits + 1))
				if bits+1 == c.inf { // what would come next if there were no infinity
					next = math.Ldexp(2, c.bias)
				}
				middle := float32((want + next) / 2)
				if float64(middle) != (want+next)/2 {
					continue // below what a float32 can hold
				}
				even := bits + bits&1
				down, up := c.to(math.Nextafter32(middle, 0)), c.to(math.Nextafter32(middle, math.MaxFloat32))
				if c.to(middle) != even || down != bits || up != bits+1 {
					t.Fatalf("around the middle above %#x: %#x, %#x, %#x", bits, down, c.to(middle), up)
				}
			}
			if got := c.to(math.MaxFloat32); got != c.inf {
				t.Errorf("the largest float32 became %#x", got)
			}
		})
	}
}
