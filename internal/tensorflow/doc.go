// Package tensorflow wraps the part of TensorFlow's C API that inference needs: load a SavedModel or a graph, own
// tensors, run a session. Arrow, signatures and batches belong to other packages. Only flightsvc-runner links this
// package, because a program with it does not start without libtensorflow.
//
// TensorFlow's own Go binding is not used, because it hides the status codes and frees tensors in finalizers: to the
// garbage collector a tensor is only a few words, so native memory grows.
//
// # Memory
//
// Tensors live off the Go heap and are freed by Close. [NewTensor] lends memory to TensorFlow without a copy and is
// told when TensorFlow has released it; [Allocate] and [NewStrings] make memory that TensorFlow owns. What Bytes and
// String return are views, valid until Close. TensorFlow counts references to a buffer, and an output may share the
// buffer of an input, so lent memory is released with the last tensor that shares it, which may be after Close.
// [Live] counts what has not been released, for leak checks.
//
// # Errors
//
// Errors of TensorFlow are [*Error], with TensorFlow's code and message. What would make TensorFlow end the process,
// such as a negative dimension or a size that overflows, is refused by this package first.
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

// Live returns the number of tensors that are not closed, plus the number of buffers of NewTensor and NewStrings that
// TensorFlow has not released. It is 0 when nothing leaks.
func Live() int64 { return live.Load() }

// Version returns the version of the loaded libtensorflow, for instance "2.21.0".
func Version() string { return C.GoString(C.TF_Version()) }

// Oldest is the oldest supported version; pyspark-shim/tests/test_wheel.py compares its answers.
const Oldest = "2.19"

// TooOld reports whether a version, in the form of Version, is older than Oldest.
func TooOld(version string) bool {
	var major, minor, oldestMajor, oldestMinor int
	_, _ = fmt.Sscanf(Oldest, "%d.%d", &oldestMajor, &oldestMinor)
	_, err := fmt.Sscanf(version, "%d.%d", &major, &minor)
	return err == nil && (major < oldestMajor || major == oldestMajor && minor < oldestMinor)
}
