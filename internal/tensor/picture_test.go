// Tests of pictures: columns of files and of image structs, and where record batches of them are cut.

package tensor

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// imageFields returns Spark's image struct with one field of another type.
func imageFields(name string, other arrow.DataType) []arrow.Field {
	fields := []arrow.Field{
		{Name: "origin", Type: str, Nullable: true}, {Name: "height", Type: i32, Nullable: true},
		{Name: "width", Type: i32, Nullable: true},
		{Name: "nChannels", Type: i32, Nullable: true}, {Name: "mode", Type: i32, Nullable: true},
		{Name: "data", Type: blob, Nullable: true},
	}
	for i := range fields {
		if fields[i].Name == name {
			fields[i].Type = other
		}
	}
	return fields
}

// image is a row of Spark's image struct; nil is null.
type image []any // origin, height, width, nChannels, mode, data

// images makes a column of Spark's image struct.
func images(t *testing.T, mem memory.Allocator, rows ...image) arrow.Record {
	fields := imageFields("", nil)
	cells := make([]map[string]any, len(rows))
	for i, row := range rows {
		if row != nil {
			cells[i] = map[string]any{}
		}
		for j, value := range row {
			if data, ok := value.(string); ok && fields[j].Name == "data" {
				value = []byte(data)
			}
			cells[i][fields[j].Name] = value
		}
	}
	text, err := json.Marshal(cells)
	if err != nil {
		t.Fatal(err)
	}
	return record(t, mem, "p", arrow.StructOf(fields...), string(text[1:len(text)-1]))
}

func bindPicture(t *testing.T, schema *arrow.Schema) *Binding {
	t.Helper()
	plan := newPlan(t, "p float32 -1 1 1 3", "y float32 -1", Options{Pictures: map[string]PictureTensor{"p": pixel}})
	binding, err := plan.Bind(schema)
	if err != nil {
		t.Fatal(err)
	}
	return binding
}

// TestImageStructs checks which rows of Spark's image struct are pictures, which are null and which are refused.
func TestImageStructs(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	whole := images(t, mem,
		image{"a", 9, 9, 1, 0, "cut away"}, // not part of the slice
		image{"a", 1, 2, 3, 16, "abcdef"},
		image{nil, 2, 1, 1, 0, "gh"}, // the origin is nobody's concern
		image{"a", 1, 1, 4, 24, "abcd"},
		image{"a", 1, 1, 3, 21, "abcdefghijkl"},
		nil,
		image{"a", nil, 1, 1, 0, "a"},
		image{"a", 1, 1, 1, 0, nil},
		image{"a", -1, -1, -1, -1, ""},
		image{"a", 1, 1, 3, 17, "abc"},
		image{"a", 1, 1, 4, 16, "abcd"},
		image{"a", 0, 1, 1, 0, ""},
		image{"a", 1, -5, 1, 0, "abcde"},
		image{"a", 1, 1, 3, 16, "ab"},
		image{"a", 1<<31 - 1, 1<<31 - 1, 4, 29, "abcd"},
		image{"a", 65536, 65536, 1, 0, ""},
	)
	defer whole.Release()
	rec := whole.NewSlice(1, whole.NumRows())
	defer rec.Release()
	binding := bindPicture(t, rec.Schema())
	if err := binding.Check(rec); err != nil {
		t.Fatal(err)
	}
	var seen []string
	rows := NewRows(int(rec.NumRows()))
	binding.Nulls(rec, rows, false)
	feeds, err := binding.Values(t.Context(), rec, rows,
		decoder(func(_ string, pictures []Picture, mem memory.Allocator) (Value, map[int]string, error) {
			for _, p := range pictures {
				seen = append(seen, fmt.Sprintf("%dx%dx%d %s mode %d %s", p.Height, p.Width, p.Channels, p.DType,
					ImageMode(p), p.Data))
			}
			return Allocate(savedmodel.Float32, []int64{int64(len(pictures)), 1, 1, 3}, mem), nil, nil
		}), mem)
	if err != nil {
		t.Fatal(err)
	}
	ReleaseFeeds(feeds)
	want := []string{"1x2x3 uint8 mode 16 abcdef", "2x1x1 uint8 mode 0 gh", "1x1x4 uint8 mode 24 abcd",
		"1x1x3 float32 mode 21 abcdefghijkl"}
	if !slices.Equal(seen, want) {
		t.Errorf("the decoder has seen %q, want %q", seen, want)
	}
	for row := range rows.Len() {
		reason, refused := rows.reason(row)
		if refused != (row >= 7) || row >= 4 && row < 7 && rows.state[row] != rowNull {
			t.Errorf("row %d: refused %t (%s), state %d", row, refused, reason, rows.state[row])
		}
	}
	for row, text := range map[int]string{
		7: `column "p": an image that Spark has marked as invalid (mode -1)`,
		9: `column "p": an image of mode 16 with nChannels 4; that mode has 3`,
	} {
		if reason, _ := rows.reason(row); reason != text {
			t.Errorf("row %d is refused for %q", row, reason)
		}
	}
}

// weighed is a Pictures by which the size of a picture is the number in it.
type weighed struct{ decoder }

func (weighed) Bytes(_ string, p Picture) int64 { return int64(p.Data[0] - '0') }

func TestCut(t *testing.T) {
	mem := memory.NewCheckedAllocator(memory.DefaultAllocator)
	defer mem.AssertSize(t, 0)
	for _, c := range []struct {
		rows string
		want []int64
	}{
		{"", []int64{0}},
		{blobs("1"), []int64{1}},
		{blobs("1", "1", "1"), []int64{3}},
		{blobs("2", "2", "2"), []int64{1, 2, 3}},
		{blobs("9", "1", "2", "9"), []int64{1, 3, 4}},
		{blobs("null", "3", "null", "null", "1"), []int64{4, 5}},
		{blobs("0", "0", "3", "0"), []int64{4}},
	} {
		rec := record(t, mem, "p", blob, c.rows)
		if got := bindPicture(t, rec.Schema()).Cut(rec, weighed{}, 3); !slices.Equal(got, c.want) {
			t.Errorf("%v is cut at %d, want %d", c.rows, got, c.want)
		}
		rec.Release()
	}
	nothing := record(t, mem, "p", arrow.Null, "null,null")
	defer nothing.Release()
	rows := NewRows(2)
	binding := bindPicture(t, nothing.Schema())
	binding.Nulls(nothing, rows, false)
	if got := binding.Cut(nothing, weighed{}, 1); !slices.Equal(got, []int64{2}) || rows.Kept() != 0 {
		t.Errorf("a column of nulls is cut at %d, %d rows kept", got, rows.Kept())
	}
	numbers := record(t, mem, "x", f32, "1,2")
	defer numbers.Release()
	binding = bindOne(t, spec("x", savedmodel.Float32, -1), protocol.Input{}, numbers.Schema().Field(0))
	if got := binding.Cut(numbers, nil, 1); !slices.Equal(got, []int64{2}) {
		t.Errorf("a record batch without pictures is cut at %d", got)
	}
}

// Interface guards.
var _ Pictures = decoder(nil)
