// Samples: the first run of real rows is kept, and another form of the model runs it again.

package main

import (
	"slices"
	"sync/atomic"

	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// maxSample is the most bytes of the inputs of a run that is kept, and of its outputs. A larger run is passed over.
const maxSample = 16 << 20

// sampler keeps one run of an engine in a file.
type sampler struct {
	path  string
	saved *savedmodel.Model
	log   *zap.Logger
	taken atomic.Bool // a run is being kept, or was
}

// begin returns the inputs of a run, with references of their own, nil if it is not to be kept. They go to end.
func (s *sampler) begin(feeds []tensor.Feed) []tensor.Feed {
	if s == nil || s.taken.Load() || len(feeds) == 0 {
		return nil
	}
	bytes := int64(0)
	for i := range feeds {
		if feeds[i].Value.Rows() < 0 {
			return nil
		}
		bytes += feeds[i].Value.ByteSize()
	}
	if bytes > maxSample || !s.taken.CompareAndSwap(false, true) {
		return nil
	}
	return first(feeds, int(feeds[0].Value.Rows()))
}

// end writes a run to the file, and releases its inputs. Without outputs another run will be kept.
func (s *sampler) end(feeds []tensor.Feed, fetches []string, outputs outputs) {
	if feeds == nil {
		return
	}
	sample, ok := s.sampleOf(feeds, fetches, outputs)
	if !ok {
		tensor.ReleaseFeeds(feeds)
		s.taken.Store(false)
		return
	}
	go func() { // ends when the file is written, or with the process
		defer tensor.ReleaseFeeds(feeds)
		if err := sample.Write(s.path); err != nil {
			s.log.Info("the first run cannot be kept, so this model stays in its saved form", zap.Error(err))
		}
	}()
}

// sampleOf describes a run; false if it failed or is too large. The inputs view the feeds, the outputs are copies.
func (s *sampler) sampleOf(feeds []tensor.Feed, fetches []string, outputs outputs) (sample control.Sample, ok bool) {
	name, signature, ok := s.signatureOf(feeds, fetches)
	if !ok || len(outputs) != len(fetches) {
		return sample, false
	}
	sample.Signature = name
	for _, spec := range signature.Inputs {
		i := slices.IndexFunc(feeds, func(f tensor.Feed) bool { return f.Tensor == spec.Tensor })
		sample.Inputs = append(sample.Inputs, tensorOf(spec.Name, feeds[i].Value))
	}
	bytes := int64(0)
	for i, value := range outputs.Values() {
		if bytes += value.ByteSize(); bytes > maxSample {
			return sample, false
		}
		value.Data = slices.Clone(value.Data)
		value.Strings = slices.Clone(value.Strings)
		for j := range value.Strings {
			value.Strings[j] = slices.Clone(value.Strings[j])
		}
		at := slices.IndexFunc(signature.Outputs, func(spec savedmodel.Spec) bool { return spec.Tensor == fetches[i] })
		sample.Outputs = append(sample.Outputs, tensorOf(signature.Outputs[at].Name, value))
	}
	return sample, true
}

// signatureOf returns the signature that a run is of.
func (s *sampler) signatureOf(feeds []tensor.Feed, fetches []string) (string, savedmodel.Signature, bool) {
	has := func(specs []savedmodel.Spec, name string) bool {
		return slices.ContainsFunc(specs, func(spec savedmodel.Spec) bool { return spec.Tensor == name })
	}
	for _, name := range s.saved.Names() {
		signature := s.saved.Signatures[name]
		fed := !slices.ContainsFunc(feeds, func(f tensor.Feed) bool { return !has(signature.Inputs, f.Tensor) })
		fetched := !slices.ContainsFunc(fetches, func(f string) bool { return !has(signature.Outputs, f) })
		if fed && fetched && len(feeds) == len(signature.Inputs) {
			return name, signature, true
		}
	}
	return "", savedmodel.Signature{}, false
}

func tensorOf(name string, value tensor.Value) control.Tensor {
	return control.Tensor{Name: name, DType: value.DType, Shape: value.Shape, Data: value.Data, Strings: value.Strings}
}

// replay runs a sample and writes the outputs for the front, which compares them.
func (e *loaded) replay(path string, mem memory.Allocator) error {
	sample, err := control.ReadSample(path)
	if err != nil {
		return err
	}
	signature, err := e.saved.Signature(sample.Signature)
	if err != nil {
		return err
	}
	var feeds []tensor.Feed
	for _, input := range sample.Inputs {
		i := slices.IndexFunc(signature.Inputs, func(spec savedmodel.Spec) bool { return spec.Name == input.Name })
		if i < 0 {
			tensor.ReleaseFeeds(feeds)
			return fault.New(fault.NotFound, "its form has no input %q", input.Name)
		}
		constant := savedmodel.Constant{DType: input.DType, Shape: input.Shape, Data: input.Data,
			Strings: input.Strings}
		feeds = append(feeds, tensor.Feed{Tensor: signature.Inputs[i].Tensor, Value: newValue(constant, mem)})
	}
	var fetches []string
	for _, output := range sample.Outputs {
		i := slices.IndexFunc(signature.Outputs, func(spec savedmodel.Spec) bool { return spec.Name == output.Name })
		if i < 0 {
			tensor.ReleaseFeeds(feeds)
			return fault.New(fault.NotFound, "its form has no output %q", output.Name)
		}
		fetches = append(fetches, signature.Outputs[i].Tensor)
	}
	answers, err := e.Run(feeds, fetches, 0)
	if err != nil {
		return err
	}
	defer answers.Close()
	replayed := control.Sample{Signature: sample.Signature}
	for i, value := range answers.Values() {
		replayed.Outputs = append(replayed.Outputs, tensorOf(sample.Outputs[i].Name, value))
	}
	return replayed.Write(control.Replayed(path))
}
