// Package offheap allocates Arrow buffers in C memory, 64-byte aligned, so that TensorFlow can use a buffer as a tensor
// without a copy, and for longer than the call.
package offheap

// #include <stdlib.h>
import "C"

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow/memory"
)

// alignment is what TensorFlow requires of a buffer that it does not copy (EIGEN_MAX_ALIGN_BYTES), and what Arrow
// recommends.
const alignment = 64

// Allocator is an Arrow allocator on aligned_alloc. Its zero value is ready; it is safe for concurrent use. Memory is
// not zeroed.
type Allocator struct {
	live atomic.Int64
}

// Live returns the bytes that were allocated and not freed, for leak checks.
func (a *Allocator) Live() int64 { return a.live.Load() }

// Allocate returns size bytes, or panics if the system has no more.
func (a *Allocator) Allocate(size int) []byte {
	if size < 0 {
		panic("offheap: negative size")
	}
	if size == 0 {
		return nil
	}
	rounded := (size + alignment - 1) / alignment * alignment
	p := C.aligned_alloc(alignment, C.size_t(rounded))
	if p == nil {
		panic(fmt.Sprintf("offheap: no memory for %d bytes", size))
	}
	a.live.Add(int64(size))
	return unsafe.Slice((*byte)(p), size)
}

// Reallocate returns size bytes that begin with those of b, and frees b.
func (a *Allocator) Reallocate(size int, b []byte) []byte {
	if size == len(b) {
		return b
	}
	grown := a.Allocate(size)
	copy(grown, b)
	a.Free(b)
	return grown
}

// Free gives back memory of Allocate or Reallocate, with the length that it was allocated with.
func (a *Allocator) Free(b []byte) {
	if len(b) == 0 {
		return
	}
	a.live.Add(-int64(len(b)))
	C.free(unsafe.Pointer(unsafe.SliceData(b)))
}

// Interface guards.
var _ memory.Allocator = (*Allocator)(nil)
