package control

import (
	"encoding/gob"
	"os"
	"path/filepath"

	"flightsvc/internal/savedmodel"
)

// Tensor is an input or output of a run, by its name in the signature.
type Tensor struct {
	Name    string
	DType   savedmodel.DType
	Shape   []int64
	Data    []byte // little endian
	Strings [][]byte
}

// Sample is a run of a signature: what it was fed and what it answered. A runner keeps its first one of real rows, so
// that another form of the model can run it, too, and the answers be compared.
type Sample struct {
	Signature string
	Inputs    []Tensor
	Outputs   []Tensor
}

// Replayed returns the file for the outputs of a sample that another form of the model has run.
func Replayed(path string) string { return path + ".replayed" }

// Write writes the sample to a file that appears when it is complete.
func (s Sample) Write(path string) error {
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-") // 0600
	if err != nil {
		return err
	}
	err = gob.NewEncoder(file).Encode(s)
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		_ = os.Remove(file.Name()) // the first error counts
	}
	return err
}

// ReadSample reads what Write has written.
func ReadSample(path string) (s Sample, err error) {
	file, err := os.Open(path) //nolint:gosec // a file of the front's
	if err != nil {
		return s, err
	}
	defer func() { _ = file.Close() }()
	return s, gob.NewDecoder(file).Decode(&s)
}
