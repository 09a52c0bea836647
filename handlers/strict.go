package handlers

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// decodeStrictly reads one JSON object into v, a pointer to a struct. Unlike encoding/json it
// takes field names as they are written, refuses a field that occurs twice, and text after the
// object.
func decodeStrictly(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil {
		return whole(err)
	} else if tok != json.Delim('{') {
		return fmt.Errorf("want a JSON object")
	}
	known := fieldNames(reflect.TypeOf(v).Elem())
	seen := map[string]bool{}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return whole(err)
		}
		name := tok.(string) // the decoder lets nothing else stand for a key
		if !known[name] {
			return fmt.Errorf("unknown field %q", name)
		}
		if seen[name] {
			return fmt.Errorf("field %q occurs twice", name)
		}
		seen[name] = true
		var skipped json.RawMessage
		if err := dec.Decode(&skipped); err != nil {
			return whole(err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return whole(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("there is text after the object")
	}
	return json.Unmarshal(data, v)
}

// whole says of an end that it came too early.
func whole(err error) error {
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
