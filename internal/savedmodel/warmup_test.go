// Tests of warm-up requests, against tensors that TensorFlow made.

package savedmodel

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	tensorpb "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_go_proto"
	framework "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_shape_go_proto"
	"github.com/galeone/tensorflow/tensorflow/go/core/framework/types_go_proto"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"flightsvc/internal/fuzztest"
)

// readAll returns the records up to the first error, and that.
func readAll(data []byte) ([]Warmup, error) { return readMost(data, maxWarmupBytes) }

func readMost(data []byte, most int64) (records []Warmup, err error) {
	for w, err := range readWarmups(bytes.NewReader(data), most) {
		if err != nil {
			return records, err
		}
		records = append(records, w)
	}
	return records, nil
}

// TestReadWarmups reads a file that TF Serving's own messages were written to, and compares each tensor with what
// TensorFlow makes of it; testdata/make_warmup.py wrote both.
func TestReadWarmups(t *testing.T) {
	data, err := os.ReadFile("testdata/warmup.tfrecord")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("testdata/warmup.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]struct {
		DType   string
		Shape   []int64
		Data    string
		Strings []string
	}
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	records, err := readAll(data)
	if err != nil || len(records) != 3 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	first := records[0]
	if first.Number != 1 || first.Signature != "other" || !slices.Equal(first.Outputs, []string{"y", "z"}) ||
		first.Skipped != "" || len(first.Inputs) != len(want) {
		t.Errorf("the first has signature %q, outputs %q and %d inputs of %d", first.Signature, first.Outputs,
			len(first.Inputs), len(want))
	}
	for name, w := range want {
		got := first.Inputs[name]
		var texts []string
		for _, s := range got.Strings {
			texts = append(texts, hex.EncodeToString(s))
		}
		if got.DType.String() != w.DType || !slices.Equal(got.Shape, w.Shape) ||
			hex.EncodeToString(got.Data) != w.Data || !slices.Equal(texts, w.Strings) {
			t.Errorf("%s is %v %v %x %q, want %+v", name, got.DType, got.Shape, got.Data, texts, w)
		}
	}
	if r := records[1]; r.Number != 2 || r.Signature != DefaultSignature || r.Outputs != nil || len(r.Inputs) != 1 {
		t.Errorf("the second is %+v", r)
	}
	if r := records[2]; r.Skipped != "classify_log" || r.Inputs != nil {
		t.Errorf("the third is %+v", r)
	}
}

// frame writes a record as TFRecord has it.
func frame(record []byte) []byte {
	data := binary.LittleEndian.AppendUint64(nil, uint64(len(record)))
	data = binary.LittleEndian.AppendUint32(data, masked(data))
	data = append(data, record...)
	return binary.LittleEndian.AppendUint32(data, masked(record))
}

// nest writes a message that has one field, which is a message that has one field, and so on.
func nest(content []byte, fields ...protowire.Number) []byte {
	for _, field := range slices.Backward(fields) {
		content = protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), content)
	}
	return content
}

// predict is a record with one input.
func predict(t testing.TB, dtype types_go_proto.DataType, change func(*tensorpb.TensorProto), dims ...int64) []byte {
	t.Helper()
	content := &tensorpb.TensorProto{Dtype: dtype, TensorShape: &framework.TensorShapeProto{}}
	for _, d := range dims {
		content.TensorShape.Dim = append(content.TensorShape.Dim, &framework.TensorShapeProto_Dim{Size: d})
	}
	if change != nil {
		change(content)
	}
	data, err := proto.Marshal(content)
	if err != nil {
		t.Fatal(err)
	}
	entry := append(nest([]byte("x"), fieldMapKey), nest(data, fieldMapValue)...)
	return nest(entry, fieldPredictLog, fieldPredictRequest, fieldInputs)
}

