package tensor

import (
	"encoding/json"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"

	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// FuzzMapping feeds the mappings of a descriptor to signatures of all dtypes: a plan whose schema has
// a column for each output, or a fault of the caller.
func FuzzMapping(f *testing.F) {
	for dtype := range byte(24) {
		f.Add(dtype, `{"x":"c"}`, `{"y":"d"}`, false)
		f.Add(dtype, `{"x":{"column":"c","pad":0,"lengths":"n"}}`, `{"y":{"column":"d","shape":[-1,3]}}`, true)
		f.Add(dtype, `{"x":{"column":"c","pad":1.5},"n":"c"}`, `{"z":"1","y":{"column":"d","type":"utf8"}}`, false)
	}
	f.Add(byte(7), `{"x":{"column":"c","pad":"\ud800"}}`, `{}`, true)
	f.Add(byte(10), `{"x":{"column":"c","pad":true}}`, `null`, true)
	f.Add(byte(1), `{"x":{"column":"c","encoding":"raw"}}`, `{"y":{"column":"d","shape":[-1,4294967296,4294967296]}}`,
		true)
	f.Add(byte(2), `{"x":{"column":"c","pad":1e999}}`, `{"y":{"column":"d","shape":[]}}`, false)
	f.Fuzz(func(t *testing.T, dtype byte, inputs, outputs string, dense bool) {
		fuzztest.Bounded(t, 64<<20, func() {
			options := Options{ErrorColumn: "error"}
			if json.Unmarshal([]byte(inputs), &options.Inputs) != nil ||
				json.Unmarshal([]byte(outputs), &options.Outputs) != nil {
				return
			}
			if dense {
				options.Layout = protocol.LayoutTensor
			}
			spec := func(name string, dtype savedmodel.DType, shape ...int64) savedmodel.Spec {
				return savedmodel.Spec{Name: name, Tensor: name + ":0", DType: dtype, Shape: shape,
					UnknownRank: shape == nil}
			}
			signature := savedmodel.Signature{
				Inputs: []savedmodel.Spec{spec("n", savedmodel.Int8, -1),
					spec("x", savedmodel.DType(dtype), -1, -1, 2)},
				Outputs: []savedmodel.Spec{spec("y", savedmodel.DType(dtype)), spec("z", savedmodel.Float32, -1, 2, 3)},
			}
			plan, err := NewPlan(signature, options)
			if err != nil {
				if kind, ok := fault.KindOf(err); !ok || kind != fault.BadRequest {
					t.Errorf("the error is %v", err)
				}
				return
			}
			if got := len(plan.Schema().Fields()); got != len(plan.Fetches())+1 {
				t.Errorf("%d columns for %d outputs", got, len(plan.Fetches()))
			}
		})
	})
}

// FuzzTensorShape feeds what a column's metadata says of its tensors: what passes has as many elements as its lists.
func FuzzTensorShape(f *testing.F) {
	f.Add(int32(6), `{"shape":[2,3]}`)
	f.Add(int32(6), `{"shape":[2,3],"permutation":[0,1],"dim_names":["a","b"]}`)
	f.Add(int32(6), `{"shape":[2,3],"permutation":[1,0]}`)
	f.Add(int32(1), `{"shape":[4294967296,4294967296]}`)
	f.Add(int32(4), `{"shape":[-2,-2]}`)
	f.Fuzz(func(t *testing.T, size int32, about string) {
		fuzztest.Bounded(t, 16<<20, func() {
			field := arrow.Field{
				Type: arrow.FixedSizeListOf(max(size, 1), arrow.PrimitiveTypes.Float32),
				Metadata: arrow.NewMetadata([]string{extensionName, extensionMetadata},
					[]string{tensorExtension, about}),
			}
			shape, err := tensorShape(field)
			if (err == nil) != (shape != nil) || err == nil && elements(shape) != int64(max(size, 1)) {
				t.Errorf("lists of %d have the shape %v, %v", max(size, 1), shape, err)
			}
		})
	})
}
