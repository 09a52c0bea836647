// Tests against the golden files that need no model.

package protocol

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"testing"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

// golden is the folder of the files that testdata/make_golden.py has written.
const golden = "../../testdata/golden"

// keys returns the names in a JSON object, in order.
func keys(t *testing.T, object json.RawMessage) (names []string) {
	t.Helper()
	if len(object) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(object))
	if _, err := dec.Token(); err != nil {
		t.Fatal(err)
	}
	for dec.More() {
		name, err := dec.Token()
		var value json.RawMessage
		if err == nil {
			err = dec.Decode(&value)
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name.(string))
	}
	return names
}

func TestGoldenDescriptors(t *testing.T) {
	var file struct {
		Taken []struct {
			Name, Text string
			Means      json.RawMessage
		}
		Refused, Unfit []struct {
			Name, Text string
			Says       []string
		}
	}
	expect.Golden(t, golden, "descriptors.json", &file)
	for _, c := range file.Taken {
		t.Run(c.Name, func(t *testing.T) {
			d, err := ParseDescriptor([]byte(c.Text))
			if err != nil {
				t.Fatal(err)
			}
			got, err := d.Command()
			if err != nil {
				t.Fatal(err)
			}
			expect.SameJSON(t, got, c.Means)
			var mappings [2]struct{ Inputs, Outputs json.RawMessage }
			for i, text := range [][]byte{got, c.Means} {
				if err := json.Unmarshal(text, &mappings[i]); err != nil {
					t.Fatal(err)
				}
			}
			if got, want := keys(t, mappings[0].Inputs), keys(t, mappings[1].Inputs); !slices.Equal(got, want) {
				t.Errorf("inputs are %q, want %q", got, want)
			}
			if got, want := keys(t, mappings[0].Outputs), keys(t, mappings[1].Outputs); !slices.Equal(got, want) {
				t.Errorf("outputs are %q, want %q", got, want)
			}
			again, err := ParseDescriptor([]byte(string(got)))
			if err != nil || !reflect.DeepEqual(again, d) {
				t.Errorf("as a ticket it means %+v, %v; before %+v", again, err, d)
			}
		})
	}
	for _, c := range file.Refused {
		t.Run(c.Name, func(t *testing.T) {
			_, err := ParseDescriptor([]byte(c.Text))
			expect.Fault(t, err, fault.BadRequest, c.Says...)
		})
	}
}

func TestGoldenAppMetadata(t *testing.T) {
	var file []struct {
		Text string
		Says AnswerMetadata
	}
	expect.Golden(t, golden, "app_metadata.json", &file)
	for _, c := range file {
		expect.SameJSON(t, c.Says.Encode(), []byte(c.Text))
	}
}
