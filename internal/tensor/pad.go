package tensor

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"strconv"

	"flightsvc/internal/savedmodel"
)

// padding encodes a JSON value as one element of a dtype: a number for numeric dtypes, a string for strings, a bool for
// bools.
func padding(value json.RawMessage, dtype savedmodel.DType) ([]byte, error) {
	refused := func(want string) error { return fmt.Errorf("pad must be %s for %s", want, dtype) }
	switch dtype {
	case savedmodel.String:
		var text *string
		if json.Unmarshal(value, &text) != nil || text == nil {
			return nil, refused("a string")
		}
		return []byte(*text), nil
	case savedmodel.Bool:
		var yes *bool
		if json.Unmarshal(value, &yes) != nil || yes == nil {
			return nil, refused("true or false")
		}
		if *yes {
			return []byte{1}, nil
		}
		return []byte{0}, nil
	}
	var number *json.Number
	if json.Unmarshal(value, &number) != nil || number == nil || value[0] == '"' {
		return nil, refused("a number")
	}
	bits := 8 * dtype.Size()
	element := make([]byte, 8)
	switch dtype {
	case savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64:
		n, err := strconv.ParseInt(number.String(), 10, bits)
		if err != nil {
			return nil, refused(fmt.Sprintf("a whole number from %d to %d", int64(-1)<<(bits-1), int64(1)<<(bits-1)-1))
		}
		binary.LittleEndian.PutUint64(element, uint64(n))
	case savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Uint64:
		n, err := strconv.ParseUint(number.String(), 10, bits)
		if err != nil {
			return nil, refused("a whole number, " + ranges[dtype])
		}
		binary.LittleEndian.PutUint64(element, n)
	case savedmodel.Float64:
		x, err := strconv.ParseFloat(number.String(), 64)
		if err != nil {
			return nil, refused("a number that is in range")
		}
		binary.LittleEndian.PutUint64(element, math.Float64bits(x))
	case savedmodel.Float32, savedmodel.Float16, savedmodel.Bfloat16:
		x, err := strconv.ParseFloat(number.String(), 32)
		half, inf := toHalf(float32(x)), uint16(infHalf)
		if dtype == savedmodel.Bfloat16 {
			half, inf = toBfloat(float32(x)), infBfloat
		}
		if err != nil || dtype != savedmodel.Float32 && half&0x7fff == inf {
			return nil, refused("a number that is in range")
		}
		binary.LittleEndian.PutUint32(element, math.Float32bits(float32(x)))
		if dtype != savedmodel.Float32 {
			binary.LittleEndian.PutUint16(element, half)
		}
	default:
		return nil, fmt.Errorf("%s has no padding", dtype)
	}
	return element[:dtype.Size()], nil
}
