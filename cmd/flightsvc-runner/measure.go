// Measuring: the speed of a model on random rows, for tuning.

package main

import (
	"context"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"flightsvc/internal/batch"
	"flightsvc/internal/build"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
)

// answerRows is how many rows are run to compare their outputs between configurations.
const answerRows = 4

// measure runs the model on random rows as Setup.Measure asks and reports its speed.
func measure(setup control.Setup, engine engine, reports *reporter, log *zap.Logger) error {
	found, err := measured(setup, engine, log)
	if err != nil {
		kind, _ := fault.KindOf(err)
		reports.write(control.Report{Build: build.ID(), Error: err.Error(), Kind: kind})
		return nil // the report has the error
	}
	reports.write(control.Report{Build: build.ID(), TensorFlow: tensorflow.Version(), Measured: found})
	return nil
}

func measured(setup control.Setup, engine engine, log *zap.Logger) ([]control.Measured, error) {
	asked := setup.Measure
	signature, err := engine.Model().Signature(asked.Signature)
	if err != nil {
		return nil, err
	}
	if err := measurable(signature); err != nil {
		return nil, fault.New(fault.BadRequest, "model %s, signature %s: %w", setup.Model, asked.Signature, err)
	}
	rows := answerRows
	for _, size := range asked.BatchSizes {
		rows = max(rows, size)
	}
	var rowBytes int64
	for _, spec := range signature.Inputs {
		rowBytes += elementsOf(spec) * int64(spec.DType.Size())
	}
	rows = min(rows, max(int(maxBatchBytes/rowBytes), 1))
	memory := &offheap.Allocator{}
	feeds := makeFeeds(signature, rows, asked.Seed, memory)
	defer tensor.ReleaseFeeds(feeds)
	if err := writeAnswers(asked.Folder, signature, engine, first(feeds, min(answerRows, rows))); err != nil {
		return nil, err
	}
	sizes := slices.DeleteFunc(slices.Clone(asked.BatchSizes), func(size int) bool { return size > rows })
	var all []*loop
	defer func() {
		for _, one := range all {
			one.scheduler.Close()
		}
	}()
	for i, size := range sizes {
		one := newLoop(setup, engine, signature, size, memory, log)
		all = append(all, one)
		// in the first runs of a size TensorFlow optimises the graph and oneDNN builds primitives
		if _, err := one.window(feeds, 0); err != nil {
			return nil, err
		}
		run, err := one.window(feeds, asked.Window)
		if err != nil {
			return nil, err
		}
		if last := i == len(sizes)-1; !last && asked.LongestRun > 0 &&
			run*time.Duration(sizes[i+1])/time.Duration(size) > asked.LongestRun {
			break
		}
	}
	for range asked.Windows - 1 { // in turns, because other load may slow the machine down for a while
		for _, one := range all {
			if _, err := one.window(feeds, asked.Window); err != nil {
				return nil, err
			}
		}
	}
	found := make([]control.Measured, len(all))
	for i, one := range all {
		speeds := one.speeds[1:] // without the window of the first runs
		slices.Sort(speeds)
		found[i] = control.Measured{BatchSize: one.size, Best: speeds[len(speeds)-1], Median: speeds[len(speeds)/2]}
	}
	return found, nil
}

// measurable returns why a signature cannot be run on random rows, or nil.
func measurable(signature savedmodel.Signature) error {
	if len(signature.Inputs) == 0 {
		return fault.New(fault.BadRequest, "it has no inputs")
	}
	for _, spec := range signature.Inputs {
		switch {
		case spec.DType == savedmodel.String:
			return fault.New(fault.BadRequest,
				"input %q takes strings; only numbers and bools can be random, so this signature cannot be measured",
				spec.Name)
		case spec.DType.Size() == 0:
			return fault.New(fault.BadRequest, "input %q has the type %s; only numbers and bools can be random",
				spec.Name, spec.DType)
		case spec.UnknownRank || len(spec.Shape) == 0:
			return fault.New(fault.BadRequest,
				"input %q has an unknown rank, or no batch dimension; this signature cannot be measured", spec.Name)
		case slices.Contains(spec.Shape[1:], -1):
			return fault.New(fault.BadRequest, "input %q has the shape %v with an unknown dimension other than "+
				"the rows; this signature cannot be measured", spec.Name, spec.Shape)
		}
	}
	return nil
}

func elementsOf(spec savedmodel.Spec) int64 {
	n := int64(1)
	for _, d := range spec.Shape[1:] {
		n *= d
	}
	return max(n, 1)
}

// makeFeeds makes random rows for all inputs.
func makeFeeds(signature savedmodel.Signature, rows int, seed uint64, memory *offheap.Allocator) []tensor.Feed {
	random := random(seed)
	feeds := make([]tensor.Feed, len(signature.Inputs))
	for i, spec := range signature.Inputs {
		shape := append([]int64{int64(rows)}, spec.Shape[1:]...)
		value := tensor.Allocate(spec.DType, shape, memory)
		fill(value.Data, spec.DType, random)
		feeds[i] = tensor.Feed{Tensor: spec.Tensor, Value: value}
	}
	return feeds
}

