package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"flightsvc/internal/client"
	"flightsvc/internal/protocol"
	"flightsvc/internal/tablefile"
)

// predictPatience is for how long an unavailable server is asked again before any row was sent: the shim's
// retry-timeout.
const predictPatience = 2 * time.Minute

type predictCommand struct {
	frontFlags
	modelArgument
	In  string `arg:"" help:"File to read: .parquet, .csv, .arrow or .feather (an Arrow file), .arrows (an Arrow stream), or - for an Arrow stream on standard input."`
	Out string `arg:"" help:"File to write, with IN's columns and the model's outputs; formats as of IN, - for standard output. It appears once it is whole."`

	Signature   string    `default:"serving_default" help:"Which signature to run. Default: serving_default."`
	Input       []mapping `sep:"none" placeholder:"TENSOR=COLUMN" help:"The column that feeds an input; once for each. Default: columns of the same names, or the only column for the only input."`
	Output      []mapping `sep:"none" placeholder:"TENSOR=COLUMN" help:"An output and the name of its column; once for each, in the wanted order. Default: all."`
	OnError     string    `default:"fail" enum:"fail,null,column" help:"What a row that cannot be run does: fail all, make its outputs null, or null with the reason in a column (column). Default: fail."`
	ErrorColumn string    `default:"error" help:"Name of the column for the reason. Default: error."`
	Device      string    `default:"auto" help:"auto, cpu, gpu, a UUID, or numbers as nvidia-smi prints them. Default: auto."`
	BatchRows   int64     `default:"4096" help:"Most rows of a record batch that is sent. Default: 4096, fewer where rows are large."`
}

// mapping is TENSOR=COLUMN.
type mapping struct{ tensor, column string }

// UnmarshalText is part of encoding.TextUnmarshaler.
func (m *mapping) UnmarshalText(text []byte) error {
	var ok bool
	if m.tensor, m.column, ok = strings.Cut(string(text), "="); !ok || m.tensor == "" || m.column == "" {
		return fmt.Errorf("%q is not TENSOR=COLUMN", text)
	}
	return nil
}

// Validate is called by kong.
func (c *predictCommand) Validate() error {
	if c.BatchRows < 1 {
		return fmt.Errorf("batch-rows is %d; want 1 or more", c.BatchRows)
	}
	for _, path := range []string{c.In, c.Out} {
		if _, err := tablefile.Format(path); err != nil {
			return err
		}
	}
	if c.Out == tablefile.Standard && term.IsTerminal(int(os.Stdout.Fd())) {
		return errors.New("an Arrow stream is nothing for a terminal; name a file, or pipe it into a program")
	}
	return nil
}

