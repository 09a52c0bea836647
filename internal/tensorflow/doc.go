// Package tensorflow is the one door to TensorFlow: cgo over its C API, and
// nothing else. What may enter is what the way of a batch needs of
// libtensorflow: load a SavedModel or a graph, own tensors, run a session. Arrow,
// signatures and batches belong to other packages. Only cmd/flightsvc-runner and
// what it is made of import it, since whatever imports it needs libtensorflow to
// start.
//
// # Memory
//
// Tensors live off the Go heap and are freed by Close, never by a finalizer: the
// garbage collector sees a few words where TensorFlow holds megabytes. [NewTensor]
// lends memory to TensorFlow without a copy and hears when it comes back;
// [Allocate] and [NewStrings] make memory that TensorFlow owns. What Bytes and
// String return are views, good until Close. TensorFlow counts references to a
// buffer, and an output may share the buffer of an input, so lent memory may come
// back after the input was closed, when the last tensor that shares it is. [Live]
// counts what has not come back, for leak checks.
//
// # Errors
//
// Whatever TensorFlow refuses comes back as an [*Error] with TensorFlow's own code
// and message. What would make TensorFlow end the process (a negative dimension, a
// size that overflows) is refused here first.
package tensorflow

// #cgo LDFLAGS: -ltensorflow -ltensorflow_framework
// #include "door.h"
import "C"

import (
	"fmt"
	"sync/atomic"
)

// live counts open tensors, and buffers lent to TensorFlow.
var live atomic.Int64

// Live returns the number of tensors that are not closed, plus the number of
// buffers of NewTensor and NewStrings that TensorFlow has not given back. It is 0
// when nothing leaks.
func Live() int64 { return live.Load() }

// Version returns the version of the loaded libtensorflow, for instance "2.21.0".
func Version() string { return C.GoString(C.TF_Version()) }

// Oldest is the oldest version that answers are compared on (see pyspark-shim/tests/test_wheel.py).
const Oldest = "2.19"

// TooOld says whether a version, as Version gives it, comes before Oldest.
func TooOld(version string) bool {
	var major, minor, oldestMajor, oldestMinor int
	_, _ = fmt.Sscanf(Oldest, "%d.%d", &oldestMajor, &oldestMinor)
	_, err := fmt.Sscanf(version, "%d.%d", &major, &minor)
	return err == nil && (major < oldestMajor || major == oldestMajor && minor < oldestMinor)
}
