// Tests against the golden files: descriptors that fit no model, metadata of a schema, columns.

package handlers

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/ipc"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// golden is the folder of the files that testdata/make_golden.py has written.
const golden = "../testdata/golden"

func TestGoldenUnfitDescriptors(t *testing.T) {
	var file struct {
		Taken, Refused json.RawMessage
		Unfit          []struct {
			Name, Text string
			Says       []string
		}
	}
	expect.Golden(t, golden, "descriptors.json", &file)
	model, err := savedmodel.Read(t.Context(), filepath.Join(golden, "model"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range file.Unfit {
		t.Run(c.Name, func(t *testing.T) {
			d, err := ParseDescriptor(command(c.Text))
			if err != nil {
				t.Fatal(err)
			}
			kind := fault.BadRequest
			if c.Name == "no such signature" {
				kind = fault.NotFound
			}
			_, err = Plan(d, model)
			expect.Fault(t, err, kind, c.Says...)
		})
	}
}

func TestGoldenSchemaMetadata(t *testing.T) {
	var file map[string]json.RawMessage
	expect.Golden(t, golden, "schema_metadata.json", &file)
	model, err := savedmodel.Read(t.Context(), filepath.Join(golden, "model"), nil)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(file["descriptor"]), "{", `{"model":"m",`, 1)
	d, err := ParseDescriptor(command(text))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Plan(d, model)
	if err != nil {
		t.Fatal(err)
	}
	about := plan.Schema().Metadata().ToMap()
	if len(about) != len(file)-1 {
		t.Errorf("the schema's metadata is %v", about)
	}
	if got := about["flightsvc.v"]; got != "1" {
		t.Errorf("flightsvc.v is %q", got)
	}
	expect.SameJSON(t, []byte(about["flightsvc.inputs"]), file["flightsvc.inputs"])
}

// goldenAsk is a column of columns.arrows, the input that it feeds, and what then becomes of parts
// of record batches.
type goldenAsk struct {
	Entry map[string]any // of the descriptor's inputs
	DType string
	Shape []int64
	Views []struct {
		Batch, Offset, Length int
		Null, Refused         []int
		Shape                 []int64
		Elements              json.RawMessage // absent where no row takes part
		Lengths               string
	}
}

func TestGoldenColumns(t *testing.T) {
	var asks []goldenAsk
	expect.Golden(t, golden, "columns.json", &asks)
	mem := &offheap.Allocator{}
	file, err := os.Open(filepath.Join(golden, "columns.arrows"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	reader, err := ipc.NewReader(file, ipc.WithAllocator(mem))
	if err != nil {
		t.Fatal(err)
	}
	var batches []arrow.Record
	for reader.Next() {
		rec := reader.Record()
		rec.Retain()
		batches = append(batches, rec)
	}
	if err := reader.Err(); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	for _, ask := range asks {
		t.Run(fmt.Sprintf("%v for %s %v", ask.Entry, ask.DType, ask.Shape), func(t *testing.T) {
			binding := ask.bind(t, reader.Schema())
			for _, view := range ask.Views {
				rec := batches[view.Batch].NewSlice(int64(view.Offset), int64(view.Offset+view.Length))
				rows := tensor.NewRows(view.Length)
				if err := binding.Check(rec); err != nil {
					t.Fatal(err)
				}
				binding.Nulls(rec, rows, false)
				feeds := map[string]tensor.Value{}
				if rows.Kept() > 0 {
					made, err := binding.Values(t.Context(), rec, rows, nil, mem)
					if err != nil {
						t.Fatal(err)
					}
					for _, feed := range made {
						feeds[feed.Tensor] = feed.Value
					}
				}
				place := fmt.Sprintf("rows %d to %d of record batch %d", view.Offset, view.Offset+view.Length,
					view.Batch)
				var kept []int
				for row := range view.Length {
					if !slices.Contains(view.Null, row) && !slices.Contains(view.Refused, row) {
						kept = append(kept, row)
					}
				}
				if got := rows.Positions(); !slices.Equal(got, kept) {
					t.Errorf("%s: rows %v take part, want %v", place, got, kept)
				}
				if row, reason, ok := rows.FirstRefused(); ok != (len(view.Refused) > 0) || ok &&
					row != view.Refused[0] {
					t.Errorf("%s: row %d is refused (%s), want those at %v", place, row, reason, view.Refused)
				}
				if len(kept) > 0 {
					x := feeds["x:0"]
					got, err := json.Marshal(elementsOf(&x))
					if err != nil {
						t.Fatal(err)
					}
					if !slices.Equal(x.Shape, view.Shape) || x.DType.String() != ask.DType {
						t.Errorf("%s: %s %v, want %s %v", place, x.DType, x.Shape, ask.DType, view.Shape)
					}
					expect.SameJSON(t, got, view.Elements)
					if lengths, ok := feeds["len:0"]; ok != (view.Lengths != "") ||
						hex.EncodeToString(lengths.Data) != view.Lengths {
						t.Errorf("%s: the lengths are %x, want %s", place, lengths.Data, view.Lengths)
					}
				}
				for _, value := range feeds {
					value.Release()
				}
				rec.Release()
			}
		})
	}
	for _, rec := range batches {
		rec.Release()
	}
	reader.Release()
	if live := mem.Live(); live != 0 {
		t.Errorf("%d bytes are not given back", live)
	}
}

// bind plans a signature whose input x is fed as asked, and binds it.
func (ask *goldenAsk) bind(t *testing.T, schema *arrow.Schema) *tensor.Binding {
	t.Helper()
	spec := func(name, dtype string, shape ...int64) savedmodel.Spec {
		for number := range savedmodel.DType(100) {
			if number.String() == dtype {
				return savedmodel.Spec{Name: name, Tensor: name + ":0", DType: number, Shape: shape}
			}
		}
		t.Fatalf("no dtype %s", dtype)
		return savedmodel.Spec{}
	}
	signature := savedmodel.Signature{Outputs: []savedmodel.Spec{spec("y", "float32", -1)}}
	if ask.Entry["lengths"] != nil {
		signature.Inputs = append(signature.Inputs, spec("len", "int32", -1))
	}
	signature.Inputs = append(signature.Inputs, spec("x", ask.DType, ask.Shape...))
	text, err := json.Marshal(map[string]any{"v": 1, "model": "m", "inputs": map[string]any{"x": ask.Entry}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := ParseDescriptor(command(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Plan(d,
		&savedmodel.Model{Signatures: map[string]savedmodel.Signature{savedmodel.DefaultSignature: signature}})
	if err != nil {
		t.Fatal(err)
	}
	binding, err := plan.Bind(schema)
	if err != nil {
		t.Fatal(err)
	}
	return binding
}

// elementsOf returns hexadecimal digits: of all bytes, or of each string.
func elementsOf(value *tensor.Value) any {
	if value.DType != savedmodel.String {
		return hex.EncodeToString(value.Data)
	}
	texts := []string{}
	for _, s := range value.Strings {
		texts = append(texts, hex.EncodeToString(s))
	}
	return texts
}
