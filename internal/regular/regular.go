// Package regular reads files at paths that a caller or a model names. It reads only regular files, no more bytes than
// a bound, and only until a context ends: reading a named pipe could wait for ever, a device may never end.
package regular

import (
	"context"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Open opens the regular file at path for reading, through links. Anything else is an error that names the path.
func Open(path string) (*os.File, error) {
	info, err := os.Stat(path) // checked before opening, which may have effects on a device
	if err == nil {
		err = check(path, info)
	}
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // does not wait if a pipe has replaced the file
	if err != nil {
		return nil, err
	}
	if info, err = file.Stat(); err == nil {
		err = check(path, info)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

func check(path string, info os.FileInfo) error {
	if info.Mode().IsRegular() {
		return nil
	}
	return fmt.Errorf("%q is not a regular file (%v)", path, info.Mode())
}

// Read returns the content of the regular file at path. It is an error that names the path if there are more bytes than
// most.
func Read(ctx context.Context, path string, most int64) ([]byte, error) {
	file, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(Until(ctx, file), most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%q has more than %d bytes", path, most)
	}
	if err != nil {
		return nil, err
	}
	return data, nil
}

// Until returns a reader of in that fails with ctx's error once ctx has ended.
func Until(ctx context.Context, in io.Reader) io.Reader { return until{ctx, in} }

type until struct {
	ctx context.Context
	in  io.Reader
}

// Read is part of io.Reader.
func (u until) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.in.Read(p)
}

// Interface guards.
var _ io.Reader = until{}
