// Package expect holds assertions that tests of several packages share. Only tests import it.
package expect

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"flightsvc/internal/fault"
)

// Fault fails the test unless err is a fault of this kind, in one line that contains all the texts.
func Fault(t *testing.T, err error, kind fault.Kind, texts ...string) {
	t.Helper()
	if got, ok := fault.KindOf(err); !ok || got != kind {
		t.Errorf("kind %d, %t of %v; want %d", got, ok, err, kind)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not contain %q", err, text)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q has more than a line", err)
	}
}

// Eventually waits until a condition holds, and fails the test after ten seconds.
func Eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// Golden decodes one of the JSON files that testdata/make_golden.py has written, strictly.
func Golden(t *testing.T, folder, name string, v any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(folder, name))
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// SameJSON compares two JSON texts by what they say; the order of fields does not matter.
func SameJSON(t *testing.T, got, want []byte) {
	t.Helper()
	var values [2]any
	for i, text := range [][]byte{got, want} {
		if err := json.Unmarshal(text, &values[i]); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	if !reflect.DeepEqual(values[0], values[1]) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
