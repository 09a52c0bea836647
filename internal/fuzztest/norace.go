//go:build !race

package fuzztest

// slower is the factor by which the race detector slows a test down.
const slower = 1
