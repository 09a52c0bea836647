package modelcache

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// fakeMeasure reports speeds by a law: oneDNN makes a model 1.5 times as fast, freezing 1.3 times, one run at a time 1.2 times.
func fakeMeasure(mode string, setup Setup, say func(Report)) {
	_, err := os.Stat(filepath.Join(setup.Dir, "frozen"))
	frozen := err == nil
	speed := 1000.0
	if mode != "measures nothing" {
		for factor, on := range map[float64]bool{1.3: frozen, 1.5: os.Getenv(oneDNN) == "1", 1.2: setup.Batching.NumBatchThreads == 1, 0.7: setup.Cores == 1} {
			if on {
				speed *= factor
			}
		}
	}
	lucky := false // batches of 4, the first time
	if mode == "measures by chance" {
		mark := filepath.Join(setup.Dir, fmt.Sprint("lucky", os.Getenv(oneDNN), setup.Cores, setup.Batching.NumBatchThreads))
		_, err := os.Stat(mark)
		if lucky = err != nil; lucky {
			_ = os.WriteFile(mark, nil, 0o600)
		}
	}
	value := float32(0.5)
	switch {
	case mode == "measures another model each time":
		count, err := os.OpenFile(os.Args[0]+".count", os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			panic(err)
		}
		_, _ = count.WriteString("x")
		info, err := count.Stat()
		if err != nil {
			panic(err)
		}
		value = float32(int(1) << info.Size())
	case mode == "measures forever":
		time.Sleep(time.Hour)
	case mode == "measures strings":
		say(Report{Build: testBuild, Error: "model m, signature serving_default: input \"x\" takes strings", Kind: fault.BadRequest})
		return
	case mode == "measures frozen wrongly" && frozen:
		value = 0.51
	}
	var measured []Measured
	for _, size := range setup.Measure.BatchSizes {
		of := speed
		switch {
		case mode == "measures by chance" && lucky && size == 4:
			of *= 1.08
		case mode == "measures nothing", mode == "measures by chance":
		default:
			of *= float64(size) / float64(size+20)
		}
		measured = append(measured, Measured{BatchSize: size, Best: of, Median: of})
	}
	if err := WriteAnswers(setup.Measure.Folder, []MeasuredOutput{floats("y", value)}); err != nil {
		panic(err)
	}
	say(Report{Build: testBuild, Measured: measured})
}

func floats(name string, values ...float32) MeasuredOutput {
	o := MeasuredOutput{Name: name, DType: savedmodel.Float32, Shape: []int64{int64(len(values))}}
	for _, v := range values {
		o.Data = binary.LittleEndian.AppendUint32(o.Data, math.Float32bits(v))
	}
	return o
}

// newTuned returns a cache of fake runners that measure, on two cores, and a Python that freezes what it is given, or says what it is told.
func newTuned(t *testing.T, mode, says string) (*Cache, Model) {
	t.Helper()
	python := filepath.Join(t.TempDir(), "python")
	write(t, python, `#!/bin/sh
`+cmp.Or(says, `mkdir "$4" && cp "$3/saved_model.pb" "$4" && touch "$4/frozen" && echo '{"frozen":true}'`)+"\n")
	if err := os.Chmod(python, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	return newCache(t, mode, func(o *Options) {
		o.Cores, o.CacheDir = 2, filepath.Join(t.TempDir(), "cache")
		o.Python = func(context.Context, string) (string, error) { return python, nil }
		o.Log = zap.NewNop()
	})
}

func nothing(Candidate) {}

func TestTune(t *testing.T) {
	t.Parallel()
	for _, quick := range []bool{false, true} {
		t.Run(fmt.Sprintf("quick %t", quick), func(t *testing.T) {
			c, model := newTuned(t, "measures", "")
			var seen []Candidate
			about, err := c.Tune(t.Context(), model, TuneOptions{Quick: quick}, func(c Candidate) { seen = append(seen, c) })
			if err != nil {
				t.Fatal(err)
			}
			got := about.Chosen.Choice
			if got.Frozen == "" || !got.OneDNN || got.Cores != 2 || got.BatchThreads != 1 || got.BatchSize != 1024 {
				t.Errorf("chosen %+v", got)
			}
			if !c.Known(got.Frozen) {
				t.Errorf("the frozen model %s is not kept", got.Frozen)
			}
			if math.Abs(about.Freezing-1.3) > 1e-9 || math.Abs(about.OneDNN-1.5) > 1e-9 || math.Abs(about.Chosen.Relative-1.3*1.2) > 1e-9 {
				t.Errorf("freezing %g, oneDNN %g, in all %g", about.Freezing, about.OneDNN, about.Chosen.Relative)
			}
			if len(seen) != len(about.Candidates) || !quick && len(seen) != 2*2*3*len(tuneSizes) {
				t.Errorf("%d candidates were told, %d are in the table", len(seen), len(about.Candidates))
			}
			if stored := c.profiles.read(about.Digest).Tuned[Machine()]; stored != got {
				t.Errorf("stored %+v", stored)
			}
		})
	}
}

func TestTuneKeepsTheDefaultWithinNoise(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "measures nothing", "")
	about, err := c.Tune(t.Context(), model, TuneOptions{}, nothing)
	if err != nil {
		t.Fatal(err)
	}
	if want := (Choice{OneDNN: true, Cores: 2, BatchThreads: 2, BatchSize: 1024}); about.Chosen.Choice != want {
		t.Errorf("chosen %+v", about.Chosen.Choice)
	}
}

