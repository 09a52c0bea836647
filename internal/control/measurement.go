package control

import (
	"path/filepath"
	"time"
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

const answersFile = "answers"

// WriteAnswers writes the outputs of a measurement into its folder, for ReadAnswers.
func WriteAnswers(folder string, outputs []Tensor) error {
	return Sample{Outputs: outputs}.Write(filepath.Join(folder, answersFile))
}

// ReadAnswers reads what a runner wrote into the folder of its Measurement.
func ReadAnswers(folder string) ([]Tensor, error) {
	answers, err := ReadSample(filepath.Join(folder, answersFile))
	return answers.Outputs, err
}