func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) } //nolint:gosec // not for secrets

// fill writes random elements.
func fill(data []byte, dtype savedmodel.DType, random *rand.Rand) {
	size := dtype.Size()
	for at := 0; at < len(data); at += size {
		element := data[at : at+size]
		switch dtype {
		case savedmodel.Float32:
			binary.LittleEndian.PutUint32(element, math.Float32bits(random.Float32()))
		case savedmodel.Float64:
			binary.LittleEndian.PutUint64(element, math.Float64bits(random.Float64()))
		case savedmodel.Bfloat16: // the upper half of a float32
			binary.LittleEndian.PutUint16(element, uint16(math.Float32bits(random.Float32())>>16))
		case savedmodel.Float16: // 0, 0.25, 0.5 or 0.75
			binary.LittleEndian.PutUint16(element, [4]uint16{0, 0x3400, 0x3800, 0x3a00}[random.IntN(4)])
		default: // whole numbers and bools
			clear(element)
			element[0] = byte(random.IntN(2))
		}
	}
}

// first returns views of the first rows of feeds, with references of their own to the memory.
func first(feeds []tensor.Feed, rows int) []tensor.Feed {
	out := make([]tensor.Feed, len(feeds))
	for i := range feeds {
		out[i] = tensor.Feed{Tensor: feeds[i].Tensor, Value: feeds[i].Value.Slice(0, rows)}
	}
	return out
}

// writeAnswers runs the rows of feeds, which it takes over, and writes the outputs to folder.
func writeAnswers(folder string, signature savedmodel.Signature, engine engine, feeds []tensor.Feed) error {
	answers, err := engine.Run(feeds, outputTensors(signature), 0)
	if err != nil {
		return err
	}
	defer answers.Close()
	outputs := make([]control.Tensor, len(signature.Outputs))
	for i, value := range answers.Values() {
		outputs[i] = tensorOf(signature.Outputs[i].Name, value)
	}
	return control.WriteAnswers(folder, outputs)
}

func outputTensors(signature savedmodel.Signature) []string {
	names := make([]string, len(signature.Outputs))
	for i, spec := range signature.Outputs {
		names[i] = spec.Tensor
	}
	return names
}

// leastRuns is how many runs each caller makes in a window at least: one run of a large batch would be a poor sample.
const leastRuns = 2

// loop runs batches of one size, with as many callers as the Setup has threads.
type loop struct {
	model     string
	size      int
	callers   int
	scheduler *batch.Scheduler
	call      batch.Call
	speeds    []float64 // rows/s of each window so far
}

// newLoop makes a loop. The caller closes its scheduler.
func newLoop(setup control.Setup, engine engine, signature savedmodel.Signature, size int, memory *offheap.Allocator,
	log *zap.Logger) *loop {
	callers := max(setup.Batching.NumBatchThreads, 1)
	return &loop{
		model: setup.Model, size: size, callers: callers,
		scheduler: batch.New(batch.Options{
			MaxBatchSize: size, MaxBatchBytes: maxBatchBytes, MaxEnqueuedBatches: maxEnqueuedBatches,
			NumBatchThreads: callers,
			Run:             engine.Run, Stuck: func(time.Duration) {}, Memory: memory, Log: log,
		}),
		call: batch.Call{Fetches: outputTensors(signature), Check: func([]tensor.Value, int) error { return nil }},
	}
}

// window runs the first rows of feeds, which remain the caller's, for at least length, appends the rows/s to speeds,
// and returns the duration of a run.
func (l *loop) window(feeds []tensor.Feed, length time.Duration) (time.Duration, error) {
	rates, took := make([]float64, l.callers), make([]time.Duration, l.callers)
	var working errgroup.Group
	for i := range l.callers {
		working.Go(func() error {
			stream := l.scheduler.Stream(l.call)
			began := time.Now()
			for runs := 1; ; runs++ {
				answer, err := stream.Run(context.Background(), first(feeds, l.size), l.size, true)
				if err != nil {
					return err
				}
				refused := len(answer.Refused) > 0
				answer.Close()
				if refused {
					return fault.New(fault.BadRequest, "model %s refuses random rows; it cannot be measured", l.model)
				}
				if passed := time.Since(began); passed >= length && runs >= leastRuns {
					// The rates of the callers are added, so that no rate includes the wait for another's last run.
					rates[i], took[i] = float64(runs*l.size)/passed.Seconds(), passed/time.Duration(runs)
					return nil
				}
			}
		})
	}
	if err := working.Wait(); err != nil {
		return 0, err
	}
	sum := 0.0
	for _, rate := range rates {
		sum += rate
	}
	l.speeds = append(l.speeds, sum)
	return slices.Max(took), nil
}
