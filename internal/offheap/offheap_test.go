package offheap

import (
	"bytes"
	"math"
	"sync"
	"testing"
	"unsafe"

	"github.com/apache/arrow/go/v15/arrow/array"
)

func TestAllocator(t *testing.T) {
	var a Allocator
	for _, size := range []int{1, 63, 64, 65, 1 << 20} {
		b := a.Allocate(size)
		if len(b) != size || uintptr(unsafe.Pointer(unsafe.SliceData(b)))%alignment != 0 {
			t.Errorf("%d bytes at %p have length %d", size, b, len(b))
		}
		b[0], b[size-1] = 1, 1
		a.Free(b)
	}
	if b := a.Allocate(0); b != nil || a.Live() != 0 {
		t.Errorf("nothing is %v, and %d bytes live", b, a.Live())
	}

	b := a.Allocate(3)
	copy(b, "abc")
	b = a.Reallocate(100, b)
	if !bytes.Equal(b[:3], []byte("abc")) || a.Live() != 100 {
		t.Errorf("grown to %q with %d bytes live", b[:3], a.Live())
	}
	b = a.Reallocate(2, b)
	if !bytes.Equal(b, []byte("ab")) || a.Live() != 2 {
		t.Errorf("shrunk to %q with %d bytes live", b, a.Live())
	}
	if same := a.Reallocate(2, b); unsafe.SliceData(same) != unsafe.SliceData(b) {
		t.Error("the same size moved")
	}
	a.Free(a.Reallocate(0, b))
	if a.Live() != 0 {
		t.Errorf("%d bytes live at the end", a.Live())
	}
}

func TestAllocatorFeedsArrow(t *testing.T) {
	var a Allocator
	var working sync.WaitGroup
	for range 8 {
		working.Go(func() {
			b := array.NewStringBuilder(&a)
			defer b.Release()
			for range 1000 {
				b.Append("some text")
			}
			column := b.NewStringArray()
			defer column.Release()
			if column.Len() != 1000 || column.Value(999) != "some text" {
				t.Errorf("read back %d rows", column.Len())
			}
		})
	}
	working.Wait()
	if a.Live() != 0 {
		t.Errorf("%d bytes live at the end", a.Live())
	}
}

func TestAllocatorPanicsForTheImpossible(t *testing.T) {
	for _, size := range []int{-1, math.MaxInt64 / 2} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d bytes were allocated", size)
				}
			}()
			new(Allocator).Allocate(size)
		}()
	}
}
