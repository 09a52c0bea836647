// Strict JSON: one reader for what callers send, since encoding/json ignores unknown and repeated fields.

package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// UnknownFieldError means that a JSON object has a field that this build does not know. The server adds the builds of
// both sides to the message.
type UnknownFieldError struct{ Field string }

func (e *UnknownFieldError) Error() string { return fmt.Sprintf("unknown field %q", e.Field) }

// Decode reads one JSON object into v, a pointer to a struct. Unlike encoding/json it distinguishes upper and lower
// case in field names, and refuses unknown fields, a field that occurs twice, and text after the object.
func Decode(data []byte, v any) error {
	known := fieldNames(reflect.TypeOf(v).Elem())
	if err := members(data, "field %q occurs twice", func(name string, _ json.RawMessage) error {
		if !known[name] {
			return &UnknownFieldError{name}
		}
		return nil
	}); err != nil {
		return err
	}
	err := json.Unmarshal(data, v)
	var mismatch *json.UnmarshalTypeError
	if errors.As(err, &mismatch) { // its own text names Go's types
		name := mismatch.Field[strings.LastIndex(mismatch.Field, ".")+1:]
		return fmt.Errorf("field %q cannot be a %s", name, mismatch.Value)
	}
	return err
}

// members calls take with the members of one JSON object, in order. twice is the format of the error for a name that
// occurs a second time.
func members(data []byte, twice string, take func(name string, value json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil {
		return unexpectedEnd(err)
	} else if tok != json.Delim('{') {
		return errors.New("want a JSON object")
	}
	seen := map[string]bool{}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return unexpectedEnd(err)
		}
		name := tok.(string) // the decoder accepts nothing else as a key
		if seen[name] {
			return fmt.Errorf(twice, name)
		}
		seen[name] = true
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return unexpectedEnd(err)
		}
		if err := take(name, value); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil {
		return unexpectedEnd(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("there is text after the object")
	}
	return nil
}

// unexpectedEnd replaces io.EOF: within an object the end of the text comes too early.
func unexpectedEnd(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// fieldNames returns the names of a struct's fields in JSON, those of embedded structs included.
func fieldNames(t reflect.Type) map[string]bool {
	names := map[string]bool{}
	for i := range t.NumField() {
		field := t.Field(i)
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case name != "":
			names[name] = true
		case field.Anonymous:
			inner := field.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			for name := range fieldNames(inner) {
				names[name] = true
			}
		}
	}
	return names
}
