// Tests of what is read from saved_model.pb.

package savedmodel

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	framework "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_shape_go_proto"
	"github.com/galeone/tensorflow/tensorflow/go/core/framework/types_go_proto"
	corepb "github.com/galeone/tensorflow/tensorflow/go/core/protobuf/for_core_protos_go_proto"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
)

func info(name string, dtype types_go_proto.DataType, dims ...int64) *corepb.TensorInfo {
	shape := &framework.TensorShapeProto{}
	for _, d := range dims {
		shape.Dim = append(shape.Dim, &framework.TensorShapeProto_Dim{Size: d})
	}
	return &corepb.TensorInfo{Encoding: &corepb.TensorInfo_Name{Name: name}, Dtype: dtype, TensorShape: shape}
}

func metaGraph(signatures map[string]*corepb.SignatureDef, tags ...string) *corepb.MetaGraphDef {
	return &corepb.MetaGraphDef{MetaInfoDef: &corepb.MetaGraphDef_MetaInfoDef{Tags: tags}, SignatureDef: signatures}
}

// write makes a SavedModel of the given meta graphs in a new folder.
func write(t testing.TB, graphs ...*corepb.MetaGraphDef) string {
	t.Helper()
	data, err := proto.Marshal(&corepb.SavedModel{SavedModelSchemaVersion: 1, MetaGraphs: graphs})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, File), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func sample() map[string]*corepb.SignatureDef {
	unknown := info("u:0", types_go_proto.DataType_DT_STRING)
	unknown.TensorShape = &framework.TensorShapeProto{UnknownRank: true}
	bare := info("n:0", types_go_proto.DataType_DT_HALF)
	bare.TensorShape = nil
	return map[string]*corepb.SignatureDef{
		DefaultSignature: {
			Inputs: map[string]*corepb.TensorInfo{"b": info("b:0", types_go_proto.DataType_DT_INT64, -1, 3),
				"a": info("a:0", types_go_proto.DataType_DT_FLOAT, -7)},
			Outputs: map[string]*corepb.TensorInfo{"u": unknown, "s": info("s:1", types_go_proto.DataType_DT_BOOL),
				"n": bare},
		},
		"__saved_model_init_op": {Outputs: map[string]*corepb.TensorInfo{"x": info("x:0",
			types_go_proto.DataType_DT_INVALID)}},
		"other": {Inputs: map[string]*corepb.TensorInfo{"q": info("q:0",
			types_go_proto.DataType_DT_QINT8, -1)}},
	}
}

func TestRead(t *testing.T) {
	dir := write(t, metaGraph(nil, "train"), metaGraph(sample(), "gpu", ServeTag), metaGraph(nil, ServeTag))
	model, err := Read(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(model.Names(), " "); got != "other serving_default" {
		t.Errorf("the signatures are %s", got)
	}
	got, err := model.Signature(DefaultSignature)
	if err != nil {
		t.Fatal(err)
	}
	want := Signature{
		Inputs: []Spec{{Name: "a", Tensor: "a:0", DType: Float32, Shape: []int64{-1}},
			{Name: "b", Tensor: "b:0", DType: Int64, Shape: []int64{-1, 3}}},
		Outputs: []Spec{
			{Name: "n", Tensor: "n:0", DType: Float16, UnknownRank: true},
			{Name: "s", Tensor: "s:1", DType: Bool, Shape: []int64{}},
			{Name: "u", Tensor: "u:0", DType: String, UnknownRank: true},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("read\n%+v, want\n%+v", got, want)
	}
	if got := model.Signatures["other"].Inputs[0].DType.String(); got != "dtype(11)" {
		t.Errorf("a quantised type is called %s", got)
	}
	_, err = model.Signature("nope")
	if kind, _ := fault.KindOf(err); kind != fault.NotFound ||
		err.Error() != `no signature "nope"; this model has other, serving_default` {
		t.Errorf("an unknown signature gives %v", err)
	}
}

func TestReadRefuses(t *testing.T) {
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, File), []byte("this is no protocol buffer"), 0o600); err != nil {
		t.Fatal(err)
	}
	unreadable := t.TempDir()
	if err := os.Mkdir(filepath.Join(unreadable, File), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir  string
		kind fault.Kind
		part string
	}{
		"no such folder": {filepath.Join(broken, "nope"), fault.NotFound,
			"is not a SavedModel: it has no saved_model.pb"},
		"no SavedModel": {t.TempDir(), fault.NotFound, "is not a SavedModel: it has no saved_model.pb"},
		"broken file":   {broken, fault.BadRequest, filepath.Join(broken, File)},
		"a folder":      {unreadable, fault.Precondition, "read SavedModel"},
		"empty file":    {write(t), fault.BadRequest, `no meta graph has the tag "serve"`},
		"other tags": {write(t, metaGraph(sample(), "train")), fault.BadRequest,
			`no meta graph has the tag "serve"`},
		"no signature": {write(t, metaGraph(nil, ServeTag)), fault.BadRequest, "export the model with signatures"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Read(t.Context(), c.dir, nil)
			if kind, ok := fault.KindOf(err); !ok || kind != c.kind || !strings.Contains(err.Error(), c.part) {
				t.Errorf("kind %d, %v; want %d and %q", kind, err, c.kind, c.part)
			}
		})
	}
}

// FuzzParse feeds the parser damaged files: it must return a model or a fault, and a model's lists are whole.
func FuzzParse(f *testing.F) {
	data, err := proto.Marshal(&corepb.SavedModel{MetaGraphs: []*corepb.MetaGraphDef{metaGraph(sample(), ServeTag)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:len(data)/2])
	f.Add([]byte{})
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzztest.Bounded(t, 256<<20, func() {
			model, err := parse(newMessage(bytes.NewReader(data), int64(len(data))), nil)
			if (err == nil) == (model == nil) || err == nil && len(model.Names()) == 0 {
				t.Errorf("model %v, error %v", model, err)
			}
		})
	})
}

func TestDTypes(t *testing.T) {
	for dtype, known := range dtypes {
		if dtype.String() != known.name || dtype.Size() != known.size {
			t.Errorf("%d is %s of %d bytes", dtype, dtype, dtype.Size())
		}
	}
	if unknown := DType(1000); unknown.Size() != 0 || unknown.String() != "dtype(1000)" {
		t.Errorf("an unknown type is %s of %d bytes", unknown, unknown.Size())
	}
}
