// Package expect holds assertions that tests of several packages share. Only tests import it.
package expect

import (
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