// Run is called by kong.
func (c *predictCommand) Run(line *cli) error {
	if c.Out == tablefile.Standard { // there is nothing to clear away
		return c.run(context.Background(), string(line.Config))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := c.run(ctx, string(line.Config))
	if ctx.Err() != nil && err != nil {
		return errors.New("interrupted; nothing was written")
	}
	return err
}

func (c *predictCommand) run(ctx context.Context, config string) error {
	in, err := tablefile.Open(ctx, c.In, c.BatchRows)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	body, err := c.body()
	if err != nil {
		return err
	}
	front, err := c.started(ctx, config)
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	about, err := client.Ask[protocol.Metadata](ctx, front, "model.metadata", body)
	if err != nil {
		return err
	}
	signature, ok := about.Signatures[c.Signature]
	if !ok {
		return fmt.Errorf("model %s has no signature %q; it has %q", c.Model, c.Signature, slices.Sorted(maps.Keys(about.Signatures)))
	}
	sent, err := c.columns(signature.Inputs, in.Schema())
	if err != nil {
		return err
	}
	descriptor, err := c.descriptor(body, about.Version, sent, signature)
	if err != nil {
		return err
	}
	answer, err := front.AnswerSchema(ctx, descriptor)
	if err != nil {
		return err
	}
	schema, err := joined(in.Schema(), answer, c.In)
	if err != nil {
		return err
	}
	out, err := tablefile.Create(c.Out, schema)
	if err != nil {
		return err
	}
	defer out.Abort()

	progress := newProgress(c.Out)
	err = front.Exchange(ctx, client.Request{Descriptor: descriptor, Sent: sent.project, Patience: predictPatience}, in.Read,
		func(rows, outputs arrow.Record) error {
			if err := out.Write(append(slices.Clone(rows.Columns()), outputs.Columns()...), rows.NumRows()); err != nil {
				return fmt.Errorf("%s: %w", c.Out, err)
			}
			progress.add(rows.NumRows(), in.Rows())
			return nil
		})
	progress.end(err == nil)
	if err != nil {
		return err
	}
	if err := out.Commit(); err != nil {
		return fmt.Errorf("%s: %w", c.Out, err)
	}
	return nil
}

// descriptor returns what is asked of the model.
func (c *predictCommand) descriptor(body modelBody, version string, sent *sentColumns, signature protocol.SignatureMetadata) (protocol.Descriptor, error) {
	d := protocol.Descriptor{V: protocol.Version, Model: body.Model, Version: version, Signature: c.Signature, Inputs: sent.inputs, RequestID: fmt.Sprintf("predict-%d", os.Getpid())}
	if c.OnError != protocol.OnErrorFail {
		d.OnError = c.OnError
	}
	if c.OnError == protocol.OnErrorColumn {
		d.ErrorColumn = c.ErrorColumn
	}
	if c.Device != protocol.DeviceAuto {
		d.Device = c.Device
	}
	outputs := c.Output
	known := names(signature.Outputs)
	for _, output := range outputs {
		if !slices.Contains(known, output.tensor) {
			return d, fmt.Errorf("model %s, signature %s: there is no output %q; %s", c.Model, c.Signature, output.tensor, near(output.tensor, known))
		}
	}
	format, err := tablefile.Format(c.Out)
	if err != nil {
		return d, err
	}
	if format == tablefile.CSV && len(outputs) == 0 { // all of them, to be able to say that those of strings are texts
		for _, name := range known {
			outputs = append(outputs, mapping{name, name})
		}
	}
	for _, output := range outputs {
		entry := protocol.Output{Tensor: output.tensor, Column: output.column}
		spec := signature.Outputs[slices.Index(known, output.tensor)]
		if format == tablefile.CSV && spec.DType == "string" && len(spec.Shape) == 1 {
			entry.Type = "utf8"
		}
		d.Outputs = append(d.Outputs, entry)
	}
	return d, nil
}

// sentColumns makes, of a record batch that was read, the one that is sent.
type sentColumns struct {
	inputs    protocol.Inputs
	positions []int            // of the columns that are sent
	types     []arrow.DataType // what a column of texts becomes; nil leaves it
	schema    *arrow.Schema
	rows      int64 // so far, for errors
}

// columns finds the column of each input.
func (c *predictCommand) columns(inputs []protocol.TensorMetadata, schema *arrow.Schema) (*sentColumns, error) {
	where := fmt.Sprintf("model %s, signature %s", c.Model, c.Signature)
	known, columns := names(inputs), make([]string, 0, len(schema.Fields()))
	for _, field := range schema.Fields() {
		columns = append(columns, field.Name)
	}
	wanted := slices.Clone(c.Input)
	switch {
	case len(wanted) == 0 && len(known) == 1 && len(columns) == 1:
		wanted = []mapping{{known[0], columns[0]}}
	case len(wanted) == 0:
		for _, name := range known {
			wanted = append(wanted, mapping{name, name})
		}
	}
	csv := strings.HasSuffix(strings.ToLower(c.In), tablefile.CSV)
	s := &sentColumns{}
	var fields []arrow.Field
	for _, input := range wanted {
		i := slices.Index(known, input.tensor)
		if i < 0 {
			return nil, fmt.Errorf("%s: there is no input %q; %s", where, input.tensor, near(input.tensor, known))
		}
		found := schema.FieldIndices(input.column)
		if len(found) == 0 {
			hint := ""
			if len(c.Input) == 0 {
				hint = fmt.Sprintf("; say which one it is: --input %s=COLUMN", input.tensor)
			}
			return nil, fmt.Errorf("%s: %s has no column %q for input %q, %s%s", where, c.In, input.column, input.tensor, near(input.column, columns), hint)
		}
		if len(found) > 1 {
			return nil, fmt.Errorf("%s: %s has %d columns that are called %q, which one feeds input %q? Rename them", where, c.In, len(found), input.column, input.tensor)
		}
		s.inputs = append(s.inputs, protocol.Input{Tensor: input.tensor, Column: input.column})
		field := schema.Field(found[0])
		var kind arrow.DataType
		if csv {
			var err error
			if kind, err = csvType(inputs[i]); err != nil {
				return nil, fmt.Errorf("%s: %w", where, err)
			}
			field.Type = kind
		}
		if at := slices.Index(s.positions, found[0]); at >= 0 {
			if csv && !arrow.TypeEqual(kind, s.types[at]) {
				return nil, fmt.Errorf("%s: column %q of %s feeds two inputs of different types; write it twice", where, input.column, c.In)
			}
			continue
		}
		s.positions = append(s.positions, found[0])
		s.types = append(s.types, kind)
		fields = append(fields, field)
	}
	for _, name := range known {
		if !slices.ContainsFunc(wanted, func(m mapping) bool { return m.tensor == name }) {
			return nil, fmt.Errorf("%s: input %q has no column; add --input %s=COLUMN", where, name, name)
		}
	}
	s.schema = arrow.NewSchema(fields, nil)
	return s, nil
}

// csvTypes are what texts of a CSV file become, by the dtype of the input that they feed.
var csvTypes = map[string]arrow.DataType{
	"float32": arrow.PrimitiveTypes.Float32, "float64": arrow.PrimitiveTypes.Float64, "float16": arrow.PrimitiveTypes.Float32, "bfloat16": arrow.PrimitiveTypes.Float32,
	"int8": arrow.PrimitiveTypes.Int8, "int16": arrow.PrimitiveTypes.Int16, "int32": arrow.PrimitiveTypes.Int32, "int64": arrow.PrimitiveTypes.Int64,
	"uint8": arrow.PrimitiveTypes.Uint8, "uint16": arrow.PrimitiveTypes.Uint16, "uint32": arrow.PrimitiveTypes.Uint32, "uint64": arrow.PrimitiveTypes.Uint64,
	"bool": arrow.FixedWidthTypes.Boolean, "string": arrow.BinaryTypes.String,
}

func csvType(spec protocol.TensorMetadata) (arrow.DataType, error) {
	kind, ok := csvTypes[spec.DType]
	if !ok || (spec.Shape != nil && len(spec.Shape) != 1) {
		return nil, fmt.Errorf("input %q is %s%v, and a cell of a CSV file holds one value; bring it as a list in Parquet or Arrow", spec.Name, spec.DType, spec.Shape)
	}
	return kind, nil
}

func (s *sentColumns) project(rec arrow.Record) (arrow.Record, error) {
	columns := make([]arrow.Array, len(s.positions))
	defer func() {
		for _, column := range columns {
			if column != nil {
				column.Release()
			}
		}
	}()
	for i, position := range s.positions {
		column := rec.Column(position)
		if s.types[i] == nil || arrow.TypeEqual(s.types[i], column.DataType()) {
			column.Retain()
			columns[i] = column
			continue
		}
		var err error
		if columns[i], err = parsed(column.(*array.String), s.types[i], s.rows, rec.ColumnName(position)); err != nil {
			return nil, err
		}
	}
	s.rows += rec.NumRows()
	return array.NewRecord(s.schema, columns, rec.NumRows()), nil
}

// parsed returns texts as values; an empty one is null.
func parsed(texts *array.String, kind arrow.DataType, first int64, name string) (arrow.Array, error) {
	builder := array.NewBuilder(memory.DefaultAllocator, kind)
	defer builder.Release()
	builder.Reserve(texts.Len())
	for i := range texts.Len() {
		text := strings.TrimSpace(texts.Value(i))
		if text == "" {
			builder.AppendNull()
		} else if builder.AppendValueFromString(text) != nil {
			return nil, fmt.Errorf("row %d: column %q holds no %s; correct the cell, or leave it empty, which is null", first+int64(i), name, kind)
		}
	}
	return builder.NewArray(), nil
}

// joined returns the columns of the result.
func joined(in, answer *arrow.Schema, path string) (*arrow.Schema, error) {
	fields := slices.Clone(in.Fields())
	for _, field := range answer.Fields() {
		if len(in.FieldIndices(field.Name)) > 0 {
			return nil, fmt.Errorf("an output would be called %q as a column of %s is; name it otherwise: --output TENSOR=COLUMN, or --error-column for the error", field.Name, path)
		}
		fields = append(fields, field)
	}
	metadata := in.Metadata()
	return arrow.NewSchema(fields, &metadata), nil
}

func names(specs []protocol.TensorMetadata) []string {
	list := make([]string, len(specs))
	for i, spec := range specs {
		list[i] = spec.Name
	}
	return list
}

// progress is a bar on standard error, where that is a terminal.
type progress struct {
	bar     *progressbar.ProgressBar // nil where nobody looks
	rows    int64
	started time.Time
	out     string
}

func newProgress(out string) *progress {
	p := &progress{started: time.Now(), out: out}
	if term.IsTerminal(int(os.Stderr.Fd())) {
		p.bar = progressbar.NewOptions64(-1, progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetDescription("rows"), progressbar.OptionShowCount(),
			progressbar.OptionShowIts(), progressbar.OptionSetItsString("rows"), progressbar.OptionSetPredictTime(true), progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(), progressbar.OptionFullWidth())
	}
	return p
}

// add says that so many rows more are done, of about all.
func (p *progress) add(rows, all int64) {
	p.rows += rows
	if p.bar == nil {
		return
	}
	if all > p.rows && all != p.bar.GetMax64() {
		p.bar.ChangeMax64(all)
	}
	_ = p.bar.Add64(rows) // a terminal that went away is no reason to stop
}

// end takes the bar away and, if all went well, says what was done.
func (p *progress) end(well bool) {
	if p.bar == nil {
		return
	}
	_ = p.bar.Clear()
	if took := time.Since(p.started); well {
		_, _ = fmt.Fprintf(os.Stderr, "%d rows in %.1f s, %.0f rows/s: %s\n", p.rows, took.Seconds(), float64(p.rows)/max(took.Seconds(), 1e-9), p.out)
	}
}
