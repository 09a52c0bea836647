// Tests of descriptors: what is read, what is refused.

package protocol

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/savedmodel"
)

func TestParseDescriptor(t *testing.T) {
	minimal := func(change func(*Descriptor)) *Descriptor {
		d := &Descriptor{
			V: 1, Model: "m", Version: "latest", Signature: savedmodel.DefaultSignature,
			OnError: "fail", ErrorColumn: "error", Nulls: "null", Device: "auto", Layout: "list",
		}
		change(d)
		return d
	}
	no, limit := false, int64(0)
	for name, c := range map[string]struct {
		text string
		want *Descriptor
	}{
		"defaults":       {`{"v":1,"model":"m"}`, minimal(func(*Descriptor) {})},
		"version number": {`{"v":1,"model":"m","version":7}`, minimal(func(d *Descriptor) { d.Version = "7" })},
		"version text":   {`{"v":1,"model":"m","version":"7"}`, minimal(func(d *Descriptor) { d.Version = "7" })},
		"version null":   {`{"v":1,"model":"m","version":null}`, minimal(func(*Descriptor) {})},
		"mapping order": {`{"v":1,"model":"m","outputs":{"z":"1","a":"2","m":"3"}}`, minimal(func(d *Descriptor) {
			d.Outputs = Outputs{{Tensor: "z", Column: "1"}, {Tensor: "a", Column: "2"}, {Tensor: "m", Column: "3"}}
		})},
		"long form": {`{"v":1,"model":"m","inputs":{"x":{"column":"c"},"y":"d"}}`,
			minimal(func(d *Descriptor) { d.Inputs = Inputs{{Tensor: "x", Column: "c"}, {Tensor: "y", Column: "d"}} })},
		"no run timeout": {`{"v":1,"model":"m","run_timeout_ms":0}`,
			minimal(func(d *Descriptor) { d.RunTimeoutMS = &limit })},
		"relay": {`{"v":1,"model":"m","redirect":false}`, minimal(func(d *Descriptor) { d.Redirect = &no })},
		"hints": {`{"v":1,"model":"m","plane":"shm","batching":{"max_batch_size":4}}`,
			minimal(func(d *Descriptor) { d.Plane, d.Batching = "shm", Batching{MaxBatchSize: 4} })},
		"choices": {`{"v":1,"model":"m","on_error":"column","error_column":"e","nulls":"fail","device":"cpu"}`,
			minimal(func(d *Descriptor) {
				d.OnError, d.ErrorColumn, d.Nulls, d.Device = "column", "e", "fail",
					"cpu"
			})},
		"gpu": {`{"v":1,"model":"m","device":"gpu"}`, minimal(func(d *Descriptor) { d.Device = "gpu" })},
		"uuid": {`{"v":1,"model":"m","device":"GPU-1c2d3e4f-0a1b-2c3d-4e5f-60718293a4b5"}`,
			minimal(func(d *Descriptor) { d.Device = "GPU-1c2d3e4f-0a1b-2c3d-4e5f-60718293a4b5" })},
		"old MIG uuid": {`{"v":1,"model":"m","device":"MIG-GPU-1c2d3e4f/1/0"}`,
			minimal(func(d *Descriptor) { d.Device = "MIG-GPU-1c2d3e4f/1/0" })},
		"addresses": {`{"v":1,"model":"m","device":"0,12"}`, minimal(func(d *Descriptor) { d.Device = "0,12" })},
		"picture defaults": {`{"v":1,"model":"m","preprocess":{"p":{"size":[2,3]}}}`, minimal(func(d *Descriptor) {
			d.Preprocess = map[string]Preprocess{"p": {Size: []int{2, 3}, Resize: "bilinear", Fit: "crop",
				Channels: "RGB"}}
		})},
		"picture scale": {`{"v":1,"model":"m","preprocess":{"p":{"size":[2,3],"scale":0.5,"offset":[1,2,3]}}}`,
			minimal(func(d *Descriptor) {
				d.Preprocess = map[string]Preprocess{"p": {Size: []int{2, 3}, Resize: "bilinear", Fit: "crop",
					Channels: "RGB", Scale: channels{.5, .5, .5}, Offset: channels{1, 2, 3}}}
			})},
		"picture in all its fields": {`{"v":1,"model":"m","preprocess":{"p":{"size":[2,3],"resize":"bicubic",
			"antialias":true,"fit":"pad","channels":"L","scale":2,"offset":[3],
			"dtype":"uint8"}}}`, minimal(func(d *Descriptor) {
			d.Preprocess = map[string]Preprocess{"p": {Size: []int{2, 3}, Resize: "bicubic", Antialias: true,
				Fit: "pad", Channels: "L", Scale: channels{2, 2, 2}, Offset: channels{3}, DType: "uint8"}}
		})},
		"built-in model": {`{"v":1,"model":"image"}`, minimal(func(d *Descriptor) {
			d.Model, d.Preprocess = "image", map[string]Preprocess{"image": {}}
		})},
		"built-in model of nothing": {`{"v":1,"model":"image","preprocess":{}}`, minimal(func(d *Descriptor) {
			d.Model, d.Preprocess = "image", map[string]Preprocess{"image": {}}
		})},
		"built-in model resizes": {`{"v":1,"model":"image","preprocess":{"image":{"size":[2,3],"channels":"L"}}}`,
			minimal(func(d *Descriptor) {
				d.Model, d.Preprocess = "image", map[string]Preprocess{"image": {Size: []int{2, 3}, Resize: "bilinear",
					Fit: "crop", Channels: "L"}}
			})},
		"whitespace around": {" {\"v\":1,\"model\":\"m\"}\n", minimal(func(*Descriptor) {})},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseDescriptor([]byte(c.text))
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("read %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

func TestParseDescriptorRefuses(t *testing.T) {
	in := func(fields string) string { return fmt.Sprintf(`{"v":1,"model":"m",%s}`, fields) }
	for name, c := range map[string]struct {
		text  string
		parts []string
	}{
		"nothing":             {``, []string{"EOF"}},
		"no object":           {`[]`, []string{"descriptor:"}},
		"cut off":             {`{"v":1,`, []string{"unexpected EOF"}},
		"text behind":         {`{"v":1,"model":"m"} {}`, []string{"text after the object"}},
		"no v":                {`{"model":"m"}`, []string{"v is 0", "speaks 1"}},
		"wrong v":             {`{"v":2,"model":"m"}`, []string{"v is 2", "speaks 1"}},
		"no model":            {`{"v":1}`, []string{"model is missing"}},
		"unknown field":       {in(`"modle":"m"`), []string{`unknown field "modle"`}},
		"unknown lease field": {in(`"lease":{"key":1}`), []string{`unknown field "key"`}},
		"duplicate key":       {in(`"inputs":{"x":"a","x":"b"}`), []string{`tensor "x" is mapped twice`}},
		"unknown column field": {in(`"inputs":{"x":{"column":"c","encodings":"raw"}}`), []string{`tensor "x"`,
			`unknown field "encodings"`}},
		"no column":           {in(`"outputs":{"x":""}`), []string{`tensor "x" is mapped to no column`}},
		"mapping is a list":   {in(`"inputs":["x"]`), []string{"must be an object"}},
		"column is a number":  {in(`"inputs":{"x":1}`), []string{`tensor "x": want a column's name`}},
		"version of no kind":  {in(`"version":1.5`), []string{"version must be a number"}},
		"negative version":    {in(`"version":-1`), []string{"version must be a number"}},
		"on_error":            {in(`"on_error":"skip"`), []string{`on_error is "skip"`, `"fail" "null" "column"`}},
		"nulls":               {in(`"nulls":"zero"`), []string{`nulls is "zero"`}},
		"device":              {in(`"device":"tpu"`), []string{`device is "tpu"`, `"auto" "cpu" "gpu"`}},
		"device of one comma": {in(`"device":"0,"`), []string{`device is "0,"`}},
		"device among others": {in(`"device":"cpu,0"`), []string{`device is "cpu,0"`}},
		"layout":              {in(`"layout":"rows"`), []string{`layout is "rows"`, `"list" "tensor"`}},
		"field in capitals":   {in(`"Device":"cpu"`), []string{`unknown field "Device"`}},
		"field twice":         {in(`"device":"cpu","device":"auto"`), []string{`"device" occurs twice`}},
		"batching word":       {in(`"batching":"on"`), []string{`batching is "on"`, `"off"`}},
		"batching field": {in(`"batching":{"max_batch_sizes":1}`),
			[]string{`batching: unknown field "max_batch_sizes"`}},
		"batching in capitals": {in(`"batching":{"Max_Batch_Size":4}`), []string{`unknown field "Max_Batch_Size"`}},
		"v of text":            {`{"v":"1","model":"m"}`, []string{"string", "v"}},
		"V":                    {`{"V":1,"model":"m"}`, []string{`unknown field "V"`}},
		"version of an object": {in(`"version":{}`), []string{"version must be a number"}},
		"batching below 0":     {in(`"batching":{"max_batch_size":-1}`), []string{"cannot be negative"}},
		"preprocess field": {in(`"preprocess":{"p":{"size":[1,1],"Size":[2,2]}}`),
			[]string{`unknown field "Size"`}},
		"run timeout of years": {in(`"run_timeout_ms":18446744073710`), []string{"run_timeout_ms is 18446744073710",
			"up to 604800000"}},
		"run timeout": {in(`"run_timeout_ms":-1`), []string{"run_timeout_ms is -1"}},
		"picture without size": {in(`"preprocess":{"p":{}}`), []string{`preprocess of "p"`,
			"size is missing; want [height, width]"}},
		"picture of size 0": {in(`"preprocess":{"p":{"size":[0,1]}}`), []string{"from 1 to 16384"}},
		"picture too large": {in(`"preprocess":{"p":{"size":[1,16385]}}`), []string{"from 1 to 16384"}},
		"picture of three":  {in(`"preprocess":{"p":{"size":[1,1,3]}}`), []string{"size must be"}},
		"picture resize": {in(`"preprocess":{"p":{"size":[1,1],"resize":"lanczos"}}`),
			[]string{`resize is "lanczos"`, `"area"`}},
		"picture fit": {in(`"preprocess":{"p":{"size":[1,1],"fit":"box"}}`), []string{`fit is "box"`,
			`"stretch"`}},
		"picture channels": {in(`"preprocess":{"p":{"size":[1,1],"channels":"rgb"}}`),
			[]string{`channels is "rgb"`, `"BGR"`}},
		"picture dtype": {in(`"preprocess":{"p":{"size":[1,1],"dtype":"int8"}}`), []string{`dtype is "int8"`,
			"uint8"}},
		"nearest antialias": {in(`"preprocess":{"p":{"size":[1,1],"resize":"nearest","antialias":true}}`),
			[]string{"antialias works with bilinear and bicubic"}},
		"picture scale of two": {in(`"preprocess":{"p":{"size":[1,1],"scale":[1,2]}}`),
			[]string{"a number or a list with one for each channel"}},
		"picture scale of null": {in(`"preprocess":{"p":{"size":[1,1],"scale":null}}`),
			[]string{"a number or a list with one for each channel"}},
		"one scale for three": {in(`"preprocess":{"p":{"size":[1,1],"scale":[1]}}`),
			[]string{"scale has 1 numbers, but RGB has 3 channels"}},
		"three scales for one": {in(`"preprocess":{"p":{"size":[1,1],"channels":"L","offset":[1,2,3]}}`),
			[]string{"offset has 3 numbers, but L has 1 channels"}},
		"built-in scale": {`{"v":1,"model":"image","preprocess":{"image":{"scale":2}}}`,
			[]string{"scale, offset and dtype are for tensors"}},
		"built-in RGB": {`{"v":1,"model":"image","preprocess":{"image":{"channels":"RGB"}}}`,
			[]string{`channels is "RGB"`, `"BGR"`}},
		"built-in fit": {`{"v":1,"model":"image","preprocess":{"image":{"fit":"pad"}}}`,
			[]string{"need a size"}},
		"too long": {`{"v":1,"model":"` + strings.Repeat("m", MaxDescriptorBytes) + `"}`,
			[]string{"bytes, more than 65536"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseDescriptor([]byte(c.text))
			expect.Fault(t, err, fault.BadRequest, c.parts...)
		})
	}
}

func TestScales(t *testing.T) {
	plain := Preprocess{}
	if plain.Scales() != [3]float32{1, 1, 1} || plain.Offsets() != [3]float32{} {
		t.Errorf("the defaults are %v and %v", plain.Scales(), plain.Offsets())
	}
	set := Preprocess{Scale: channels{2, 3, 4}, Offset: channels{5, 6, 7}}
	if set.Scales() != [3]float32{2, 3, 4} || set.Offsets() != [3]float32{5, 6, 7} {
		t.Errorf("set to %v and %v", set.Scales(), set.Offsets())
	}
}

// fuzzBytes bounds the memory that a JSON text may take while it is read.
const fuzzBytes = 64 << 20

// FuzzParseDescriptor checks that no bytes do harm, and that a ticket means what its descriptor meant: what was read
// and written is read as the same.
func FuzzParseDescriptor(f *testing.F) {
	for _, seed := range []string{
		`{"v":1,"model":"m"}`,
		`{"v":1,"model":"m","version":3,"inputs":{"x":{"column":"c"}},"outputs":{"b":"1","a":"2"}}`,
		`{"v":1,"model":"m","preprocess":{"p":{"size":[2,3],"scale":0.0078125,"offset":[-1,0,1e-9]}},
			"run_timeout_ms":0,"redirect":false}`,
		`{"v":1,"model":"m","batching":"off","plane":"shm","on_error":"column",
			"lease":{"id":"i","expires":1,"mac":"m"}}`,
		`{"v":1,"model":"\ud800","request_id":"é"}`, `{"v":1e0}`, `null`, `{`, "\xff",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		fuzztest.Bounded(t, fuzzBytes, func() {
			d, err := ParseDescriptor(data)
			if err != nil {
				expect.Fault(t, err, fault.BadRequest)
				return
			}
			written, err := d.Command()
			if err != nil {
				t.Fatalf("%q cannot be written again: %v", data, err)
			}
			if len(written) > MaxDescriptorBytes {
				return // escapes are longer than what they stand for
			}
			again, err := ParseDescriptor(written)
			if err != nil {
				t.Fatalf("%q was written as %q: %v", data, written, err)
			}
			if twice, err := again.Command(); err != nil || string(twice) != string(written) {
				t.Fatalf("%q was written as %q, then as %q, %v", data, written, twice, err)
			}
		})
	})
}
