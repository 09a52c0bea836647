// Package expect holds what tests of several packages ask for in the same words. Only tests
// import it.
package expect

import (
	"strings"
	"testing"
	"time"

	"flightsvc/internal/fault"
)

// Fault fails the test unless err is a fault of a kind, of one line that holds all the parts.
func Fault(t *testing.T, err error, kind fault.Kind, parts ...string) {
	t.Helper()
	if got, ok := fault.KindOf(err); !ok || got != kind {
		t.Errorf("kind %d, %t of %v; want %d", got, ok, err, kind)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
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
			t.Fatalf("after 10 s it is not so that %s", what)
		}
	}
}
