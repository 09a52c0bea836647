// Input tensors: which rows of a record batch take part, and the tensors made of them.

package tensor

import (
	"context"
	"fmt"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Nulls takes the rows out of the run in which an input is null at any depth. With refuse they are refused, with a
// reason; else they are null rows, as in SQL.
func (b *Binding) Nulls(rec arrow.Record, rows *Rows, refuse bool) {
	for i := range b.inputs {
		in := &b.inputs[i]
		column := rec.Column(in.at)
		var all []bool
		if in.pictures != nil {
			all = in.pictures.nulls(column)
		} else {
			all = in.source.nulls(column)
		}
		reason := fmt.Sprintf("column %.80q is null", in.name)
		for row, null := range all {
			switch {
			case !null:
			case refuse:
				rows.Refuse(row, reason)
			default:
				rows.Null(row)
			}
		}
	}
}

// Feed is the value of one input for one batch.
type Feed struct {
	Tensor string // tensor in the graph
	Value  Value
}

// Values makes the input tensors from the rows that take part, at least one. It refuses in rows those that cannot be
// part of a tensor or whose picture cannot be decoded; if none is left the result is empty. String tensors view rec's
// memory and hold a reference to it. The caller releases each value. Faults name input, column, and lengths or sizes.
func (b *Binding) Values(ctx context.Context, rec arrow.Record, rows *Rows, pictures Pictures,
	mem memory.Allocator) (feeds []Feed, err error) {
	made := false
	defer func() { // also after a panic, for instance of an allocation
		if !made {
			ReleaseFeeds(feeds)
			feeds = nil
		}
	}()
	for i := range b.inputs {
		in := &b.inputs[i]
		column := rec.Column(in.at)
		var last, text string // most rows are refused for the same reason
		refuse := func(row int, reason string) {
			if rows.state[row] != rowKept {
				return
			}
			if last != reason {
				last, text = reason, fmt.Sprintf("column %.80q: %s", in.name, reason)
			}
			rows.Refuse(row, text)
		}
		if in.pictures != nil {
			in.pictures.screen(column, rows, refuse)
		} else {
			in.source.screen(column, refuse)
		}
	}
	for i := range b.inputs {
		in := &b.inputs[i]
		if in.pictures == nil || rows.Kept() == 0 {
			continue
		}
		before := rows.Positions()
		cells := make([]Picture, len(before))
		read := in.pictures.reader(rec.Column(in.at))
		for i, row := range before {
			cells[i], _ = read(row)
		}
		value, failed, err := pictures.Decode(ctx, in.spec.Name, cells, mem)
		if err != nil {
			return feeds, err
		}
		feeds = append(feeds, Feed{Tensor: in.spec.Tensor, Value: value})
		if len(failed) == 0 {
			continue
		}
		for i, reason := range failed {
			rows.Refuse(before[i], fmt.Sprintf("column %.80q: %s", in.name, reason))
		}
		left := remaining(before, rows)
		for i := range feeds {
			narrowed := feeds[i].Value.Take(left, mem)
			feeds[i].Value.Release()
			feeds[i].Value = narrowed
		}
	}
	if rows.Kept() == 0 {
		return feeds, nil
	}
	spans := rows.spans()
	for i := range b.inputs {
		in := &b.inputs[i]
		if in.pictures != nil {
			continue
		}
		value, lengths, err := in.source.value(rec.Column(in.at), spans, mem)
		if err != nil {
			kind, _ := fault.KindOf(err)
			return feeds, fault.New(kind, "input %s, column %q: %w", describe(in.spec), in.name, err)
		}
		feeds = append(feeds, Feed{Tensor: in.spec.Tensor, Value: value})
		if in.Lengths != "" {
			feeds = append(feeds, Feed{Tensor: in.lengths.Tensor, Value: lengthsValue(in.lengths.DType, lengths, mem)})
		}
	}
	made = true
	return feeds, nil
}

// ReleaseFeeds releases every value.
func ReleaseFeeds(feeds []Feed) {
	for i := range feeds {
		feeds[i].Value.Release()
	}
}

// remaining returns the indices into before of the rows that still take part.
func remaining(before []int, rows *Rows) []int {
	positions := make([]int, 0, rows.Kept())
	for i, row := range before {
		if rows.state[row] == rowKept {
			positions = append(positions, i)
		}
	}
	return positions
}

// maxLengthOf returns the largest length that an integer dtype holds.
func maxLengthOf(dtype savedmodel.DType) (length int64, ok bool) {
	bits := 8 * dtype.Size()
	switch dtype {
	case savedmodel.Int8, savedmodel.Int16, savedmodel.Int32, savedmodel.Int64:
		bits--
	case savedmodel.Uint8, savedmodel.Uint16, savedmodel.Uint32, savedmodel.Uint64:
	default:
		return 0, false
	}
	return 1<<min(bits, 62) - 1, true
}

// lengthsValue makes a tensor of rank 1 from lengths that fit its dtype.
func lengthsValue(dtype savedmodel.DType, lengths []int64, mem memory.Allocator) Value {
	value := Allocate(dtype, []int64{int64(len(lengths))}, mem)
	size := dtype.Size()
	for i, n := range lengths {
		for b := range size {
			value.Data[i*size+b] = byte(n >> (8 * b))
		}
	}
	return value
}
