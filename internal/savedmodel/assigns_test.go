package savedmodel_test

import (
	"path/filepath"
	"testing"

	"flightsvc/internal/savedmodel"
)

// The models are TensorFlow's own exports, made by pyspark-shim/tests/make_models.py.
func TestReadFindsSignaturesThatWrite(t *testing.T) {
	for _, test := range []struct{ model, signature, assigns string }{
		{"counter", "serving_default", "AssignAddVariableOp"},
		{"counter", "pure", ""},
		{"mlp", "serving_default", ""},
		{"two", "flipped", ""},
		{"slow", "serving_default", ""},
	} {
		t.Run(test.model+"/"+test.signature, func(t *testing.T) {
			model, err := savedmodel.Read(t.Context(), filepath.Join("..", "..", "build", "models", test.model), nil)
			if err != nil {
				t.Fatalf("%v; make build/models/.done makes the models", err)
			}
			signature, err := model.Signature(test.signature)
			if err != nil {
				t.Fatal(err)
			}
			if signature.Assigns != test.assigns {
				t.Errorf("assigns %q, want %q", signature.Assigns, test.assigns)
			}
		})
	}
}