// TestTuneMeasuresAgain prefers large batches to small ones that were lucky once.
func TestTuneMeasuresAgain(t *testing.T) {
	t.Parallel()
	for _, quick := range []bool{false, true} {
		c, model := newTuned(t, "measures by chance", "")
		about, err := c.Tune(t.Context(), model, TuneOptions{Quick: quick}, nothing)
		if err != nil {
			t.Fatal(err)
		}
		got := about.Chosen.Choice
		if got.Frozen == "" || got.configuration() != (Choice{Frozen: got.Frozen, OneDNN: true, Cores: 2, BatchThreads: 1}) || got.BatchSize != 1024 {
			t.Errorf("quick %t: chosen %+v", quick, got)
		}
	}
}

// TestTuneObeysTheVariable tries no other value of oneDNN than the one that was set; the reference is no candidate.
func TestTuneObeysTheVariable(t *testing.T) {
	t.Setenv(oneDNN, "1")
	c, model := newTuned(t, "measures nothing", "")
	about, err := c.Tune(t.Context(), model, TuneOptions{}, nothing)
	if err != nil {
		t.Fatal(err)
	}
	for _, candidate := range about.Candidates {
		if !candidate.OneDNN {
			t.Errorf("tried %+v", candidate.Choice)
		}
	}
}

func TestTuneRefusesOtherAnswers(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "measures frozen wrongly", "")
	about, err := c.Tune(t.Context(), model, TuneOptions{}, nothing)
	if err != nil {
		t.Fatal(err)
	}
	if about.Chosen.Frozen != "" || !about.Chosen.Agrees {
		t.Errorf("chosen %+v", about.Chosen)
	}
	if !slices.ContainsFunc(about.Candidates, func(c Candidate) bool { return c.Frozen != "" && !c.Agrees && c.Difference > 1 && c.RowsPerSecond > 0 }) {
		t.Error("the frozen ones are not shown")
	}
}

func TestTuneWithoutFreezing(t *testing.T) {
	t.Parallel()
	for says, want := range map[string]string{
		`echo '{"frozen":false,"reason":"it has a table"}'; exit 3`: "it has a table",
		`echo 'flightsvc.export.freeze: no' >&2; exit 1`:                   "freezing failed (exit status 1): flightsvc.export.freeze: no",
	} {
		c, model := newTuned(t, "measures", says)
		about, err := c.Tune(t.Context(), model, TuneOptions{Quick: true}, nothing)
		if err != nil || about.NotFrozen != want || about.Chosen.Frozen != "" || about.Chosen.BatchThreads != 1 {
			t.Errorf("%q, chosen %+v, %v", about.NotFrozen, about.Chosen.Choice, err)
		}
	}
}

func TestTuneObeysTheOwner(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "measures", "")
	model.Settings.Batching = Batching{AllowedBatchSizes: []int{2, 8}, MaxBatchSize: 8, NumBatchThreads: 2}
	about, err := c.Tune(t.Context(), model, TuneOptions{}, nothing)
	if err != nil {
		t.Fatal(err)
	}
	for _, candidate := range about.Candidates {
		if candidate.BatchThreads != 2 || candidate.BatchSize != 2 && candidate.BatchSize != 8 {
			t.Errorf("tried %+v", candidate.Choice)
		}
	}
}

