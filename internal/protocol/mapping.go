// Mappings: which column feeds which input, and which output becomes which column.

package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Inputs says which column feeds which input tensor, in the order of the request. In JSON it is an object,
// {"tensor": "column"} or {"tensor": {"column": "column", ...}} with the fields of Input.
type Inputs []Input

// Input is one entry of Inputs.
type Input struct {
	Tensor   string          `json:"-"`                  // input of the signature
	Column   string          `json:"column"`             // column of the stream
	Encoding string          `json:"encoding,omitempty"` // EncodingRaw: a cell holds the bytes of a row; "" for none
	Pad      json.RawMessage `json:"pad,omitempty"`      // number, string or bool that fills short lists; nil for none
	Lengths  string          `json:"lengths,omitempty"`  // input that receives each row's length; "" for none
}

// Outputs says which output tensor becomes which column, in the order of the columns. In JSON it is an object,
// {"tensor": "column"} or {"tensor": {"column": "column", ...}} with the fields of Output.
type Outputs []Output

// Output is one entry of Outputs.
type Output struct {
	Tensor string  `json:"-"`               // output of the signature
	Column string  `json:"column"`          // column of the answer
	Type   string  `json:"type,omitempty"`  // TypeUTF8 for text; "" for the column type of the dtype
	Shape  []int64 `json:"shape,omitempty"` // of an output whose shape the signature leaves open; begins with -1
}

// EncodingRaw and TypeUTF8 are the only values of Input.Encoding and Output.Type.
const (
	EncodingRaw = "raw"
	TypeUTF8    = "utf8"
)

// UnmarshalJSON keeps the object's order. It refuses a tensor or field that occurs twice, and unknown fields; upper and
// lower case differ.
func (in *Inputs) UnmarshalJSON(data []byte) error {
	*in = Inputs{}
	return entries(data, func(tensor string, value json.RawMessage) (string, error) {
		entry := Input{Tensor: tensor}
		err := decodeEntry(value, &entry.Column, &entry)
		*in = append(*in, entry)
		return entry.Column, err
	})
}

// MarshalJSON writes what UnmarshalJSON reads, in order. An entry with only a column has the short form.
func (in Inputs) MarshalJSON() ([]byte, error) {
	return writeEntries(len(in), func(i int) (string, any) {
		if in[i].Encoding == "" && in[i].Pad == nil && in[i].Lengths == "" {
			return in[i].Tensor, in[i].Column
		}
		return in[i].Tensor, in[i]
	})
}

// Find returns the entry of a tensor, and false if it has none.
func (in Inputs) Find(tensor string) (Input, bool) {
	i := slices.IndexFunc(in, func(entry Input) bool { return entry.Tensor == tensor })
	if i < 0 {
		return Input{}, false
	}
	return in[i], true
}

// UnmarshalJSON keeps the object's order. It refuses a tensor or field that occurs twice, and unknown fields; upper and
// lower case differ.
func (out *Outputs) UnmarshalJSON(data []byte) error {
	*out = Outputs{}
	return entries(data, func(tensor string, value json.RawMessage) (string, error) {
		entry := Output{Tensor: tensor}
		err := decodeEntry(value, &entry.Column, &entry)
		*out = append(*out, entry)
		return entry.Column, err
	})
}

// MarshalJSON writes what UnmarshalJSON reads, in order. An entry with only a column has the short form.
func (out Outputs) MarshalJSON() ([]byte, error) {
	return writeEntries(len(out), func(i int) (string, any) {
		if out[i].Type == "" && len(out[i].Shape) == 0 {
			return out[i].Tensor, out[i].Column
		}
		return out[i].Tensor, out[i]
	})
}

// entries calls set with the key and value of each entry of a mapping, in order, and refuses an entry without a column.
func entries(data []byte, set func(tensor string, value json.RawMessage) (column string, err error)) error {
	if data[0] != '{' {
		return errors.New("a mapping of tensors to columns must be an object")
	}
	return members(data, "tensor %q is mapped twice", func(tensor string, value json.RawMessage) error {
		column, err := set(tensor, value)
		if err != nil {
			return fmt.Errorf("tensor %q: %w", tensor, err)
		}
		if column == "" {
			return fmt.Errorf("tensor %q is mapped to no column", tensor)
		}
		return nil
	})
}

// decodeEntry reads an entry of a mapping: a column's name, or an object with the fields of entry.
func decodeEntry(data json.RawMessage, column *string, entry any) error {
	switch data[0] {
	case '"':
		return json.Unmarshal(data, column)
	case '{':
	default:
		return errors.New("want a column's name or {\"column\": name}")
	}
	if err := members(data, "field %q occurs twice", func(name string, value json.RawMessage) error {
		if string(value) == "null" || value[0] == '[' && bytes.Contains(value, []byte("null")) {
			return fmt.Errorf("field %q must not be null", name)
		}
		return nil
	}); err != nil {
		return err
	}
	return Decode(data, entry)
}

// writeEntries writes n members as one JSON object.
func writeEntries(n int, member func(i int) (name string, value any)) ([]byte, error) {
	out := []byte{'{'}
	for i := range n {
		if i > 0 {
			out = append(out, ',')
		}
		name, value := member(i)
		key, err := json.Marshal(name)
		if err != nil {
			return nil, err
		}
		text, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		out = append(append(append(out, key...), ':'), text...)
	}
	return append(out, '}'), nil
}
