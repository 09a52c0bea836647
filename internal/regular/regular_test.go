package regular

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadTakesRegularFilesAlone(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(at("file"), []byte("content"), 0o600),
		unix.Mkfifo(at("pipe"), 0o600),
		os.Symlink("/dev/zero", at("zeros")),
		os.Symlink(at("pipe"), at("link to a pipe")),
		os.Symlink(at("file"), at("link")),
	); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pipe", "zeros", "link to a pipe", "."} {
		_, err := Read(t.Context(), at(name), 100)
		if err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"file", "link"} {
		if data, err := Read(t.Context(), at(name), 7); err != nil || string(data) != "content" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if _, err := Read(t.Context(), at("file"), 6); err == nil || !strings.Contains(err.Error(), "more than 6 bytes") {
		t.Errorf("a file above the bound: %v", err)
	}
	if _, err := Read(t.Context(), at("none"), 6); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestUntilEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	in := Until(ctx, strings.NewReader("12"))
	if _, err := io.ReadFull(in, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(in); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}
