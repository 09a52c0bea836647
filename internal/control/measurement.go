package control

import (
	"encoding/gob"
	"os"
	"path/filepath"
	"time"

	"flightsvc/internal/savedmodel"
)

// Measurement makes a runner measure its speed: it loads the model as its Setup says, runs one signature on random rows
// through its own scheduler, reports, and ends. It serves no stream.
//
// Rows are made from a seed: floats are uniform in [0, 1), whole numbers and bools 0 or 1. A signature with a string
// input, or with an unknown dimension besides that of the rows, cannot be measured.
type Measurement struct {
	Signature string `json:"signature"`
	// rows of one run, ascending; sizes that do not fit into one run are left out
	BatchSizes []int         `json:"batch_sizes"`
	Window     time.Duration `json:"window"`  // of one measurement at least; each caller runs twice at least
	Windows    int           `json:"windows"` // measurements of each batch size, the sizes taking turns
	// larger sizes are left out once a run would take longer, as extrapolated from the size before; 0 is no bound
	LongestRun time.Duration `json:"longest_run"`
	Seed       uint64        `json:"seed"`
	Folder     string        `json:"folder"` // gets the outputs of one batch; see ReadAnswers
}

// Measured is the speed of one batch size.
type Measured struct {
	BatchSize int     `json:"max_batch_size"`
	Best      float64 `json:"best"`   // rows/s of the fastest window
	Median    float64 `json:"median"` // rows/s of the median window
}

// MeasuredOutput is an output tensor of the batch that all candidates run, so that their answers can be compared.
type MeasuredOutput struct {
	Name    string
	DType   savedmodel.DType
	Shape   []int64
	Data    []byte // little endian
	Strings [][]byte
}

const answersFile = "answers.gob"

// WriteAnswers writes outputs into a folder, for ReadAnswers.
func WriteAnswers(folder string, outputs []MeasuredOutput) error {
	file, err := os.Create(filepath.Join(folder, answersFile)) //nolint:gosec // a folder of the front's
	if err != nil {
		return err
	}
	err = gob.NewEncoder(file).Encode(outputs)
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	return err
}

// ReadAnswers reads what a runner wrote into the folder of its Measurement.
func ReadAnswers(folder string) (outputs []MeasuredOutput, err error) {
	file, err := os.Open(filepath.Join(folder, answersFile)) //nolint:gosec // a folder of the front's
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return outputs, gob.NewDecoder(file).Decode(&outputs)
}
