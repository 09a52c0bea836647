package tablefile

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/apache/arrow/go/v15/arrow"
	arrowcsv "github.com/apache/arrow/go/v15/arrow/csv"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"github.com/apache/arrow/go/v15/parquet"
	"github.com/apache/arrow/go/v15/parquet/file"
	"github.com/apache/arrow/go/v15/parquet/pqarrow"
)

// parquetTable reads one row group after the other, column by column through buffers, as many rows at a time as
// asked. Row groups are apart since each may have dictionaries of its own.
type parquetTable struct {
	schema *arrow.Schema
	file   *pqarrow.FileReader
	groups int
	group  int                  // that is read next
	reader pqarrow.RecordReader // of the one before; nil before the first
	rows   int64
}

func openParquet(f *os.File, rows int64) (source, error) {
	properties := parquet.NewReaderProperties(memory.DefaultAllocator)
	properties.BufferedStreamEnabled = true // pages, not whole columns of a row group
	opened, err := file.NewParquetReader(f, file.WithReadProps(properties))
	if err != nil {
		return nil, fmt.Errorf("it is no Parquet file, or a broken one: %w", err)
	}
	about := opened.MetaData()
	var bytes int64
	for i := range opened.NumRowGroups() {
		bytes += about.RowGroup(i).TotalByteSize()
	}
	if n := opened.NumRows(); n > 0 && bytes > 0 { // large rows make small record batches
		rows = min(rows, max(1, pieceBytes*n/bytes))
	}
	t := &parquetTable{groups: opened.NumRowGroups(), rows: opened.NumRows()}
	if t.file, err = pqarrow.NewFileReader(opened, pqarrow.ArrowReadProperties{BatchSize: rows}, memory.DefaultAllocator); err != nil {
		return nil, err
	}
	t.schema, err = t.file.Schema()
	return t, err
}

func (t *parquetTable) Schema() *arrow.Schema { return t.schema }

func (t *parquetTable) next() (arrow.Record, error) {
	for {
		if t.reader != nil {
			rec, err := t.reader.Read()
			if rec != nil {
				rec.Retain()
				return rec, nil
			}
			if errors.Is(err, arrow.ErrNotImplemented) {
				return nil, errors.New("a column has several dictionaries in a row group, which cannot be read; write the file again without dictionary types, or as Arrow")
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
			t.reader.Release()
			t.reader = nil
		}
		if t.group == t.groups {
			return nil, io.EOF
		}
		t.group++
		if t.file.ParquetReader().MetaData().RowGroup(t.group-1).NumRows() == 0 {
			continue
		}
		var err error
		if t.reader, err = t.file.GetRecordReader(context.Background(), nil, []int{t.group - 1}); err != nil {
			return nil, err
		}
	}
}

func (t *parquetTable) done() float64 { return 0 }
func (t *parquetTable) total() int64  { return t.rows }

// csvTable reads texts.
type csvTable struct {
	reader *arrowcsv.Reader
	schema *arrow.Schema
	file   *os.File
	size   int64
}

const byteOrderMark = "\ufeff"

func openCSV(f *os.File, rows int64) (source, error) {
	header, err := csv.NewReader(f).Read()
	if errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("it is empty; a CSV file begins with the names of its columns")
	}
	if err != nil {
		return nil, err
	}
	start := int64(0)
	if strings.HasPrefix(header[0], byteOrderMark) {
		start = int64(len(byteOrderMark))
		header[0] = header[0][start:]
	}
	if _, err := f.Seek(start, io.SeekStart); err != nil {
		return nil, fmt.Errorf("CSV is read from files alone: %w", err)
	}
	fields := make([]arrow.Field, len(header))
	for i, name := range header {
		fields[i] = arrow.Field{Name: name, Type: arrow.BinaryTypes.String, Nullable: true}
	}
	schema := arrow.NewSchema(fields, nil)
	reader := arrowcsv.NewReader(f, schema, arrowcsv.WithHeader(true), arrowcsv.WithChunk(max(2, int(rows))))
	return &csvTable{reader: reader, schema: schema, file: f, size: sizeOf(f)}, nil
}

func (t *csvTable) Schema() *arrow.Schema { return t.schema }

func (t *csvTable) next() (arrow.Record, error) {
	more := t.reader.Next()
	if err := t.reader.Err(); err != nil {
		return nil, err
	}
	if !more {
		return nil, io.EOF
	}
	rec := t.reader.Record()
	rec.Retain()
	return rec, nil
}

func (t *csvTable) done() float64 { return share(t.file, t.size) }
func (t *csvTable) total() int64  { return -1 }

// arrowMagic begins an Arrow file; a stream begins otherwise.
const arrowMagic = "ARROW1"

// openArrow looks which of Arrow's two formats it is: names are mixed up often.
func openArrow(f *os.File) (source, error) {
	if size := sizeOf(f); size > 0 {
		magic := make([]byte, len(arrowMagic))
		if _, err := f.ReadAt(magic, 0); err == nil {
			switch {
			case string(magic) == arrowMagic:
				reader, err := ipc.NewFileReader(f)
				if err != nil {
					return nil, fmt.Errorf("it is a broken Arrow file: %w", err)
				}
				return &arrowFile{reader: reader}, nil
			case strings.HasPrefix(string(magic), "FEA1"):
				return nil, fmt.Errorf("it is a Feather file of version 1, which nothing writes any more; write it again as version 2 or as Parquet")
			}
		}
	}
	reader, err := ipc.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("it is neither an Arrow file nor an Arrow stream, or a broken one: %w", err)
	}
	return &arrowStream{reader: reader, file: f, size: sizeOf(f)}, nil
}

type arrowFile struct {
	reader *ipc.FileReader
	at     int
}

func (t *arrowFile) Schema() *arrow.Schema { return t.reader.Schema() }

func (t *arrowFile) next() (arrow.Record, error) {
	if t.at == t.reader.NumRecords() {
		return nil, io.EOF
	}
	t.at++
	return t.reader.RecordAt(t.at - 1)
}

func (t *arrowFile) done() float64 { return float64(t.at) / float64(max(1, t.reader.NumRecords())) }
func (t *arrowFile) total() int64  { return -1 }

type arrowStream struct {
	reader *ipc.Reader
	file   *os.File
	size   int64
}

func (t *arrowStream) Schema() *arrow.Schema { return t.reader.Schema() }

func (t *arrowStream) next() (arrow.Record, error) {
	rec, err := t.reader.Read()
	if err != nil {
		return nil, err
	}
	rec.Retain()
	return rec, nil
}

func (t *arrowStream) done() float64 { return share(t.file, t.size) }
func (t *arrowStream) total() int64  { return -1 }
