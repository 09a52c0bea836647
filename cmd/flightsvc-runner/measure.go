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
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/internal/tensorflow"
	"flightsvc/modelcache"
)

// answerRows is how many rows the batch has whose outputs are compared.
const answerRows = 4

// measure runs the model on made-up rows as its Setup's Measure asks, and reports how fast that was.
func measure(setup modelcache.Setup, engine engine, reports *reporter, log *zap.Logger) error {
	found, err := measured(setup, engine, log)
	if err != nil {
		kind, _ := fault.KindOf(err)
		reports.write(modelcache.Report{Build: build.ID(), Error: err.Error(), Kind: kind})
		return nil // it has been told
	}
	reports.write(modelcache.Report{Build: build.ID(), TensorFlow: tensorflow.Version(), Measured: found})
	return nil
}

func measured(setup modelcache.Setup, engine engine, log *zap.Logger) ([]modelcache.Measured, error) {
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
	var found []modelcache.Measured
	for i, size := range asked.BatchSizes {
		if size > rows {
			break
		}
		speeds, longest, err := measureSize(setup, engine, signature, first(feeds, size), size, memory, log)
		if err != nil {
			return nil, err
		}
		slices.Sort(speeds)
		found = append(found, modelcache.Measured{BatchSize: size, Best: speeds[len(speeds)-1], Median: speeds[len(speeds)/2]})
		if last := i == len(asked.BatchSizes)-1; !last && asked.LongestRun > 0 &&
			longest*time.Duration(asked.BatchSizes[i+1])/time.Duration(size) > asked.LongestRun {
			break
		}
	}
	return found, nil
}

// measurable says why rows cannot be made up for a signature.
func measurable(signature savedmodel.Signature) error {
	if len(signature.Inputs) == 0 {
		return fault.New(fault.BadRequest, "it has no inputs to make up")
	}
	for _, spec := range signature.Inputs {
		switch {
		case spec.DType == savedmodel.String:
			return fault.New(fault.BadRequest, "input %q takes strings, which cannot be made up; this signature cannot be measured", spec.Name)
		case spec.DType.Size() == 0:
			return fault.New(fault.BadRequest, "input %q has the type %s, which cannot be made up", spec.Name, spec.DType)
		case spec.UnknownRank || len(spec.Shape) == 0:
			return fault.New(fault.BadRequest, "input %q has no known number of dimensions, or no rows; this signature cannot be measured", spec.Name)
		case slices.Contains(spec.Shape[1:], -1):
			return fault.New(fault.BadRequest, "input %q has the shape %v with an unknown dimension besides that of the rows; this signature cannot be measured", spec.Name, spec.Shape)
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

// makeFeeds makes up rows for all inputs.
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

// fill makes up elements.
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
		case savedmodel.Float16: // quarters
			binary.LittleEndian.PutUint16(element, [4]uint16{0, 0x3400, 0x3800, 0x3a00}[random.IntN(4)])
		default: // whole numbers and bools
			clear(element)
			element[0] = byte(random.IntN(2))
		}
	}
}

// first views the first rows of feeds, with references of its own.
func first(feeds []tensor.Feed, rows int) []tensor.Feed {
	out := make([]tensor.Feed, len(feeds))
	for i := range feeds {
		out[i] = tensor.Feed{Tensor: feeds[i].Tensor, Value: feeds[i].Value.Slice(0, rows)}
	}
	return out
}

// writeAnswers runs the rows of feeds, which it takes over, and keeps the outputs.
func writeAnswers(folder string, signature savedmodel.Signature, engine engine, feeds []tensor.Feed) error {
	answers, err := engine.Run(feeds, outputTensors(signature), 0)
	if err != nil {
		return err
	}
	defer answers.Close()
	outputs := make([]modelcache.MeasuredOutput, len(signature.Outputs))
	for i, value := range answers.Values() {
		outputs[i] = modelcache.MeasuredOutput{Name: signature.Outputs[i].Name, DType: value.DType, Shape: value.Shape, Data: value.Data, Strings: value.Strings}
	}
	return modelcache.WriteAnswers(folder, outputs)
}

func outputTensors(signature savedmodel.Signature) []string {
	names := make([]string, len(signature.Outputs))
	for i, spec := range signature.Outputs {
		names[i] = spec.Tensor
	}
	return names
}

// measureSize runs batches of one size, as many at once as the Setup says, and returns the rows/s of each window and how
// long a run took. It takes over the feeds.
func measureSize(setup modelcache.Setup, engine engine, signature savedmodel.Signature, feeds []tensor.Feed, size int, memory *offheap.Allocator, log *zap.Logger) (speeds []float64, longest time.Duration, err error) {
	defer tensor.ReleaseFeeds(feeds)
	callers := max(setup.Batching.NumBatchThreads, 1)
	scheduler := batch.New(batch.Options{
		MaxBatchSize: size, MaxBatchBytes: maxBatchBytes, MaxEnqueuedBatches: maxEnqueuedBatches, NumBatchThreads: callers,
		Run: engine.Run, Stuck: func(time.Duration) {}, Memory: memory, Log: log,
	})
	defer scheduler.Close()
	call := batch.Call{Fetches: outputTensors(signature), Check: func([]tensor.Value, int) error { return nil }}
	window := func(length time.Duration) (float64, time.Duration, error) {
		rates, took := make([]float64, callers), make([]time.Duration, callers)
		var working errgroup.Group
		for i := range callers {
			working.Go(func() error {
				stream := scheduler.Stream(call)
				began := time.Now()
				for runs := 1; ; runs++ {
					answer, err := stream.Run(context.Background(), first(feeds, size), size, true)
					if err != nil {
						return err
					}
					refused := len(answer.Refused) > 0
					answer.Close()
					if refused {
						return fault.New(fault.BadRequest, "model %s refuses made-up rows; it cannot be measured", setup.Model)
					}
					if passed := time.Since(began); passed >= length {
						// Each caller has a rate of its own: the last run of one does not count as waiting of another.
						rates[i], took[i] = float64(runs*size)/passed.Seconds(), passed/time.Duration(runs)
						return nil
					}
				}
			})
		}
		if err := working.Wait(); err != nil {
			return 0, 0, err
		}
		sum := 0.0
		for _, rate := range rates {
			sum += rate
		}
		return sum, slices.Max(took), nil
	}
	for range 2 { // the first runs of a size optimise the graph and build primitives
		if _, _, err := window(0); err != nil {
			return nil, 0, err
		}
	}
	for range max(setup.Measure.Windows, 1) {
		speed, took, err := window(setup.Measure.Window)
		if err != nil {
			return nil, 0, err
		}
		speeds, longest = append(speeds, speed), max(longest, took)
	}
	return speeds, longest, nil
}
