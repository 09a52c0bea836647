package tensor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Inputs says which column feeds which input tensor, in the order in which it was written. In
// JSON it is an object, {"tensor": "column"} or {"tensor": {"column": "column", ...}} with the
// fields of Input.
type Inputs []Input

// Input is one entry of Inputs.
type Input struct {
	Tensor   string          // input of the signature
	Column   string          // column of the stream
	Encoding string          // "raw": binary cells hold the bytes of a row; "" for none
	Pad      json.RawMessage // number, string or bool that fills short lists; nil for none
	Lengths  string          // input that receives each row's length before padding; "" for none
}

// Outputs says which output tensor becomes which column, in the order of the columns. In JSON
// it is an object, {"tensor": "column"} or {"tensor": {"column": "column", ...}} with the
// fields of Output.
type Outputs []Output

// Output is one entry of Outputs.
type Output struct {
	Tensor string  // output of the signature
	Column string  // column of the answer
	Type   string  // "utf8" for text; "" for the column type of the dtype
	Shape  []int64 // shape of an output that the signature leaves open, first dimension -1; nil for none
}

// encodingRaw and typeUTF8 are the only values of Input.Encoding and Output.Type.
const (
	encodingRaw = "raw"
	typeUTF8    = "utf8"
)

// UnmarshalJSON keeps the object's order. It refuses a tensor or field that is named twice, and
// fields that are not known as they are written.
func (in *Inputs) UnmarshalJSON(data []byte) error {
	*in = Inputs{}
	return entries(data, func(tensor string, raw json.RawMessage) (string, error) {
		entry := Input{Tensor: tensor}
		err := fields(raw, map[string]any{"column": &entry.Column, "encoding": &entry.Encoding, "pad": &entry.Pad, "lengths": &entry.Lengths})
		*in = append(*in, entry)
		return entry.Column, err
	})
}

// MarshalJSON writes what UnmarshalJSON reads, in order, the short form where it says all.
func (in Inputs) MarshalJSON() ([]byte, error) {
	return writeEntries(len(in), func(i int) (string, any) {
		if in[i].Encoding == "" && in[i].Pad == nil && in[i].Lengths == "" {
			return in[i].Tensor, in[i].Column
		}
		return in[i].Tensor, struct {
			Column   string          `json:"column"`
			Encoding string          `json:"encoding,omitempty"`
			Pad      json.RawMessage `json:"pad,omitempty"`
			Lengths  string          `json:"lengths,omitempty"`
		}{in[i].Column, in[i].Encoding, in[i].Pad, in[i].Lengths}
	})
}

// find returns the entry of a tensor.
func (in Inputs) find(tensor string) (Input, bool) {
	i := slices.IndexFunc(in, func(entry Input) bool { return entry.Tensor == tensor })
	if i < 0 {
		return Input{}, false
	}
	return in[i], true
}

// Column returns the column that feeds a tensor, or "".
func (in Inputs) Column(tensor string) string {
	entry, _ := in.find(tensor)
	return entry.Column
}

// countInto returns how many entries give their lengths to a tensor.
func (in Inputs) countInto(tensor string) (n int) {
	for _, entry := range in {
		if entry.Lengths == tensor {
			n++
		}
	}
	return n
}

// UnmarshalJSON keeps the object's order. It refuses a tensor or field that is named twice, and
// fields that are not known as they are written.
func (out *Outputs) UnmarshalJSON(data []byte) error {
	*out = Outputs{}
	return entries(data, func(tensor string, raw json.RawMessage) (string, error) {
		entry := Output{Tensor: tensor}
		err := fields(raw, map[string]any{"column": &entry.Column, "type": &entry.Type, "shape": &entry.Shape})
		*out = append(*out, entry)
		return entry.Column, err
	})
}

// MarshalJSON writes what UnmarshalJSON reads, in order, the short form where it says all.
func (out Outputs) MarshalJSON() ([]byte, error) {
	return writeEntries(len(out), func(i int) (string, any) {
		if out[i].Type == "" && len(out[i].Shape) == 0 {
			return out[i].Tensor, out[i].Column
		}
		return out[i].Tensor, struct {
			Column string  `json:"column"`
			Type   string  `json:"type,omitempty"`
			Shape  []int64 `json:"shape,omitempty"`
		}{out[i].Column, out[i].Type, out[i].Shape}
	})
}

// entries gives the keys and values of a mapping to set, in order, each key once.
func entries(data []byte, set func(tensor string, raw json.RawMessage) (column string, err error)) error {
	return object(data, "a mapping of tensors to columns must be an object", "tensor %q is mapped twice", func(tensor string, raw json.RawMessage) error {
		column, err := set(tensor, raw)
		if err != nil {
			return fmt.Errorf("tensor %q: %w", tensor, err)
		}
		if column == "" {
			return fmt.Errorf("tensor %q is mapped to no column", tensor)
		}
		return nil
	})
}

// fields reads an entry of a mapping, a column's name or an object, into the known fields, one
// of which is "column".
func fields(raw json.RawMessage, known map[string]any) error {
	if raw[0] == '"' {
		return json.Unmarshal(raw, known["column"])
	}
	return object(raw, "want a column's name or {\"column\": name}", "field %q comes twice", func(name string, value json.RawMessage) error {
		target, ok := known[name]
		if !ok {
			return fmt.Errorf("unknown field %q", name)
		}
		_, isShape := target.(*[]int64)
		if string(value) == "null" || isShape && bytes.Contains(value, []byte("null")) {
			return fmt.Errorf("field %q must not be null", name)
		}
		if err := json.Unmarshal(value, target); err != nil {
			return fmt.Errorf("field %q: %w", name, err)
		}
		return nil
	})
}

// object gives the members of a JSON object to set, in order. other is the error for anything
// else, and twice the format of that for a name that comes twice.
func object(data []byte, other, twice string, set func(name string, value json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return errors.New(other)
	}
	seen := map[string]bool{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		name := key.(string)
		if seen[name] {
			return fmt.Errorf(twice, name)
		}
		seen[name] = true
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return err
		}
		if err := set(name, value); err != nil {
			return err
		}
	}
	_, err := dec.Token()
	return err
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
