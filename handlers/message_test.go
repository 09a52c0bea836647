package handlers

import (
	"strings"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

// TestLimitsHaveNames sends what is just within and just beyond each limit of docs/protocol.md: the error names it.
func TestLimitsHaveNames(t *testing.T) {
	nested := func(levels int) *arrow.Schema {
		column := arrow.DataType(arrow.PrimitiveTypes.Int8)
		for range levels {
			column = arrow.ListOf(column)
		}
		return arrow.NewSchema([]arrow.Field{{Name: "c", Type: column}}, nil)
	}
	wide := func(fields int, name string) *arrow.Schema {
		columns := make([]arrow.Field, fields)
		for i := range columns {
			columns[i] = arrow.Field{Name: name, Type: arrow.Null}
		}
		return arrow.NewSchema(columns, nil)
	}
	for name, c := range map[string]struct {
		schema *arrow.Schema
		rows   int64
		says   string // "" where it is taken
	}{
		"deep":           {schema: nested(64)},
		"too deep":       {schema: nested(65), says: "nested 64 deep at most"},
		"wide":           {schema: wide(16384, "c")},
		"too wide":       {schema: wide(16385, "c"), says: "16384 fields at most"},
		"too much text":  {schema: wide(17, strings.Repeat("n", 1<<20)), says: "16 MiB at most"},
		"many rows":      {schema: wide(1, "c"), rows: 1 << 24},
		"too many rows":  {schema: wide(1, "c"), rows: 1<<24 + 1, says: "16777217 rows; it may have 16777216"},
		"no rows at all": {schema: wide(1, "c")},
	} {
		t.Run(name, func(t *testing.T) {
			out := &captured{}
			w := flight.NewRecordWriter(out, ipc.WithSchema(c.schema))
			if c.rows > 0 {
				column := array.NewNull(int(c.rows))
				if err := w.Write(array.NewRecord(c.schema, []arrow.Array{column}, c.rows)); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			reader, _, err := OpenReader(&sent{messages: *out}, NewReadMemory(memory.NewGoAllocator(), maxStreamMemory))
			if err == nil {
				defer reader.Release()
				reader.Next()
				if err = reader.Err(); err != nil {
					err = StreamError(err, "%w", err)
				}
			}
			if c.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			expect.Fault(t, err, fault.BadRequest, c.says)
		})
	}
}
