// Lists: the tensor made of a column of elements or of nested lists, by their offsets.

package tensor

import (
	"fmt"
	"math"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// MaxTensorBytes bounds the input tensor of one record batch. Widening does not take a record batch of 64 MiB above it,
// but padding, dictionaries and overlapping views may. A string counts with its bytes and textBytes.
const MaxTensorBytes = 1 << 30

// textBytes is the size of TensorFlow's TF_TString, which a string takes besides its bytes. maxSegments bounds how many
// segments of an array a tensor is made of.
const (
	textBytes   = 24
	maxSegments = 1 << 24
)

func tooLarge() error {
	return fault.New(fault.Exhausted, "the tensor of this record batch is too large, more than %d MiB or %d runs of "+
		"elements; send fewer rows in a record batch", MaxTensorBytes>>20, maxSegments)
}

// lists is the source of an input whose column has elements inside one level of list for each dimension after the
// first.
type lists struct {
	leaf
	spec      savedmodel.Spec
	shape     []int64 // dimensions of an arrow.fixed_shape_tensor, else nil
	pad       bool    // shorter lists are filled up to the dimension
	counted   bool    // another input receives the lengths
	maxLength int64   // largest length that the dtype of that input holds
}

// want returns a dimension of the signature, -1 if it is open.
func (l *lists) want(dim int) int64 {
	if l.spec.UnknownRank || dim >= len(l.spec.Shape) {
		return -1
	}
	return l.spec.Shape[dim]
}

// unnest returns the type of the elements below all lists and, from outside in, the size of each level of lists, -1 if
// it varies.
func unnest(t arrow.DataType) (leaf arrow.DataType, sizes []int64) {
	for {
		switch list := t.(type) {
		case *arrow.FixedSizeListType:
			sizes, t = append(sizes, int64(list.Len())), list.Elem()
		case *arrow.ListType:
			sizes, t = append(sizes, -1), list.Elem()
		case *arrow.LargeListType:
			sizes, t = append(sizes, -1), list.Elem()
		case *arrow.ListViewType:
			sizes, t = append(sizes, -1), list.Elem()
		case *arrow.LargeListViewType:
			sizes, t = append(sizes, -1), list.Elem()
		default:
			return t, sizes
		}
	}
}

// marks returns the mark of each entry of an array: that which own gives it, or else that of the first marked element
// below it, at any depth. The zero of T is no mark; nil stands for an array without marks.
func marks[T comparable](a arrow.Array, dim int, own func(a arrow.Array, dim int) []T) []T {
	all := own(a, dim)
	list, ok := a.(array.ListLike)
	if !ok {
		return all
	}
	inner := marks(list.ListValues(), dim+1, own)
	if inner == nil {
		return all
	}
	if all == nil {
		all = make([]T, a.Len())
	}
	var nothing T
	for row := range all {
		if all[row] != nothing || a.IsNull(row) {
			continue
		}
		for lo, hi := list.ValueOffsets(row); lo < hi; lo++ {
			if inner[lo] != nothing {
				all[row] = inner[lo]
				break
			}
		}
	}
	return all
}

// nulls marks the entries of an array that are null.
func nulls(a arrow.Array, _ int) (marks []bool) {
	dictionary, isDictionary := a.(*array.Dictionary)
	if isDictionary && a.Len() > 0 {
		isDictionary = dictionary.Dictionary().NullN() > 0
	}
	switch {
	case a.DataType().ID() == arrow.NULL:
		for i := range a.Len() {
			marks = marked(marks, i, a.Len())
		}
	case a.NullN() > 0 || isDictionary:
		for i := range a.Len() {
			if a.IsNull(i) || isDictionary && dictionary.Dictionary().IsNull(dictionary.GetValueIndex(i)) {
				marks = marked(marks, i, a.Len())
			}
		}
	}
	return marks
}

func (l *lists) nulls(column arrow.Array) []bool { return marks(column, 0, nulls) }

// misfit is a list whose length does not fit the tensor: the dimension that it is at, and the length.
type misfit struct{ dim, length int64 }

func (l *lists) screen(column arrow.Array, refuse func(row int, reason string)) {
	if l.shape == nil {
		for row, m := range marks(column, 1, l.misfits) {
			switch {
			case m.dim == 0:
			case m.dim == 1 && l.counted && m.length > l.maxLength:
				refuse(row, fmt.Sprintf("a list of %d elements, more than the input of lengths can count", m.length))
			case l.pad:
				refuse(row, fmt.Sprintf("a list of %d elements at dimension %d, want %d at most", m.length, m.dim,
					l.want(int(m.dim))))
			default:
				refuse(row, fmt.Sprintf("a list of %d elements at dimension %d, want %d", m.length, m.dim,
					l.want(int(m.dim))))
			}
		}
	}
	if l.outside != nil {
		for row, bad := range marks(column, 1, func(a arrow.Array, _ int) []bool {
			if _, isList := a.(array.ListLike); isList {
				return nil
			}
			return l.outsiders(a)
		}) {
			if bad {
				refuse(row, fmt.Sprintf("a value is outside %s, %s", l.dtype, ranges[l.dtype]))
			}
		}
	}
}

// misfits marks the lists whose length does not fit a known dimension, or cannot be counted.
func (l *lists) misfits(a arrow.Array, dim int) (all []misfit) {
	list, ok := a.(array.ListLike)
	want, limit := l.want(dim), int64(math.MaxInt64)
	if dim == 1 && l.counted {
		limit = l.maxLength
	}
	if !ok || want < 0 && limit == math.MaxInt64 {
		return nil
	}
	for row := range a.Len() {
		lo, hi := list.ValueOffsets(row)
		if length := hi - lo; (want >= 0 && (length > want || length < want && !l.pad) || length > limit) &&
			!a.IsNull(row) {
			if all == nil {
				all = make([]misfit, a.Len())
			}
			all[row] = misfit{int64(dim), length}
		}
	}
	return all
}

func (l *lists) value(column arrow.Array, rows []span, mem memory.Allocator) (value Value, lengths []int64, err error) {
	segments := make([]segment, len(rows))
	shape := []int64{0}
	for i, r := range rows {
		segments[i] = segment{lo: r.lo, hi: r.hi}
		shape[0] += int64(r.hi - r.lo)
	}
	for {
		list, ok := column.(array.ListLike)
		if !ok {
			break
		}
		if len(shape) == 1 && l.counted {
			lengths = l.lengths(list, rows, shape[0])
		}
		size, err := l.size(list, segments, len(shape))
		if err != nil {
			return Value{}, nil, err
		}
		if shape = append(shape, size); !fits(l.dtype, shape) {
			return Value{}, nil, tooLarge()
		}
		if segments, err = descend(list, segments, int(size)); err != nil {
			return Value{}, nil, err
		}
		column = list.ListValues()
	}
	if l.shape != nil {
		shape = append(shape[:1], l.shape...)
	}
	for dim := len(shape); dim < len(l.spec.Shape); dim++ { // an array<void> hides the dimensions below it
		shape = append(shape, max(l.want(dim), 0))
		segments = []segment{{pad: -1}}
	}
	if !fits(l.dtype, shape) {
		return Value{}, nil, tooLarge()
	}
	if len(segments) == 1 && segments[0].pad < 0 {
		segments[0].pad = int(elements(shape))
	}
	value, err = l.leaf.value(column, segments, shape, mem)
	return value, lengths, err
}

// lengths returns the lengths of the n lists in rows.
func (l *lists) lengths(list array.ListLike, rows []span, n int64) []int64 {
	lengths := make([]int64, 0, n)
	for _, r := range rows {
		for row := r.lo; row < r.hi; row++ {
			lo, hi := list.ValueOffsets(row)
			if l.shape != nil {
				lo, hi = 0, l.shape[0]
			}
			lengths = append(lengths, hi-lo)
		}
	}
	return lengths
}

// fits reports whether a tensor has at most MaxTensorBytes, the bytes of strings not counted.
func fits(dtype savedmodel.DType, shape []int64) bool {
	size := int64(dtype.Size())
	if dtype == savedmodel.String {
		size = textBytes
	}
	for _, d := range shape {
		if d == 0 {
			return true
		}
	}
	for _, d := range shape {
		if d > MaxTensorBytes/size {
			return false
		}
		size *= d
	}
	return true
}

// size returns the size of a dimension: that of the signature or, if it is open there, the length of the lists in the
// segments, with padding that of the longest; 0 without a list.
func (l *lists) size(list array.ListLike, segments []segment, dim int) (int64, error) {
	if want := l.want(dim); want >= 0 && l.shape == nil {
		return want, nil
	}
	if fixed, ok := list.DataType().(*arrow.FixedSizeListType); ok {
		return int64(fixed.Len()), nil
	}
	size := int64(-1)
	for _, p := range segments {
		for at := p.lo; at < p.hi; at++ {
			lo, hi := list.ValueOffsets(at)
			if size >= 0 && hi-lo != size && !l.pad {
				return 0, fault.New(fault.BadRequest, "lists of %d and of %d elements at dimension %d in one record "+
					"batch; all must have the same length, or give the input a \"pad\"", size, hi-lo,
					dim)
			}
			size = max(size, hi-lo)
		}
	}
	return max(size, 0), nil
}

// descend returns the segments of a list array's elements that the given segments of the array consist of, each list
// padded to size.
func descend(list array.ListLike, segments []segment, size int) ([]segment, error) {
	inner := make([]segment, 0, len(segments))
	add := func(lo, hi, pad int) {
		n := len(inner)
		switch {
		case lo < hi && n > 0 && inner[n-1].pad == 0 && inner[n-1].hi == lo:
			inner[n-1].hi, inner[n-1].pad = hi, pad
		case lo < hi || n == 0:
			inner = append(inner, segment{lo, hi, pad})
		default:
			inner[n-1].pad += pad
		}
	}
	for _, p := range segments {
		for at := p.lo; at < p.hi; at++ {
			lo, hi := list.ValueOffsets(at)
			add(int(lo), int(hi), size-int(hi-lo))
		}
		if p.pad > 0 {
			add(0, 0, p.pad*size)
		}
		if len(inner) > maxSegments {
			return nil, tooLarge()
		}
	}
	return inner, nil
}
