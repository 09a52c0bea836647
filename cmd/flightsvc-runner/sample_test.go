// Tests of what a runner does for the forms of its model: all threads for a run that is alone, and samples.

package main

import (
	"path/filepath"
	"slices"
	"testing"

	"go.uber.org/zap"

	"flightsvc/internal/batch"
	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/offheap"
	"flightsvc/internal/tensor"
)

// intsOf returns two rows for the model ints.
func intsOf(t *testing.T, e *loaded, mem *offheap.Allocator) []tensor.Feed {
	t.Helper()
	return []tensor.Feed{feed(t, e, "i", mem, []int64{2, 3}, numbers(1, 2, 3, 4, 5, 6))}
}

// TestRunAlone opens a second session for a run that is alone, if there is room for the model twice.
func TestRunAlone(t *testing.T) {
	mem := &offheap.Allocator{}
	for i, setup := range []control.Setup{
		{Model: "ints", Cores: 2, RoomForTwo: true},
		{Model: "ints", Cores: 2, RoomForTwo: true, Threads: 1},
		{Model: "ints", Cores: 2},
		{Model: "ints", Cores: 1, RoomForTwo: true},
		{Model: "ints", Cores: 2, RoomForTwo: true, Threads: 2},
		{Model: "ints", Cores: 2, RoomForTwo: true, Batching: control.Batching{NumBatchThreads: 1}},
	} {
		e := loadSetup(t, setup)
		opens := i < 2
		if opens != (e.openWide != nil) {
			t.Fatalf("%+v: a second session: %t", setup, e.openWide != nil)
		}
		var want []byte
		run := func(f func([]tensor.Feed) (batch.Outputs, error)) {
			t.Helper()
			out, err := f(intsOf(t, e, mem))
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			got := slices.Clone(out.Values()[0].Data)
			if want == nil {
				want = got
			}
			if !slices.Equal(got, want) {
				t.Errorf("%v, and then %v", want, got)
			}
		}
		alone := func(feeds []tensor.Feed) (batch.Outputs, error) { return e.RunAlone(feeds, fetches(e), 0) }
		run(func(feeds []tensor.Feed) (batch.Outputs, error) { return e.Run(feeds, fetches(e), 0) })
		run(alone)
		if opens {
			expect.Eventually(t, "the second session is open", func() bool { return e.wide.Load() != nil })
			t.Cleanup(func() { _ = (*e.wide.Load()).Close() })
		}
		run(alone)
	}
	if live := mem.Live(); live != 0 {
		t.Errorf("%d bytes were not freed", live)
	}
}

// TestSample keeps the first run and runs it again, in another session.
func TestSample(t *testing.T) {
	mem, path := &offheap.Allocator{}, filepath.Join(t.TempDir(), "sample")
	e := loadModel(t, "ints")
	e.sampler = &sampler{path: path, saved: e.saved, log: zap.NewNop()}
	for range 2 { // the second one is not kept
		out, err := e.Run(intsOf(t, e, mem), fetches(e), 0)
		if err != nil {
			t.Fatal(err)
		}
		out.Close()
	}
	var kept control.Sample
	expect.Eventually(t, "the run is kept", func() (ok bool) {
		var err error
		kept, err = control.ReadSample(path)
		return err == nil
	})
	if len(kept.Inputs) != 1 || kept.Inputs[0].Name != "i" || !slices.Equal(kept.Inputs[0].Shape, []int64{2, 3}) ||
		len(kept.Outputs) == 0 || kept.Signature == "" {
		t.Errorf("kept %+v", kept)
	}
	if err := loadModel(t, "ints").replay(path, mem); err != nil {
		t.Fatal(err)
	}
	again, err := control.ReadSample(control.Replayed(path))
	if err != nil || len(again.Outputs) != len(kept.Outputs) {
		t.Fatalf("replayed %+v, %v", again, err)
	}
	for i, output := range again.Outputs {
		if output.Name != kept.Outputs[i].Name || !slices.Equal(output.Data, kept.Outputs[i].Data) {
			t.Errorf("%+v, and again %+v", kept.Outputs[i], output)
		}
	}
	expect.Eventually(t, "its rows are freed", func() bool { return mem.Live() == 0 })
	strings := loadModel(t, "strings")
	if err := strings.replay(path, mem); err == nil {
		t.Error("another model has run it")
	}
}

// TestSampleOfAFailedRun keeps a later run.
func TestSampleOfAFailedRun(t *testing.T) {
	mem, path := &offheap.Allocator{}, filepath.Join(t.TempDir(), "sample")
	e := loadModel(t, "ints")
	e.sampler = &sampler{path: path, saved: e.saved, log: zap.NewNop()}
	if _, err := e.Run(intsOf(t, e, mem), []string{"nope:0"}, 0); err == nil {
		t.Fatal("it has run")
	}
	out, err := e.Run(intsOf(t, e, mem), fetches(e), 0)
	if err != nil {
		t.Fatal(err)
	}
	out.Close()
	expect.Eventually(t, "the run is kept", func() bool {
		_, err := control.ReadSample(path)
		return err == nil && mem.Live() == 0
	})
}
