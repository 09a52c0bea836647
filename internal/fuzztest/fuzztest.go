// Package fuzztest bounds the time and the memory of one execution of a fuzz target.
//
// What may enter: bounds that hold for any input. Assertions about a parser's result stay in its own tests.
package fuzztest

import (
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// maxTime is how much CPU time one execution may take.
const maxTime = slower * time.Second

// Bounded runs parse and fails the test if it allocates more than limit bytes, freed ones included, or takes more than
// a second of CPU time, which other processes do not slow down. A slow parse is run once more, because the collector's
// time counts, too; it must do the same each time.
func Bounded(t *testing.T, limit uint64, parse func()) {
	t.Helper()
	before, started := allocated(), used()
	parse()
	took := used() - started
	if bytes := allocated() - before; bytes > limit {
		t.Errorf("it allocated %d bytes, more than %d", bytes, limit)
	}
	if took > maxTime && !t.Failed() {
		started = used()
		parse()
		if again := used() - started; again > maxTime {
			t.Errorf("it took %s of CPU time, and %s once more", took, again)
		}
	}
}

// allocated returns how many bytes the process has allocated on the Go heap so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// used returns the CPU time that the process has used so far.
func used() time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		panic(err) // it takes no argument that could be wrong
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
