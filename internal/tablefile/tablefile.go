// Package tablefile reads and writes tables in files, a record batch at a time: Parquet, CSV, and Arrow's two
// formats. Memory holds a record batch, and of Parquet the pages of a row group, never the file.
//
// What may enter: file formats. What is done with the rows lives elsewhere.
package tablefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/util"
)

// Standard is the path that means standard input or output; what comes or goes there is an Arrow stream.
const Standard = "-"

// The formats, by how a file's name ends.
const (
	Parquet     = ".parquet"
	CSV         = ".csv"
	ArrowFile   = ".arrow"
	Feather     = ".feather" // version 2, which is an Arrow file
	ArrowStream = ".arrows"
)

// pieceBytes is about how large a record batch is made that a reader may choose.
const pieceBytes = 16 << 20

// Format returns the format of the file at path. Its error lists those there are.
func Format(path string) (string, error) {
	if path == Standard {
		return ArrowStream, nil
	}
	switch ext := strings.ToLower(filepath.Ext(path)); ext {
	case Parquet, CSV, ArrowFile, ArrowStream:
		return ext, nil
	case Feather:
		return ArrowFile, nil
	}
	return "", fmt.Errorf("%s: the format of a file is told by the end of its name: %s, %s, %s (or %s), %s, or - for an Arrow stream on standard input or output",
		path, Parquet, CSV, ArrowFile, Feather, ArrowStream)
}

// Reader reads a table.
type Reader struct {
	source
	path  string
	rows  int64 // of each record batch, at most
	rest  arrow.Record
	from  int64        // rows of rest that were handed out
	read  int64        // rows
	about atomic.Int64 // what Rows returns
	files []io.Closer
}

// source is one format.
type source interface {
	Schema() *arrow.Schema
	// next returns a record batch that the caller releases, or io.EOF.
	next() (arrow.Record, error)
	// done returns how much of the source has been read, from 0 to 1; 0 if that cannot be known.
	done() float64
	// total returns how many rows there are, -1 if only reading tells.
	total() int64
}

// Open opens the table at path, or on standard input for Standard, to be read in record batches of at most so many rows, and of
// about pieceBytes at most unless rows are larger.
// CSV has no types: its columns are texts. Errors are sentences that name the file.
// The end of ctx ends reads that wait for a pipe.
func Open(ctx context.Context, path string, rows int64) (reader *Reader, err error) {
	format, err := Format(path)
	if err != nil {
		return nil, err
	}
	r := &Reader{path: path, rows: rows}
	file, err := open(path)
	if err != nil {
		return nil, err
	}
	r.files = append(r.files, file)
	context.AfterFunc(ctx, func() { _ = file.SetReadDeadline(time.Unix(1, 0)) }) // files of other kinds do not wait, and have none
	defer func() {
		if err != nil {
			_ = r.Close()
			err = r.say(err)
		}
	}()
	defer recovered(&err)
	switch format {
	case Parquet:
		r.source, err = openParquet(file, rows)
	case CSV:
		r.source, err = openCSV(file, rows)
	default:
		r.source, err = openArrow(file)
	}
	return r, err
}

// open opens a file. Standard input, where it is a pipe, is opened again: as it was given to us no read of it could be ended.
func open(path string) (*os.File, error) {
	if path != Standard {
		return os.Open(path) //nolint:gosec // the user's own file
	}
	if info, err := os.Stdin.Stat(); err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		if file, err := os.OpenFile("/dev/stdin", os.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil {
			return file, nil
		}
	}
	return os.Stdin, nil
}

// recovered turns a panic into an error: Arrow's readers throw them at files that are not what they seem.
func recovered(err *error) {
	if thrown := recover(); thrown != nil {
		*err = fmt.Errorf("it cannot be read: %v", thrown)
	}
}

func (r *Reader) say(err error) error {
	if r.path == Standard {
		return fmt.Errorf("standard input: %w", err)
	}
	return fmt.Errorf("%s: %w", r.path, err)
}

// Read returns the next record batch, which the caller releases, or io.EOF.
func (r *Reader) Read() (rec arrow.Record, err error) {
	for r.rest == nil {
		if err := r.fill(); errors.Is(err, io.EOF) {
			return nil, io.EOF
		} else if err != nil {
			return nil, r.say(err)
		}
	}
	all := r.rest.NumRows()
	n := min(r.rows, all-r.from)
	if size := util.TotalRecordSize(r.rest); size > pieceBytes {
		n = min(n, max(1, all*pieceBytes/size))
	}
	rec = r.rest.NewSlice(r.from, r.from+n)
	r.read += n
	if r.from += n; r.from == all {
		r.rest.Release()
		r.rest = nil
	}
	r.about.Store(r.estimate())
	return rec, nil
}

// fill reads the next record batch that has rows.
func (r *Reader) fill() (err error) {
	defer recovered(&err)
	rec, err := r.next()
	if err != nil {
		return err
	}
	if rec.NumRows() == 0 {
		rec.Release()
		return nil
	}
	r.rest, r.from = rec, 0
	return nil
}

// Rows returns how many rows the table has, as far as is known since the last Read; 0 is unknown. It may be called
// while Read runs.
func (r *Reader) Rows() int64 { return r.about.Load() }

func (r *Reader) estimate() int64 {
	if n := r.total(); n >= 0 {
		return n
	}
	if done := r.done(); done > 0 {
		return max(r.read, int64(float64(r.read)/done))
	}
	return 0
}

// Close closes the file.
func (r *Reader) Close() error {
	if r.rest != nil {
		r.rest.Release()
		r.rest = nil
	}
	var faults []error
	for _, file := range r.files {
		faults = append(faults, file.Close())
	}
	return errors.Join(faults...)
}

// share is how much of a file has been read, by its position in it.
func share(file *os.File, size int64) float64 {
	if size <= 0 {
		return 0
	}
	at, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0
	}
	return float64(at) / float64(size)
}

// sizeOf returns the size of a regular file, else 0.
func sizeOf(file *os.File) int64 {
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return 0
	}
	return info.Size()
}
