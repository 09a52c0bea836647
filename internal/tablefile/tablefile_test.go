package tablefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
)

// TestRowsWhileReading needs the race detector.
func TestRowsWhileReading(t *testing.T) {
	path := filepath.Join(t.TempDir(), "in.csv")
	if err := os.WriteFile(path, []byte("n\n"+strings.Repeat("1\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	in, err := Open(context.Background(), path, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	looked := make(chan int64)
	done := make(chan struct{})
	go func() {
		for most := int64(0); ; most = max(most, in.Rows()) {
			select {
			case <-done:
				looked <- max(most, in.Rows())
				return
			default:
			}
		}
	}()
	read := int64(0)
	for {
		rec, err := in.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		read += rec.NumRows()
		rec.Release()
	}
	close(done)
	if most := <-looked; read != 1000 || in.Rows() != 1000 || most < 1000 {
		t.Errorf("%d rows were read; Rows is %d, and was %d", read, in.Rows(), most)
	}
}

func TestAFolderIsNotWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out.parquet")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Create(dir, arrow.NewSchema(nil, nil))
	if want := fmt.Sprintf("%s is a folder; name a file", dir); err == nil || err.Error() != want {
		t.Errorf("Create returned %v, want %s", err, want)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*.part")); len(left) > 0 {
		t.Errorf("it left %q", left)
	}
}