func TestReadWarmupsRefuses(t *testing.T) {
	float, text := types_go_proto.DataType_DT_FLOAT, types_go_proto.DataType_DT_STRING
	good := frame(predict(t, float, nil, 2))
	flipped := func(at int) []byte {
		data := bytes.Clone(good)
		data[at] ^= 1
		return data
	}
	long := binary.LittleEndian.AppendUint64(nil, 1<<40)
	long = binary.LittleEndian.AppendUint32(long, masked(long))
	content := func(raw string) func(*tensorpb.TensorProto) {
		return func(c *tensorpb.TensorProto) { c.TensorContent = []byte(raw) }
	}
	many := make([]int64, 300)
	for i := range many {
		many[i] = 1
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"another file":     {[]byte("this is not a TFRecord file"), "the checksum of its length is wrong"},
		"a damaged length": {flipped(0), "the checksum of its length is wrong"},
		"damaged data":     {flipped(20), "the checksum of its data is wrong"},
		"a cut head":       {good[:5], "ends in the middle"},
		"cut data":         {good[:20], "ends in the middle"},
		"a cut checksum":   {good[:len(good)-1], "ends in the middle"},
		"a huge length":    {long, "has 1099511627776 bytes"},
		"an empty record":  {frame(nil), "no predict_log.request"},
		"no message":       {frame([]byte("no message")), "proto"},
		"a quantised type": {frame(predict(t, types_go_proto.DataType_DT_QINT8, nil, 2)),
			`input "x": a tensor of dtype(11) cannot be fed`},
		"an unknown size": {frame(predict(t, float, nil, 2, -1)), "its shape is [2 -1]"},
		"an unknown rank": {frame(predict(t, float,
			func(c *tensorpb.TensorProto) { c.TensorShape.UnknownRank = true })), "unknown"},
		"a huge tensor": {frame(predict(t, float, nil, 1<<40, 1<<40)), "more than 256 MiB"},
		"too many dims": {frame(predict(t, float, nil, many...)), "300 dimensions"},
		"too few bytes": {frame(predict(t, float, content("1234"), 2)),
			"it has 4 bytes of tensor_content; a float32 tensor of shape [2] has 8"},
		"too many values": {frame(predict(t, float, func(c *tensorpb.TensorProto) {
			c.FloatVal = []float32{1, 2,
				3}
		}, 2)), "3 values for the shape [2]"},
		"too many strings": {frame(predict(t, text, func(c *tensorpb.TensorProto) {
			c.StringVal = [][]byte{nil,
				nil}
		}, 1)), "2 values for the shape [1]"},
		"strings cut":        {frame(predict(t, text, content("\x01\x05ab"), 2)), "ends too soon"},
		"strings' lengths":   {frame(predict(t, text, content("\x01"), 2)), "ends too soon"},
		"strings left over":  {frame(predict(t, text, content("\x01\x01abc"), 2)), "too long"},
		"too many records":   {bytes.Repeat(good, MaxWarmups+1), "more than 1000 records"},
		"a good, then a bad": {append(bytes.Clone(good), "x"...), "ends in the middle"},
	} {
		if _, err := readAll(c.data); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if records, err := readAll(frame(predict(t, text, content("\x01\x02abc"), 2))); err != nil ||
		string(records[0].Inputs["x"].Strings[1]) != "bc" {
		t.Errorf("strings in tensor_content: %v", err)
	}
	lying := frame(predict(t, text, func(c *tensorpb.TensorProto) { c.StringVal = [][]byte{make([]byte, 1000)} }, 100))
	if _, err := readMost(lying, 50_000); err == nil || !strings.Contains(err.Error(), "MiB of tensors") {
		t.Errorf("a string of 1,000 bytes, 100 times, in 50,000: %v", err)
	}
	if _, err := readMost(lying, 102_400); err != nil {
		t.Error(err)
	}
	if records, err := readAll(bytes.Repeat(good, MaxWarmups)); err != nil || len(records) != MaxWarmups {
		t.Errorf("%d records, %v", len(records), err)
	}
}

// FuzzWarmup feeds the reader damaged records, behind a checksum that fits: each must be an error or a record whose
// tensors are whole.
func FuzzWarmup(f *testing.F) {
	f.Add(predict(f, types_go_proto.DataType_DT_FLOAT, func(c *tensorpb.TensorProto) { c.FloatVal = []float32{1} }, 2,
		3))
	f.Add(predict(f, types_go_proto.DataType_DT_STRING,
		func(c *tensorpb.TensorProto) { c.TensorContent = []byte("\x01\x02abc") }, 2))
	f.Add(predict(f, types_go_proto.DataType_DT_HALF,
		func(c *tensorpb.TensorProto) { c.TensorContent = []byte("1234") }, 2))
	f.Add(nest(nil, 2))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		const most = 1 << 20 // so that there are many executions
		fuzztest.Bounded(t, 64*most+16*uint64(len(data)), func() {
			_, _ = readMost(data, most) // as a file
			records, err := readMost(frame(data), most)
			if (err == nil) != (len(records) == 1) {
				t.Fatalf("%d records, %v", len(records), err)
			}
			for _, w := range records {
				for name, c := range w.Inputs {
					n := 1
					for _, d := range c.Shape {
						n *= int(d)
					}
					if c.DType == String && len(c.Strings) != n || c.DType != String &&
						len(c.Data) != n*c.DType.Size() {
						t.Errorf("%q is %v of shape %v with %d bytes and %d strings", name, c.DType, c.Shape,
							len(c.Data), len(c.Strings))
					}
				}
			}
		})
	})
}