func TestTuneSaysWhyNot(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "measures strings", "")
	_, err := c.Tune(t.Context(), model, TuneOptions{}, nothing)
	if kind, _ := fault.KindOf(err); kind != fault.BadRequest || err == nil {
		t.Errorf("strings: %v", err)
	}
	random, its := newTuned(t, "measures another model each time", "")
	_, err = random.Tune(t.Context(), its, TuneOptions{}, nothing)
	expect.Fault(t, err, fault.BadRequest, "model m, signature serving_default", "chance")
	if _, err := c.Tune(t.Context(), model, TuneOptions{Signature: "x"}, nothing); err == nil {
		t.Error("a signature that is not there")
	}
	if _, err := c.Tune(t.Context(), Model{Ref: Image, Saved: ImageModel}, TuneOptions{}, nothing); err == nil {
		t.Error("the built-in model")
	}
}

// TestTuneEndsAtOnce ends a search whose runner does not end by itself.
func TestTuneEndsAtOnce(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "measures forever", "")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.Tune(ctx, model, TuneOptions{}, nothing)
		ended <- err
	}()
	expect.Eventually(t, "a runner measures", func() bool {
		list, _ := filepath.Glob(filepath.Join(model.Dir, "*.started"))
		return len(list) == 1
	})
	if _, err := c.Tune(ctx, model, TuneOptions{}, nothing); err == nil {
		t.Error("two searches at once")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if _, stored := c.profiles.read(mustDigest(t, c, model)).Tuned[Machine()]; stored {
		t.Error("something was stored")
	}
}

// TestTuneIdleTriesAgain after a search that another one was in the way of, and not after one that the model cannot have.
func TestTuneIdleTriesAgain(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "good", "")
	if _, err := c.Ready(t.Context(), model, ""); err != nil {
		t.Fatal(err)
	}
	gaveUp := func() bool {
		c.tuneIdle(t.Context())
		failed := false
		c.untunable.Range(func(any, any) bool { failed = true; return false })
		return failed
	}
	c.tuning.Lock() // somebody else tunes
	if gaveUp() {
		t.Error("given up for another's search")
	}
	c.tuning.Unlock()
	behave(t, c.options.Binary, "measures strings")
	if !gaveUp() {
		t.Error("not given up")
	}
}

func mustDigest(t *testing.T, c *Cache, model Model) string {
	t.Helper()
	digest, err := c.digest(t.Context(), model)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func TestDifference(t *testing.T) {
	theirs := []MeasuredOutput{floats("y", 1, -100, 0, float32(math.NaN()))}
	for name, c := range map[string]struct {
		ours   []MeasuredOutput
		agrees bool
	}{
		"itself":             {theirs, true},
		"a last digit":       {[]MeasuredOutput{floats("y", 1.00001, -100.0001, 1e-4, float32(math.NaN()))}, true},
		"another value":      {[]MeasuredOutput{floats("y", 1.02, -100, 0, float32(math.NaN()))}, false},
		"a number for a NaN": {[]MeasuredOutput{floats("y", 1, -100, 0, 1)}, false},
		"another name":       {[]MeasuredOutput{floats("z", 1, -100, 0, 0)}, false},
		"another shape":      {[]MeasuredOutput{floats("y", 1)}, false},
		"none":               {nil, false},
	} {
		if got := differenceOf(c.ours, theirs); (got <= 1) != c.agrees {
			t.Errorf("%s: %g of the tolerance", name, got)
		}
	}
	ints := func(n byte) []MeasuredOutput {
		return []MeasuredOutput{{Name: "i", DType: savedmodel.Uint8, Shape: []int64{1}, Data: []byte{n}}}
	}
	if differenceOf(ints(1), ints(1)) != 0 || differenceOf(ints(1), ints(2)) <= 1 {
		t.Error("whole numbers must be equal")
	}
	for bits, want := range map[uint16]float64{0: 0, 0x3c00: 1, 0xc000: -2, 0x3555: 0.333251953125, 1: math.Ldexp(1, -24), 0x7c00: math.Inf(1)} {
		if got := float64(tensor.FromHalf(bits)); got != want {
			t.Errorf("%#x is %g, want %g", bits, got, want)
		}
	}
}
