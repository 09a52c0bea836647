package protocol

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestMappingsAreWrittenAsRead(t *testing.T) {
	for text, want := range map[string]Inputs{
		`{}`:                           {},
		`{"z":"c","a":"d"}`:            {{Tensor: "z", Column: "c"}, {Tensor: "a", Column: "d"}},
		`{"x":{"column":"c"}}`:         {{Tensor: "x", Column: "c"}},
		`{"x":{"column":"c","pad":0}}`: {{Tensor: "x", Column: "c", Pad: []byte("0")}},
		`{"x":{"column":"c","encoding":"raw"},"y":{"column":"d","pad":"<p>","lengths":"n"}}`: {
			{Tensor: "x", Column: "c", Encoding: "raw"},
			{Tensor: "y", Column: "d", Pad: []byte(`"<p>"`), Lengths: "n"}},
	} {
		var got, again Inputs
		if err := json.Unmarshal([]byte(text), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %+v, %v", text, got, err)
		}
		written, err := json.Marshal(got)
		if err != nil || json.Unmarshal(written, &again) != nil || len(again) != len(got) {
			t.Fatalf("%s was written as %s: %v", text, written, err)
		}
		if twice, err := json.Marshal(again); err != nil || string(twice) != string(written) {
			t.Errorf("%s was written as %s, then as %s, %v", text, written, twice, err)
		}
	}
	if short, err := json.Marshal(Inputs{{Tensor: "x", Column: "c"}}); string(short) != `{"x":"c"}` || err != nil {
		t.Errorf("the short form is %s, %v", short, err)
	}
	for text, want := range map[string]Outputs{
		`{"z":"c","a":"d"}`: {{Tensor: "z", Column: "c"}, {Tensor: "a", Column: "d"}},
		`{"x":{"column":"c","type":"utf8","shape":[-1,3]}}`: {{Tensor: "x", Column: "c", Type: "utf8",
			Shape: []int64{-1, 3}}},
	} {
		var got Outputs
		if err := json.Unmarshal([]byte(text), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %+v, %v", text, got, err)
		}
		if written, err := json.Marshal(got); string(written) != text || err != nil {
			t.Errorf("%s was written as %s, %v", text, written, err)
		}
	}
}

func TestMappingsRefuse(t *testing.T) {
	for text, part := range map[string]string{
		`null`:                               "must be an object",
		`["x"]`:                              "must be an object",
		`{"x":"c","x":"d"}`:                  `tensor "x" is mapped twice`,
		`{"x":null}`:                         `tensor "x": want a column's name`,
		`{"x":1}`:                            `tensor "x": want a column's name`,
		`{"x":""}`:                           `tensor "x" is mapped to no column`,
		`{"x":{}}`:                           `tensor "x" is mapped to no column`,
		`{"x":{"column":null}}`:              `field "column" must not be null`,
		`{"x":{"column":1}}`:                 `field "column"`,
		`{"x":{"Column":"c"}}`:               `unknown field "Column"`,
		`{"x":{"column":"c","PAD":0}}`:       `unknown field "PAD"`,
		`{"x":{"column":"c","pad":null}}`:    `field "pad" must not be null`,
		`{"x":{"column":"c","column":"d"}}`:  `field "column" occurs twice`,
		`{"x":{"column":"c","type":"utf8"}}`: `unknown field "type"`,
	} {
		var in Inputs
		if err := json.Unmarshal([]byte(text), &in); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", text, err, part)
		}
	}
	for text, part := range map[string]string{
		`{"x":{"column":"c","pad":0}}`:           `unknown field "pad"`,
		`{"x":{"column":"c","shape":3}}`:         `field "shape"`,
		`{"x":{"column":"c","shape":[-1,null]}}`: `field "shape" must not be null`,
		`{"x":{"column":"c","shape":[-1,1.5]}}`:  `field "shape"`,
	} {
		var out Outputs
		if err := json.Unmarshal([]byte(text), &out); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", text, err, part)
		}
	}
}
