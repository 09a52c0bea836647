package tensor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// Mapping says which tensor belongs to which column, in the order in which it was written.
// In JSON it is an object, {"tensor": "column"} or {"tensor": {"column": "column"}}.
type Mapping []Pair

// Pair is one entry of a Mapping.
type Pair struct{ Tensor, Column string }

// UnmarshalJSON keeps the object's order, refuses a tensor named twice and unknown fields.
func (m *Mapping) UnmarshalJSON(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return fmt.Errorf("a mapping of tensors to columns must be an object")
	}
	*m = Mapping{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		pair := Pair{Tensor: key.(string)}
		if m.Column(pair.Tensor) != "" {
			return fmt.Errorf("tensor %q is mapped twice", pair.Tensor)
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return err
		}
		if err := pair.setColumn(raw); err != nil {
			return err
		}
		*m = append(*m, pair)
	}
	_, err := dec.Token()
	return err
}

func (p *Pair) setColumn(raw []byte) error {
	if json.Unmarshal(raw, &p.Column) != nil {
		var long struct {
			Column string `json:"column"`
		}
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&long); err != nil {
			return fmt.Errorf("tensor %q: want a column's name or {\"column\": name}: %w", p.Tensor, err)
		}
		p.Column = long.Column
	}
	if p.Column == "" {
		return fmt.Errorf("tensor %q is mapped to no column", p.Tensor)
	}
	return nil
}

// MarshalJSON writes the short form, in order.
func (m Mapping) MarshalJSON() ([]byte, error) {
	var out bytes.Buffer
	out.WriteByte('{')
	for i, pair := range m {
		if i > 0 {
			out.WriteByte(',')
		}
		key, err := json.Marshal(pair.Tensor)
		if err != nil {
			return nil, err
		}
		column, err := json.Marshal(pair.Column)
		if err != nil {
			return nil, err
		}
		out.Write(key)
		out.WriteByte(':')
		out.Write(column)
	}
	out.WriteByte('}')
	return out.Bytes(), nil
}

// Column returns the column of a tensor, or "".
func (m Mapping) Column(tensor string) string {
	for _, pair := range m {
		if pair.Tensor == tensor {
			return pair.Column
		}
	}
	return ""
}

// Options are the parts of a request that shape a plan.
type Options struct {
	Inputs      Mapping         // nil: same names, or the only column to the only input
	Outputs     Mapping         // nil: all outputs, by tensor name
	Pictures    map[string]bool // inputs fed by encoded pictures, which the caller decodes
	ErrorColumn string          // column for error texts; "" for none
	Metadata    arrow.Metadata  // put into the answer's schema
}

// Plan is a signature joined with a request: which inputs are fed, which outputs answer,
// and the schema of the answer. It is immutable and safe for concurrent use.
type Plan struct {
	signature savedmodel.Signature
	options   Options
	outputs   []output
	schema    *arrow.Schema
}

type output struct {
	spec   savedmodel.Spec
	column string
	leaf   leafOut
}

