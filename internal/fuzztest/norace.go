//go:build !race

package fuzztest

// slower is how much longer anything takes under the race detector.
const slower = 1
