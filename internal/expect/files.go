package expect

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/galeone/tensorflow/tensorflow/go/core/framework/types_go_proto"
	corepb "github.com/galeone/tensorflow/tensorflow/go/core/protobuf/for_core_protos_go_proto"
	"google.golang.org/protobuf/proto"
)

// Write writes a file, and makes the folders above it.
func Write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// SavedModel is a saved_model.pb with one signature, serving_default, from x to y.
var SavedModel = sync.OnceValue(func() string {
	tensor := func(name string) map[string]*corepb.TensorInfo {
		return map[string]*corepb.TensorInfo{name: {Encoding: &corepb.TensorInfo_Name{Name: name + ":0"},
			Dtype: types_go_proto.DataType_DT_FLOAT}}
	}
	data, err := proto.Marshal(&corepb.SavedModel{MetaGraphs: []*corepb.MetaGraphDef{{
		MetaInfoDef:  &corepb.MetaGraphDef_MetaInfoDef{Tags: []string{"serve"}},
		SignatureDef: map[string]*corepb.SignatureDef{"serving_default": {Inputs: tensor("x"), Outputs: tensor("y")}},
	}}})
	if err != nil {
		panic(err)
	}
	return string(data)
})