// NewPlan checks a request against a signature. Its faults name the input, output or
// column, and what the signature has instead.
func NewPlan(signature savedmodel.Signature, options Options) (*Plan, error) {
	for _, pair := range options.Inputs {
		if _, ok := find(signature.Inputs, pair.Tensor); !ok {
			return nil, fault.New(fault.BadRequest, "no input %q; the signature has %s", pair.Tensor, describe(signature.Inputs))
		}
	}
	for name := range options.Pictures {
		spec, ok := find(signature.Inputs, name)
		if !ok {
			return nil, fault.New(fault.BadRequest, "preprocess names no input %q; the signature has %s", name, describe(signature.Inputs))
		}
		if spec.DType != savedmodel.Float32 || (!spec.UnknownRank && len(spec.Shape) != 4) {
			return nil, fault.New(fault.BadRequest, "preprocess makes float32 [batch,height,width,3], but input %s", describe([]savedmodel.Spec{spec}))
		}
	}
	if len(signature.Inputs) == 0 {
		return nil, fault.New(fault.BadRequest, "the signature has no input, so it has no rows")
	}
	for _, spec := range signature.Inputs {
		if options.Inputs != nil && options.Inputs.Column(spec.Name) == "" {
			return nil, fault.New(fault.BadRequest, "input %q is not mapped to a column; the signature has %s", spec.Name, describe(signature.Inputs))
		}
		if !spec.UnknownRank && (len(spec.Shape) == 0 || spec.Shape[0] >= 0) {
			return nil, fault.New(fault.BadRequest, "input %s has no batch dimension: its first dimension must be unknown, export it as None", describe([]savedmodel.Spec{spec}))
		}
	}

	outputs := options.Outputs
	if outputs == nil {
		for _, spec := range signature.Outputs {
			outputs = append(outputs, Pair{Tensor: spec.Name, Column: spec.Name})
		}
	}
	if len(outputs) == 0 {
		return nil, fault.New(fault.BadRequest, "no output is asked for; the signature has %s", describe(signature.Outputs))
	}
	plan := &Plan{signature: signature, options: options}
	var columns []arrow.Field
	add := func(name string, dtype arrow.DataType) error {
		if slices.ContainsFunc(columns, func(f arrow.Field) bool { return f.Name == name }) {
			return fault.New(fault.BadRequest, "two outputs have the column name %q; name another in outputs or error_column", name)
		}
		columns = append(columns, arrow.Field{Name: name, Type: dtype, Nullable: true})
		return nil
	}
	for _, pair := range outputs {
		spec, ok := find(signature.Outputs, pair.Tensor)
		if !ok {
			return nil, fault.New(fault.BadRequest, "no output %q; the signature has %s", pair.Tensor, describe(signature.Outputs))
		}
		leaf, dtype, err := outputType(spec)
		if err != nil {
			return nil, err
		}
		plan.outputs = append(plan.outputs, output{spec: spec, column: pair.Column, leaf: leaf})
		if err := add(pair.Column, dtype); err != nil {
			return nil, err
		}
	}
	if options.ErrorColumn != "" {
		if err := add(options.ErrorColumn, arrow.BinaryTypes.String); err != nil {
			return nil, err
		}
	}
	plan.schema = arrow.NewSchema(columns, &options.Metadata)
	return plan, nil
}

// Schema returns the schema of the answer: the output columns, then the error column.
func (p *Plan) Schema() *arrow.Schema { return p.schema }

// Fetches returns the graph tensors to fetch, in the order that Record expects.
func (p *Plan) Fetches() []string {
	names := make([]string, len(p.outputs))
	for i, out := range p.outputs {
		names[i] = out.spec.Tensor
	}
	return names
}

// Binding is a plan fitted to the schema of one stream.
type Binding struct {
	plan   *Plan
	inputs []boundInput
}

type boundInput struct {
	spec    savedmodel.Spec
	column  int
	name    string
	picture bool
}

// Bind finds the column of each input in a stream's schema and checks its type. Its faults
// name input, column, both types, and the cast to write.
func (p *Plan) Bind(schema *arrow.Schema) (*Binding, error) {
	binding := &Binding{plan: p}
	for _, spec := range p.signature.Inputs {
		name := p.options.Inputs.Column(spec.Name)
		if p.options.Inputs == nil {
			name = spec.Name
			if len(p.signature.Inputs) == 1 && len(schema.Fields()) == 1 {
				name = schema.Field(0).Name
			}
		}
		at := schema.FieldIndices(name)
		if len(at) != 1 {
			return nil, fault.New(fault.BadRequest, "input %q wants column %q, which the stream has %s; its columns are %s", spec.Name, name, times(len(at)), columnNames(schema))
		}
		in := boundInput{spec: spec, column: at[0], name: name, picture: p.options.Pictures[spec.Name]}
		if err := in.check(schema.Field(at[0]).Type); err != nil {
			return nil, err
		}
		binding.inputs = append(binding.inputs, in)
	}
	return binding, nil
}

