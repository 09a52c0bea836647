// Package fuzztest bounds the time and the memory of one execution of a fuzz target.
//
// What may enter: bounds that hold for any input. Assertions about a parser's result stay in its own tests.
package fuzztest

import (
	"runtime/metrics"
	"testing"
	"time"
)

// maxTime is how long one execution may take.
const maxTime = slower * time.Second

// Bounded runs parse and fails the test if it allocates more than limit bytes, freed ones included, or takes longer
// than a second. A slow parse is run once more, because other processes may have slowed it down; it must do the same
// each time.
func Bounded(t *testing.T, limit uint64, parse func()) {
	t.Helper()
	before, started := allocated(), time.Now()
	parse()
	took := time.Since(started)
	if bytes := allocated() - before; bytes > limit {
		t.Errorf("it allocated %d bytes, more than %d", bytes, limit)
	}
	if took > maxTime && !t.Failed() {
		started = time.Now()
		parse()
		if again := time.Since(started); again > maxTime {
			t.Errorf("it took %s, and %s once more", took, again)
		}
	}
}

// allocated returns how many bytes the process has allocated on the Go heap so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
