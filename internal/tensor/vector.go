// Vectors: the tensor made of a column of Spark ML vectors, sparse or dense.

package tensor

import (
	"fmt"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// vectors is the source of an input whose column has Spark ML vectors: structs of type (0 sparse, 1 dense), size,
// indices and values; dense ones have only values.
type vectors struct {
	dtype savedmodel.DType // float32 or float64
	want  int64            // the signature's dimension, -1 if it is open
}

// isVector reports whether an Arrow type is that of Spark's vectors.
func isVector(t arrow.DataType) bool {
	s, ok := t.(*arrow.StructType)
	if !ok || len(s.Fields()) != 4 {
		return false
	}
	list := func(t arrow.DataType, element arrow.Type) bool {
		l, ok := t.(*arrow.ListType)
		return ok && l.Elem().ID() == element
	}
	f := s.Fields()
	return f[0].Name == "type" && f[0].Type.ID() == arrow.INT8 &&
		f[1].Name == "size" && f[1].Type.ID() == arrow.INT32 &&
		f[2].Name == "indices" && list(f[2].Type, arrow.INT32) &&
		f[3].Name == "values" && list(f[3].Type, arrow.FLOAT64)
}

// cells are the fields of a column of vectors, and the elements of its two lists.
type cells struct {
	kind       *array.Int8
	size       *array.Int32
	indices    *array.List
	values     *array.List
	allIndices []int32
	allValues  []float64
}

func cellsOf(column arrow.Array) cells {
	s := column.(*array.Struct)
	c := cells{kind: s.Field(0).(*array.Int8), size: s.Field(1).(*array.Int32), indices: s.Field(2).(*array.List),
		values: s.Field(3).(*array.List)}
	c.allIndices = c.indices.ListValues().(*array.Int32).Int32Values()
	c.allValues = c.values.ListValues().(*array.Float64).Float64Values()
	return c
}

// row returns one vector; a dense one has nil indices, and its size is the number of values.
func (c *cells) row(row int) (size int, indices []int32, values []float64) {
	lo, hi := c.values.ValueOffsets(row)
	values = c.allValues[lo:hi]
	if c.kind.Value(row) != 0 {
		return len(values), nil, values
	}
	lo, hi = c.indices.ValueOffsets(row)
	return int(c.size.Value(row)), c.allIndices[lo:hi:hi], values
}

func (v *vectors) nulls(column arrow.Array) []bool {
	c := cellsOf(column)
	all := nulls(column, 0)
	indices, values := marks(c.indices, 0, nulls), marks(c.values, 0, nulls)
	has := func(marks []bool, row int) bool { return marks != nil && marks[row] }
	for row := range column.Len() {
		sparse := c.kind.Value(row) == 0
		if c.kind.IsNull(row) || has(values, row) || sparse && (c.size.IsNull(row) || has(indices, row)) {
			all = marked(all, row, column.Len())
		}
	}
	return all
}

func (v *vectors) screen(column arrow.Array, refuse func(row int, reason string)) {
	c := cellsOf(column)
	for row := range column.Len() {
		size, indices, values := c.row(row)
		kind := c.kind.Value(row)
		switch {
		case kind != 0 && kind != 1:
			refuse(row, "a vector that is neither sparse (type 0) nor dense (type 1)")
		case v.want >= 0 && int64(size) != v.want:
			refuse(row, fmt.Sprintf("a vector of %d elements, want %d", size, v.want))
		case kind == 1:
		case len(indices) != len(values):
			refuse(row, fmt.Sprintf("a sparse vector with %d indices and %d values", len(indices), len(values)))
		case !ascending(indices, size):
			refuse(row, fmt.Sprintf("a sparse vector of %d elements whose indices do not ascend within it", size))
		}
	}
}

// ascending reports whether indices are strictly ascending within [0, size), and size is not negative.
func ascending(indices []int32, size int) bool {
	last := -1
	for _, i := range indices {
		if int(i) <= last {
			return false
		}
		last = int(i)
	}
	return size >= 0 && last < size
}

func (v *vectors) value(column arrow.Array, rows []span, mem memory.Allocator) (Value, []int64, error) {
	c := cellsOf(column)
	shape := []int64{0, -1}
	for _, r := range rows {
		shape[0] += int64(r.hi - r.lo)
		for row := r.lo; row < r.hi; row++ {
			size, _, _ := c.row(row)
			if shape[1] >= 0 && int64(size) != shape[1] {
				return Value{}, nil, fault.New(fault.BadRequest,
					"vectors of %d and of %d elements in one record batch; all must have the same length", shape[1],
					size)
			}
			shape[1] = int64(size)
		}
	}
	if !fits(v.dtype, shape) {
		return Value{}, nil, tooLarge()
	}
	value := Allocate(v.dtype, shape, mem)
	if v.dtype == savedmodel.Float32 {
		scatter(view[float32](value.Data), &c, rows, int(shape[1]))
	} else {
		scatter(view[float64](value.Data), &c, rows, int(shape[1]))
	}
	return value, nil, nil
}

// scatter writes vectors of one size contiguously into dst.
func scatter[D float32 | float64](dst []D, c *cells, rows []span, size int) {
	for _, r := range rows {
		for row := r.lo; row < r.hi; row++ {
			vector := dst[:size]
			dst = dst[size:]
			_, indices, values := c.row(row)
			if c.kind.Value(row) != 0 {
				for i, x := range values {
					vector[i] = D(x)
				}
				continue
			}
			clear(vector)
			for i, at := range indices {
				vector[at] = D(values[i])
			}
		}
	}
}