// check compares a column's type with the input that it feeds.
func (in *boundInput) check(column arrow.DataType) error {
	if in.picture {
		switch column.ID() {
		case arrow.BINARY, arrow.LARGE_BINARY:
			return nil
		}
		return fault.New(fault.BadRequest, "input %q decodes pictures and wants a binary column; column %q is %s", in.spec.Name, in.name, column)
	}
	leaf, sizes := unnest(column)
	if !in.spec.UnknownRank && len(sizes)+1 != len(in.spec.Shape) {
		return fault.New(fault.BadRequest, "input %s wants %s of list in each row; column %q is %s", describe([]savedmodel.Spec{in.spec}), levels(len(in.spec.Shape)-1), in.name, column)
	}
	for i, size := range sizes {
		if !in.spec.UnknownRank && size >= 0 && in.spec.Shape[i+1] >= 0 && size != in.spec.Shape[i+1] {
			return fault.New(fault.BadRequest, "input %s wants dimension %d to be %d; column %q is %s", describe([]savedmodel.Spec{in.spec}), i+1, in.spec.Shape[i+1], in.name, column)
		}
	}
	if !accepts(leaf, in.spec.DType) {
		return fault.New(fault.BadRequest, "input %s cannot take column %q of %s; cast its elements to %s", describe([]savedmodel.Spec{in.spec}), in.name, column, in.spec.DType)
	}
	return nil
}

// unnest returns the leaf type below all lists and, from outside in, the size of each list
// level, -1 where it varies.
func unnest(t arrow.DataType) (leaf arrow.DataType, sizes []int64) {
	for {
		switch list := t.(type) {
		case *arrow.FixedSizeListType:
			sizes, t = append(sizes, int64(list.Len())), list.Elem()
		case *arrow.ListType:
			sizes, t = append(sizes, -1), list.Elem()
		case *arrow.LargeListType:
			sizes, t = append(sizes, -1), list.Elem()
		default:
			return t, sizes
		}
	}
}

// Nulls takes the rows out of the run in which any input is null at any depth.
// If refuse is set they are refused rows with a reason, else null rows as in SQL.
func (b *Binding) Nulls(rec arrow.Record, rows *Rows, refuse bool) {
	for _, in := range b.inputs {
		for row, null := range nullRows(rec.Column(in.column)) {
			switch {
			case !null:
			case refuse:
				rows.Refuse(row, fmt.Sprintf("column %q is null", in.name))
			default:
				rows.Null(row)
			}
		}
	}
}

// Pictures decodes one input's encoded pictures, given as views of the column's memory, into
// a value whose rows are theirs, in order. failed holds a reason for each row that cannot be
// decoded; such a row's part of the value is not defined.
type Pictures func(input string, encoded [][]byte, mem memory.Allocator) (value Value, failed map[int]string, err error)

// Feed is the value of one input for one batch.
type Feed struct {
	Tensor string // tensor in the graph
	Value  Value
}

// Values makes the input tensors from the rows that take part; there must be at least one.
// Rows whose picture cannot be decoded are refused in rows; if none is left the result is
// empty. Elements of string tensors view rec, which must outlive the feeds. The caller
// releases each value. Faults name input, column and both shapes.
func (b *Binding) Values(rec arrow.Record, rows *Rows, decode Pictures, mem memory.Allocator) (feeds []Feed, err error) {
	defer func() {
		if err != nil {
			ReleaseFeeds(feeds)
			feeds = nil
		}
	}()
	feeds = make([]Feed, 0, len(b.inputs))
	for _, in := range b.inputs {
		if !in.picture {
			continue
		}
		before := rows.Positions()
		encoded, at := make([][]byte, len(before)), bytesAt(rec.Column(in.column))
		for i, row := range before {
			encoded[i] = at(row)
		}
		value, failed, err := decode(in.spec.Name, encoded, mem)
		if err != nil {
			return feeds, err
		}
		feeds = append(feeds, Feed{Tensor: in.spec.Tensor, Value: value})
		if len(failed) == 0 {
			continue
		}
		for i, reason := range failed {
			rows.Refuse(before[i], fmt.Sprintf("column %q: %s", in.name, reason))
		}
		if rows.Kept() == 0 {
			ReleaseFeeds(feeds)
			return nil, nil
		}
		for i := range feeds {
			narrowed := feeds[i].Value.Take(remaining(before, rows), mem)
			feeds[i].Value.Release()
			feeds[i].Value = narrowed
		}
	}
	ranges := rows.spans()
	for _, in := range b.inputs {
		if in.picture {
			continue
		}
		leaf, leafRanges, dims, err := flatten(rec.Column(in.column), ranges)
		if err == nil {
			err = in.fits(dims)
		}
		if err != nil {
			return feeds, fault.New(fault.BadRequest, "input %s, column %q: %w", describe([]savedmodel.Spec{in.spec}), in.name, err)
		}
		shape := append([]int64{int64(rows.Kept())}, dims...)
		feeds = append(feeds, Feed{Tensor: in.spec.Tensor, Value: leafValue(leaf, leafRanges, in.spec.DType, shape, mem)})
	}
	return feeds, nil
}

