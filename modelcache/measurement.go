package modelcache

import (
	"bytes"
	"encoding/binary"
	"encoding/gob"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// Measurement asks a runner to measure itself: it loads the model as its Setup says, runs one signature on
// made-up rows through its own scheduler, reports, and ends. It serves no stream.
//
// Rows are made from a seed: floats are uniform in [0, 1), whole numbers and bools 0 or 1. A signature with a
// string input, or with an unknown dimension besides that of the rows, cannot be measured so.
type Measurement struct {
	Signature  string        `json:"signature"`
	BatchSizes []int         `json:"batch_sizes"` // rows of one run, ascending; what does not fit into one run is left out
	Window     time.Duration `json:"window"`      // of one measurement, and two runs of each caller at least
	Windows    int           `json:"windows"`     // for each batch size, the sizes in turns
	LongestRun time.Duration `json:"longest_run"` // batches whose run would take longer, by the one before, are left out; 0 is no bound
	Seed       uint64        `json:"seed"`
	Folder     string        `json:"folder"` // gets the outputs of one batch; see ReadAnswers
}

// Measured is what came of one batch size.
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

// Tolerances of answers between configurations: |ours - theirs| <= relative |theirs| + absolute max|theirs|, over an output. They are
// ten times what docs/numerics.md demands of one configuration with varying batch sizes, or measured of oneDNN
// (5.9e-6 of the greatest value); half precision has 11 and 8 bits. All else must be equal.
const (
	toleranceRelative = 1e-3
	toleranceAbsolute = 1e-4
	toleranceHalf     = 2e-2
)

// differenceOf returns the largest difference between two sets of answers as a share of the tolerance; above 1 they do not
// agree, +Inf where they cannot be compared or must be equal and are not.
func differenceOf(ours, theirs []MeasuredOutput) float64 {
	if len(ours) != len(theirs) {
		return math.MaxFloat64
	}
	worst := 0.0
	for i := range ours {
		a, b := ours[i], theirs[i]
		if a.Name != b.Name || a.DType != b.DType || !slices.Equal(a.Shape, b.Shape) || len(a.Data) != len(b.Data) {
			return math.MaxFloat64
		}
		x, floats := numbersOf(a)
		y, _ := numbersOf(b)
		if !floats {
			if !bytes.Equal(a.Data, b.Data) || !slices.EqualFunc(a.Strings, b.Strings, bytes.Equal) {
				return math.MaxFloat64
			}
			continue
		}
		relative, absolute := toleranceRelative, toleranceAbsolute
		if a.DType == savedmodel.Float16 || a.DType == savedmodel.Bfloat16 {
			relative, absolute = toleranceHalf, toleranceHalf
		}
		greatest := 0.0
		for _, v := range y {
			if !math.IsNaN(v) && !math.IsInf(v, 0) {
				greatest = max(greatest, math.Abs(v))
			}
		}
		for j := range y {
			if x[j] == y[j] || math.IsNaN(x[j]) && math.IsNaN(y[j]) {
				continue
			}
			share := math.Abs(x[j]-y[j]) / (relative*math.Abs(y[j]) + absolute*greatest)
			if math.IsNaN(share) || math.IsInf(share, 0) {
				return math.MaxFloat64
			}
			worst = max(worst, share)
		}
	}
	return worst
}

// numbersOf returns the elements of a floating-point output; false for any other.
func numbersOf(o MeasuredOutput) ([]float64, bool) {
	size := o.DType.Size()
	var at func([]byte) float64
	switch o.DType {
	case savedmodel.Float32:
		at = func(b []byte) float64 { return float64(math.Float32frombits(binary.LittleEndian.Uint32(b))) }
	case savedmodel.Float64:
		at = func(b []byte) float64 { return math.Float64frombits(binary.LittleEndian.Uint64(b)) }
	case savedmodel.Bfloat16:
		at = func(b []byte) float64 { return float64(tensor.FromBfloat(binary.LittleEndian.Uint16(b))) }
	case savedmodel.Float16:
		at = func(b []byte) float64 { return float64(tensor.FromHalf(binary.LittleEndian.Uint16(b))) }
	default:
		return nil, false
	}
	list := make([]float64, len(o.Data)/size)
	for i := range list {
		list[i] = at(o.Data[i*size:])
	}
	return list, true
}
