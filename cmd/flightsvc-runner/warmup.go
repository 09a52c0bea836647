// Warming up: the first runs of a model, before it counts as ready.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// zerosTime bounds all runs with zeros together: a loop in a model may never end on zeros.
const zerosTime = 10 * time.Second

// warmUp runs the model, so that no stream waits for what TensorFlow does in its first runs. It replays the Predict
// requests of TF Serving's warm-up file; a failure is a fault that names the record. Without the file it runs the model
// on zeros; a failure of that is only logged.
func (e *loaded) warmUp(setup control.Setup, mem memory.Allocator, log *zap.Logger) error {
	started := time.Now()
	path := filepath.Join(setup.Dir, savedmodel.WarmupFile)
	file, err := regular.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		// Logged before the runs, because zeros may make TensorFlow end the process.
		log.Info("warming up with zeros",
			zap.String("instead", `requests in the model, or warm_up "off" in its settings`))
		runs := e.warmUpWithZeros(setup, mem, log)
		log.Info("warmed up with zeros", zap.Int("runs", runs), zap.Duration("took", time.Since(started)))
		return nil
	}
	if err != nil {
		return fault.New(fault.Precondition, "model %s: its warm-up requests: %w", setup.Model, err)
	}
	defer func() { _ = file.Close() }()
	ran := 0
	for w, err := range savedmodel.ReadWarmups(bufio.NewReader(file)) {
		switch {
		case err != nil:
			err = fault.New(fault.BadRequest, "%w", err)
		case w.Skipped != "":
			log.Info("a warm-up record is no Predict request and was skipped", zap.Int("record", w.Number),
				zap.String("kind", w.Skipped))
			continue
		default:
			err = e.request(w, mem)
		}
		if err != nil {
			return fault.New(kindOf(err),
				"model %s: record %d of its warm-up requests, %s: %w; write the file again, or leave it out",
				setup.Model, w.Number, path, err)
		}
		ran++
	}
	log.Info("warmed up with the model's requests", zap.Int("runs", ran), zap.Duration("took", time.Since(started)))
	return nil
}

// request runs one warm-up request.
func (e *loaded) request(w savedmodel.Warmup, mem memory.Allocator) error {
	signature, err := e.saved.Signature(w.Signature)
	if err != nil {
		return err
	}
	var feeds []tensor.Feed
	for _, spec := range signature.Inputs {
		constant, ok := w.Inputs[spec.Name]
		if !ok {
			tensor.ReleaseFeeds(feeds)
			return fault.New(fault.BadRequest, "it has no input %q of the signature %s", spec.Name, w.Signature)
		}
		feeds = append(feeds, tensor.Feed{Tensor: spec.Tensor, Value: newValue(constant, mem)})
		delete(w.Inputs, spec.Name)
	}
	for name := range w.Inputs {
		tensor.ReleaseFeeds(feeds)
		return fault.New(fault.BadRequest, "the signature %s has no input %q", w.Signature, name)
	}
	var fetches []string
	for _, spec := range signature.Outputs {
		if len(w.Outputs) == 0 || slices.Contains(w.Outputs, spec.Name) {
			fetches = append(fetches, spec.Tensor)
		}
	}
	if len(fetches) < len(w.Outputs) {
		tensor.ReleaseFeeds(feeds)
		return fault.New(fault.BadRequest, "its output_filter is %q, and the signature %s does not have all of these",
			w.Outputs, w.Signature)
	}
	outputs, err := e.Run(feeds, fetches, 0)
	if err != nil {
		return err
	}
	outputs.Close()
	return nil
}

// newValue makes a value of a tensor in a warm-up request.
func newValue(c savedmodel.Constant, mem memory.Allocator) tensor.Value {
	if c.DType == savedmodel.String {
		return tensor.Value{DType: c.DType, Shape: c.Shape, Strings: c.Strings}
	}
	value := tensor.Allocate(c.DType, c.Shape, mem)
	copy(value.Data, c.Data)
	return value
}

// warmUpWithZeros runs each signature with each of the allowed batch sizes, where it can, and returns the number of
// runs.
func (e *loaded) warmUpWithZeros(setup control.Setup, mem memory.Allocator, log *zap.Logger) (runs int) {
	until := time.Now().Add(zerosTime)
	sizes := []int{1}
	if allowed := setup.Batching.AllowedBatchSizes; len(allowed) > 0 {
		sizes = allowed
	}
	for _, name := range e.saved.Names() {
		signature := e.saved.Signatures[name]
		for _, rows := range sizes {
			feeds, err := zeros(signature, int64(rows), mem)
			if err == nil {
				err = e.runUntil(until, feeds, signature)
			}
			if err != nil {
				log.Info("not warmed up with zeros", zap.String("signature", name), zap.Int("rows", rows),
					zap.Error(err))
				break
			}
			runs++
		}
	}
	return runs
}

// zeros returns a feed of zeros for each input of a signature; its error says which input cannot have one. An unknown
// first dimension has size rows, other unknown dimensions 1. Together the feeds have at most maxBatchBytes.
func zeros(signature savedmodel.Signature, rows int64, mem memory.Allocator) ([]tensor.Feed, error) {
	if signature.Assigns != "" {
		return nil, fmt.Errorf("it assigns variables (%s)", signature.Assigns)
	}
	feeds := make([]tensor.Feed, 0, len(signature.Inputs))
	room := int64(maxBatchBytes)
	for _, spec := range signature.Inputs {
		size := int64(spec.DType.Size())
		if size == 0 || spec.UnknownRank {
			tensor.ReleaseFeeds(feeds)
			return nil, fmt.Errorf("zeros cannot feed its input %q: it is %v, of shape %v",
				spec.Name, spec.DType, spec.Shape)
		}
		shape := slices.Clone(spec.Shape)
		for i, d := range shape {
			if d < 0 {
				shape[i] = 1
				if i == 0 {
					shape[i] = rows
				}
			}
			if shape[i] > 0 && size > room/shape[i] {
				tensor.ReleaseFeeds(feeds)
				return nil, fmt.Errorf("its inputs have more than %d MiB", maxBatchBytes>>20)
			}
			size *= shape[i]
		}
		room -= size
		value := tensor.Allocate(spec.DType, shape, mem)
		clear(value.Data)
		feeds = append(feeds, tensor.Feed{Tensor: spec.Tensor, Value: value})
	}
	return feeds, nil
}

// runUntil runs a signature, but does not wait much longer than until the given time for a run that ignores its
// timeout.
func (e *loaded) runUntil(until time.Time, feeds []tensor.Feed, signature savedmodel.Signature) error {
	left := time.Until(until)
	if left <= 0 {
		tensor.ReleaseFeeds(feeds)
		return errors.New("earlier runs took all the time")
	}
	var fetches []string
	for _, spec := range signature.Outputs {
		fetches = append(fetches, spec.Tensor)
	}
	done := make(chan error, 1)
	go func() { // ends with the run, or with the process
		outputs, err := e.Run(feeds, fetches, left)
		if outputs != nil {
			outputs.Close()
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(left + time.Second):
		return fmt.Errorf("it takes longer than %s and ignores its timeout", zerosTime)
	}
}