// ReleaseFeeds releases every value.
func ReleaseFeeds(feeds []Feed) {
	for i := range feeds {
		feeds[i].Value.Release()
	}
}

// remaining returns the positions within before of the rows that still take part.
func remaining(before []int, rows *Rows) []int {
	positions := make([]int, 0, rows.Kept())
	for i, row := range before {
		if rows.state[row] == rowKept {
			positions = append(positions, i)
		}
	}
	return positions
}

// fits compares the dimensions of a batch with the signature's, which settle those that are -1
// because there was no list to tell them.
func (in *boundInput) fits(dims []int64) error {
	for i, got := range dims {
		want := int64(-1)
		if !in.spec.UnknownRank {
			want = in.spec.Shape[i+1]
		}
		if got < 0 {
			dims[i] = max(want, 0)
		} else if want >= 0 && want != got {
			return fmt.Errorf("its lists have %d elements at dimension %d, want %d", got, i+1, want)
		}
	}
	return nil
}

// flatten walks down the list levels of a column and returns the leaf array, the ranges of
// its elements that belong to the given ranges of rows, and the dimensions of one row, -1 below
// lists that are all empty. Lists must agree in length within the batch.
func flatten(column arrow.Array, ranges []span) (leaf arrow.Array, leafRanges []span, dims []int64, err error) {
	list, ok := column.(array.ListLike)
	if !ok {
		return column, ranges, nil, nil
	}
	child := list.ListValues()
	length := int64(-1)
	if fixed, ok := column.DataType().(*arrow.FixedSizeListType); ok {
		length = int64(fixed.Len())
	}
	inner := make([]span, 0, len(ranges))
	for _, r := range ranges {
		var next span
		for row := r.lo; row < r.hi; row++ {
			lo, hi := list.ValueOffsets(row)
			if lo < 0 || hi < lo || hi > int64(child.Len()) || (row > r.lo && int(lo) != next.hi) {
				return nil, nil, nil, fmt.Errorf("the offsets of its lists do not fit its elements")
			}
			if length < 0 {
				length = hi - lo
			}
			if hi-lo != length {
				return nil, nil, nil, fmt.Errorf("lists of %d and of %d elements in one batch; all must have the same length", length, hi-lo)
			}
			if row == r.lo {
				next.lo = int(lo)
			}
			next.hi = int(hi)
		}
		inner = append(inner, next)
	}
	leaf, leafRanges, below, err := flatten(child, inner)
	return leaf, leafRanges, append([]int64{length}, below...), err
}

func find(specs []savedmodel.Spec, name string) (savedmodel.Spec, bool) {
	for _, spec := range specs {
		if spec.Name == name {
			return spec, true
		}
	}
	return savedmodel.Spec{}, false
}

// describe writes specs as people read them: "x" float32 [?,4].
func describe(specs []savedmodel.Spec) string {
	texts := make([]string, len(specs))
	for i, spec := range specs {
		shape := "of unknown rank"
		if !spec.UnknownRank {
			dims := make([]string, len(spec.Shape))
			for j, d := range spec.Shape {
				dims[j] = "?"
				if d >= 0 {
					dims[j] = fmt.Sprint(d)
				}
			}
			shape = "[" + strings.Join(dims, ",") + "]"
		}
		texts[i] = fmt.Sprintf("%q %s %s", spec.Name, spec.DType, shape)
	}
	return strings.Join(texts, ", ")
}

func columnNames(schema *arrow.Schema) string {
	names := make([]string, len(schema.Fields()))
	for i, field := range schema.Fields() {
		names[i] = fmt.Sprintf("%q", field.Name)
	}
	return strings.Join(names, ", ")
}

func times(n int) string {
	if n == 0 {
		return "not"
	}
	return fmt.Sprintf("%d times", n)
}

func levels(n int) string {
	if n == 1 {
		return "1 level"
	}
	return fmt.Sprintf("%d levels", n)
}
