package tablefile

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	arrowcsv "github.com/apache/arrow/go/v15/arrow/csv"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"github.com/apache/arrow/go/v15/parquet"
	"github.com/apache/arrow/go/v15/parquet/compress"
	"github.com/apache/arrow/go/v15/parquet/pqarrow"
)

// rowGroupBytes and rowGroupRows are where a row group of Parquet ends; it is in memory until then.
const (
	rowGroupBytes = 32 << 20
	rowGroupRows  = 1 << 20
)

// Writer writes a table to a file that has its name only once it is whole.
type Writer struct {
	sink
	schema *arrow.Schema
	file   *os.File // nil for standard output
	path   string
}

// sink is one format.
type sink interface {
	write(arrow.Record) error
	finish() error
}

// Create begins a table at path, or on standard output for Standard. Errors name the file, or the column whose type
// the format does not have.
func Create(path string, schema *arrow.Schema) (*Writer, error) {
	format, err := Format(path)
	if err != nil {
		return nil, err
	}
	if format == CSV {
		for _, field := range schema.Fields() {
			if !plain(field.Type) {
				return nil, fmt.Errorf("%s: CSV has no place for column %q, of type %s; write Parquet or Arrow, or choose other outputs", path, field.Name, field.Type)
			}
		}
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%s is a folder; name a file", path)
	}
	w := &Writer{schema: schema, path: path}
	out := os.Stdout
	if path != Standard {
		suffix := make([]byte, 4)
		_, _ = rand.Read(suffix) // never fails
		name := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+hex.EncodeToString(suffix)+".part")
		if w.file, err = os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o666); err != nil { //nolint:gosec // where the user wants it, with the user's umask
			return nil, err
		}
		out = w.file
	}
	switch format {
	case Parquet:
		w.sink, err = newParquetSink(out, schema)
	case CSV:
		w.sink = newCSVSink(out, schema)
	case ArrowFile:
		var writer *ipc.FileWriter
		writer, err = ipc.NewFileWriter(out, ipc.WithSchema(schema))
		w.sink = arrowSink{writer, nil}
	default:
		buffer := bufio.NewWriterSize(out, 1<<20)
		w.sink = arrowSink{ipc.NewWriter(buffer, ipc.WithSchema(schema)), buffer}
	}
	if err != nil {
		w.Abort()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return w, nil
}

// Write adds a record batch, whose columns are those of the schema.
func (w *Writer) Write(columns []arrow.Array, rows int64) (err error) {
	defer recovered(&err)
	rec := array.NewRecord(w.schema, columns, rows)
	defer rec.Release()
	return w.write(rec)
}

// Commit ends the table and gives the file its name, in place of one that has it.
func (w *Writer) Commit() (err error) {
	defer recovered(&err)
	if err := w.finish(); err != nil {
		return err
	}
	if w.file == nil {
		return nil
	}
	if err := w.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) { // Parquet's writer closes it
		return err
	}
	return os.Rename(w.file.Name(), w.path)
}

// Abort removes what was written. After Commit it does nothing.
func (w *Writer) Abort() {
	if w.file != nil {
		_ = w.file.Close()
		_ = os.Remove(w.file.Name())
	}
}

type parquetSink struct {
	writer *pqarrow.FileWriter
	rows   int64 // of the open row group
}

func newParquetSink(out io.Writer, schema *arrow.Schema) (sink, error) {
	// Data pages of version 2: for those of version 1 arrow v15 copies the levels of lists again and again, and lets their
	// buffers grow without end (PooledBufferWriter.Reserve with an offset).
	properties := parquet.NewWriterProperties(parquet.WithDataPageVersion(parquet.DataPageV2), parquet.WithVersion(parquet.V2_LATEST),
		parquet.WithCompression(compress.Codecs.Snappy), parquet.WithCreatedBy("flightsvc"))
	writer, err := pqarrow.NewFileWriter(schema, out, properties, pqarrow.NewArrowWriterProperties(pqarrow.WithStoreSchema()))
	return &parquetSink{writer: writer}, err
}

func (s *parquetSink) write(rec arrow.Record) error {
	if s.writer.RowGroupTotalCompressedBytes() >= rowGroupBytes || s.rows >= rowGroupRows {
		s.writer.NewBufferedRowGroup()
		s.rows = 0
	}
	s.rows += rec.NumRows()
	return s.writer.WriteBuffered(rec)
}

func (s *parquetSink) finish() error { return s.writer.Close() }

type csvSink struct {
	writer *arrowcsv.Writer
	buffer *bufio.Writer
	empty  arrow.Record
}

func newCSVSink(out io.Writer, schema *arrow.Schema) sink {
	buffer := bufio.NewWriterSize(out, 1<<20)
	builder := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer builder.Release()
	return &csvSink{arrowcsv.NewWriter(buffer, schema, arrowcsv.WithHeader(true), arrowcsv.WithNullWriter("")), buffer, builder.NewRecord()}
}

func (s *csvSink) write(rec arrow.Record) error { return s.writer.Write(rec) }

func (s *csvSink) finish() error {
	if err := s.writer.Write(s.empty); err != nil { // the header, where there was nothing else
		return err
	}
	if err := s.writer.Flush(); err != nil {
		return err
	}
	return s.buffer.Flush()
}

// plain reports whether a type has a text of its own in CSV. Lists and bytes have none.
func plain(kind arrow.DataType) bool {
	switch kind.ID() {
	case arrow.BOOL, arrow.INT8, arrow.INT16, arrow.INT32, arrow.INT64, arrow.UINT8, arrow.UINT16, arrow.UINT32, arrow.UINT64,
		arrow.FLOAT16, arrow.FLOAT32, arrow.FLOAT64, arrow.STRING, arrow.LARGE_STRING, arrow.TIMESTAMP, arrow.DATE32, arrow.DATE64,
		arrow.DECIMAL128, arrow.DECIMAL256, arrow.NULL:
		return true
	}
	return false
}

type arrowSink struct {
	writer interface {
		Write(arrow.Record) error
		Close() error
	}
	buffer *bufio.Writer // nil where the writer has none
}

func (s arrowSink) write(rec arrow.Record) error { return s.writer.Write(rec) }

func (s arrowSink) finish() error {
	if err := s.writer.Close(); err != nil {
		return err
	}
	if s.buffer == nil {
		return nil
	}
	return s.buffer.Flush()
}
