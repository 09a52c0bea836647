// Package fuzztest holds what every fuzz target asserts of one execution, whatever it parses.
//
// What may enter: bounds that hold for any bytes. What a parser promises of its result stays in its own tests.
package fuzztest

import (
	"runtime/metrics"
	"testing"
	"time"
)

// maxTime is how long one execution may take.
const maxTime = slower * time.Second

// Bounded runs parse and fails the test if that takes longer than a second, twice in a row since other
// processes want the machine too, or takes more than most bytes of the Go heap, given back or not. Parse
// must do the same each time.
func Bounded(t *testing.T, most uint64, parse func()) {
	t.Helper()
	before, started := allocated(), time.Now()
	parse()
	took := time.Since(started)
	if bytes := allocated() - before; bytes > most {
		t.Errorf("it took %d bytes of memory, more than %d", bytes, most)
	}
	if took > maxTime && !t.Failed() {
		started = time.Now()
		parse()
		if again := time.Since(started); again > maxTime {
			t.Errorf("it took %s, and %s once more", took, again)
		}
	}
}

// allocated returns the bytes that the process has taken from the Go heap so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
