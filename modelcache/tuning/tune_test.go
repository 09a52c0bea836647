// Tests of the search, against a pool whose speeds follow a law.

package tuning

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
	"flightsvc/modelcache/repository"
)

// fakePool measures by a law: oneDNN makes a model 1.5 times as fast, freezing 1.3 times, one run at a time 1.2 times.
type fakePool struct {
	mode     string
	measures atomic.Int64
	lucky    sync.Map // configurations that were measured
	busy     atomic.Bool
	loading  atomic.Bool
	inMemory []repository.Model

	mu       sync.Mutex // guards the fields below
	sampled  []Sampled
	noRoom   bool
	disagree error
	replaced []string // digests of the forms that took over
	kept     []string // why a saved form stays
}

func (p *fakePool) Busy() bool                   { return p.busy.Load() }
func (p *fakePool) InMemory() []repository.Model { return p.inMemory }
func (p *fakePool) Loading() bool                { return p.loading.Load() }

func (p *fakePool) Sampled() []Sampled {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.sampled)
}

func (p *fakePool) Spare(int64) (func(), bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return func() {}, !p.noRoom
}

func (p *fakePool) Replace(_ context.Context, _ Sampled, folded string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.disagree == nil {
		p.replaced, p.sampled = append(p.replaced, folded), nil
	}
	return p.disagree
}

func (p *fakePool) KeepSaved(_, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kept, p.sampled = append(p.kept, why), nil
}

// slowly is how long a measurement of that mode takes.
const slowly = 15 * time.Second

func (p *fakePool) Measure(ctx context.Context, _ repository.Model, choice protocol.Choice,
	what control.Measurement) (control.Report, error) {
	frozen := choice.Frozen != ""
	count := p.measures.Add(1)
	speed := 1000.0
	if p.mode != "nothing" {
		for factor, on := range map[float64]bool{1.3: frozen, 1.5: choice.OneDNN, 1.2: choice.BatchThreads == 1,
			0.7: choice.Cores == 1} {
			if on {
				speed *= factor
			}
		}
	}
	lucky := false // batches of 4, the first time
	if p.mode == "by chance" {
		_, again := p.lucky.LoadOrStore(process(choice), true)
		lucky = !again
	}
	value := float32(0.5)
	switch {
	case p.mode == "slowly":
		time.Sleep(slowly)
	case p.mode == "another model each time":
		value = float32(int(1) << count)
	case p.mode == "forever":
		<-ctx.Done()
		return control.Report{}, ctx.Err()
	case p.mode == "strings":
		return control.Report{}, fault.New(fault.BadRequest, "model m, signature serving_default: input \"x\" takes "+
			"strings")
	case p.mode == "frozen wrongly" && frozen:
		value = 0.51
	}
	var measured []control.Measured
	for _, size := range what.BatchSizes {
		of := speed
		switch {
		case lucky && size == 4:
			of *= 1.08
		case p.mode == "nothing", p.mode == "by chance":
		default:
			of *= float64(size) / float64(size+20)
		}
		measured = append(measured, control.Measured{BatchSize: size, Best: of, Median: of})
	}
	return control.Report{Measured: measured}, control.WriteAnswers(what.Folder,
		[]control.Tensor{floats("y", value)})
}

func floats(name string, values ...float32) control.Tensor {
	o := control.Tensor{Name: name, DType: savedmodel.Float32, Shape: []int64{int64(len(values))}}
	for _, v := range values {
		o.Data = binary.LittleEndian.AppendUint32(o.Data, math.Float32bits(v))
	}
	return o
}

// newTuned returns a tuner of two cores, its model, and a Python that freezes what it is given, or says what it is
// told.
func newTuned(t *testing.T, mode, says string) (*Tuner, repository.Model) {
	t.Helper()
	python, root, cacheDir := filepath.Join(t.TempDir(), "python"), t.TempDir(), filepath.Join(t.TempDir(), "cache")
	expect.Write(t, python, `#!/bin/sh
`+cmp.Or(says, `mkdir "$5" && cp "$4/saved_model.pb" "$5" && touch "$5/frozen" && echo '{"frozen":true}'`)+"\n")
	if err := os.Chmod(python, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	models := repository.New(repository.Options{ModelRoot: root, CacheDir: cacheDir, Quiet: 1, Log: zap.NewNop()})
	t.Cleanup(models.Close)
	expect.Write(t, filepath.Join(root, "m", savedmodel.File), expect.SavedModel())
	model, err := models.Find(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	return New(Options{
		Pool: &fakePool{mode: mode, inMemory: []repository.Model{model}}, Repository: models,
		Profiles: NewProfiles(cacheDir), Cores: 2,
		Library:   func(context.Context) (string, error) { return "/lib", nil },
		Python:    func(context.Context, string) (string, error) { return python, nil },
		OwnMemory: func(int) (int64, error) { return 1, nil },
		Log:       zap.NewNop(),
	}), model
}

func nothing(protocol.Candidate) {}

func TestTune(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "", "")
	var seen []protocol.Candidate
	about, err := c.Tune(t.Context(), model, "", func(c protocol.Candidate) { seen = append(seen, c) })
	if err != nil {
		t.Fatal(err)
	}
	got := about.Chosen.Choice
	if got.Frozen == "" || !got.OneDNN || got.Cores != 2 || got.BatchThreads != 1 || got.BatchSize != 1024 {
		t.Errorf("chosen %+v", got)
	}
	if !c.options.Repository.Known(got.Frozen) {
		t.Errorf("the frozen model %s is not kept", got.Frozen)
	}
	if math.Abs(about.Chosen.Relative-1.2/0.7) > 1e-9 {
		t.Errorf("it is %g times the default", about.Chosen.Relative)
	}
	if len(seen) != len(about.Candidates) {
		t.Errorf("%d candidates were told, %d are in the table", len(seen), len(about.Candidates))
	}
	if stored := c.options.Profiles.Read(about.Digest).Tuned[Machine()]; stored != got {
		t.Errorf("stored %+v", stored)
	}
}

func TestTuneKeepsTheDefaultWithinNoise(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "nothing", "")
	about, err := c.Tune(t.Context(), model, "", nothing)
	if err != nil {
		t.Fatal(err)
	}
	got := about.Chosen.Choice
	if got.Frozen == "" || process(got) != process(about.Default.Choice) || got != (protocol.Choice{Frozen: got.Frozen,
		OneDNN: true, Cores: 1, BatchThreads: 2, BatchSize: 1024}) {
		t.Errorf("chosen %+v", got)
	}
}

// TestTuneMeasuresAgain prefers large batches to small ones that were lucky once.
func TestTuneMeasuresAgain(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "by chance", "")
	about, err := c.Tune(t.Context(), model, "", nothing)
	if err != nil {
		t.Fatal(err)
	}
	got := about.Chosen.Choice
	if got.Frozen == "" || process(got) != (protocol.Choice{Frozen: got.Frozen, OneDNN: true, Cores: 2,
		BatchThreads: 1}) || got.BatchSize != 1024 {
		t.Errorf("chosen %+v", got)
	}
}

// TestTuneEndsInTime leaves out what time does not allow, but not the default.
func TestTuneEndsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, model := newTuned(t, "slowly", "")
		began := time.Now()
		about, err := c.Tune(t.Context(), model, "", nothing)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > searchTime+slowly || about.Default.RowsPerSecond == 0 {
			t.Errorf("it took %v, and the default is %+v", took, about.Default)
		}
		if len(about.Candidates) <= len(tuneSizes) {
			t.Errorf("only %+v were tried", about.Candidates)
		}
	})
}

// TestTuneObeysTheVariable tries no other value of oneDNN than the one that was set; the reference is no candidate.
func TestTuneObeysTheVariable(t *testing.T) {
	t.Setenv(oneDNN, "1")
	c, model := newTuned(t, "nothing", "")
	about, err := c.Tune(t.Context(), model, "", nothing)
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
	c, model := newTuned(t, "frozen wrongly", "")
	about, err := c.Tune(t.Context(), model, "", nothing)
	if err != nil {
		t.Fatal(err)
	}
	if about.Chosen.Frozen != "" || !about.Chosen.Agrees {
		t.Errorf("chosen %+v", about.Chosen)
	}
	if !slices.ContainsFunc(about.Candidates, func(c protocol.Candidate) bool {
		return c.Frozen != "" && !c.Agrees && c.Difference > 1 && c.RowsPerSecond > 0
	}) {
		t.Error("the frozen ones are not shown")
	}
}

func TestTuneWithoutFreezing(t *testing.T) {
	t.Parallel()
	for says, want := range map[string]string{
		`echo '{"frozen":false,"reason":"it has a table"}'; exit 3`: "it has a table",
		`echo 'flightsvc: no' >&2; exit 1`:                          "freezing failed (exit status 1): flightsvc: no",
	} {
		c, model := newTuned(t, "", says)
		about, err := c.Tune(t.Context(), model, "", nothing)
		if err != nil || about.NotFrozen != want || about.Chosen.Frozen != "" || about.Chosen.BatchThreads != 1 {
			t.Errorf("%q, chosen %+v, %v", about.NotFrozen, about.Chosen.Choice, err)
		}
	}
}

func TestTuneObeysTheOwner(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "", "")
	model.Settings.Batching = control.Batching{AllowedBatchSizes: []int{2, 8}, MaxBatchSize: 8, NumBatchThreads: 2}
	about, err := c.Tune(t.Context(), model, "", nothing)
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
	c, model := newTuned(t, "strings", "")
	_, err := c.Tune(t.Context(), model, "", nothing)
	if kind, _ := fault.KindOf(err); kind != fault.BadRequest || err == nil {
		t.Errorf("strings: %v", err)
	}
	random, its := newTuned(t, "another model each time", "")
	_, err = random.Tune(t.Context(), its, "", nothing)
	expect.Fault(t, err, fault.BadRequest, "model m, signature serving_default", "random numbers")
	if _, err := c.Tune(t.Context(), model, "x", nothing); err == nil {
		t.Error("a signature that is not there")
	}
	if _, err := c.Tune(t.Context(), repository.Model{Ref: protocol.Image, Saved: protocol.ImageModel}, "",
		nothing); err == nil {
		t.Error("the built-in model")
	}
}

// TestTuneEndsAtOnce ends a search whose runner does not end by itself.
func TestTuneEndsAtOnce(t *testing.T) {
	t.Parallel()
	c, model := newTuned(t, "forever", "")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.Tune(ctx, model, "", nothing)
		ended <- err
	}()
	expect.Eventually(t, "a runner measures", func() bool { return c.options.Pool.(*fakePool).measures.Load() == 1 })
	if _, err := c.Tune(ctx, model, "", nothing); err == nil {
		t.Error("two searches at once")
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if _, stored := c.options.Profiles.Read(mustDigest(t, c, model)).Tuned[Machine()]; stored {
		t.Error("something was stored")
	}
}

// TestTuneIdleTriesAgain after a search that another one was in the way of, and not after one that the model cannot
// have.
func TestTuneIdleTriesAgain(t *testing.T) {
	t.Parallel()
	c, _ := newTuned(t, "strings", "")
	gaveUp := func() bool {
		c.tuneIdle(t.Context())
		failed := false
		c.untunable.Range(func(any, any) bool { failed = true; return false })
		return failed
	}
	c.searching.Lock() // somebody else tunes
	if gaveUp() {
		t.Error("given up for another's search")
	}
	c.searching.Unlock()
	if !gaveUp() {
		t.Error("not given up")
	}
}

// TestWhileIdle begins a search once nothing was busy for a while, and ends it when something is.
func TestWhileIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, _ := newTuned(t, "forever", "")
		pool := c.options.Pool.(*fakePool)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			c.InBackground(ctx, true)
		}()
		for round := range int64(2) {
			pool.busy.Store(true)
			time.Sleep(2 * idleTime)
			synctest.Wait()
			if !c.searching.TryLock() {
				t.Fatal("a search goes on while models are in use")
			}
			c.searching.Unlock()
			pool.busy.Store(false)
			time.Sleep(idleTime / 2)
			synctest.Wait()
			if got := pool.measures.Load(); got != round {
				t.Errorf("%d searches have begun before the pool was idle for %v", got, idleTime)
			}
			time.Sleep(idleTime)
			synctest.Wait()
			if got := pool.measures.Load(); got != round+1 {
				t.Errorf("%d searches have begun, not %d", got, round+1)
			}
		}
		cancel()
		<-ended
		if !c.searching.TryLock() {
			t.Error("a search goes on after the end")
		}
	})
}

func mustDigest(t *testing.T, c *Tuner, model repository.Model) string {
	t.Helper()
	digest, err := c.options.Repository.Digest(t.Context(), model)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func TestDifference(t *testing.T) {
	theirs := []control.Tensor{floats("y", 1, -100, 0, float32(math.NaN()))}
	for name, c := range map[string]struct {
		ours   []control.Tensor
		agrees bool
	}{
		"itself": {theirs, true},
		"a last digit": {[]control.Tensor{floats("y", 1.00001, -100.0001, 1e-4, float32(math.NaN()))},
			true},
		"another value":      {[]control.Tensor{floats("y", 1.02, -100, 0, float32(math.NaN()))}, false},
		"a number for a NaN": {[]control.Tensor{floats("y", 1, -100, 0, 1)}, false},
		"another name":       {[]control.Tensor{floats("z", 1, -100, 0, 0)}, false},
		"another shape":      {[]control.Tensor{floats("y", 1)}, false},
		"none":               {nil, false},
	} {
		if got := differenceOf(c.ours, theirs, ofChoices); (got <= 1) != c.agrees {
			t.Errorf("%s: %g of the tolerance", name, got)
		}
	}
	ints := func(n byte) []control.Tensor {
		return []control.Tensor{{Name: "i", DType: savedmodel.Uint8, Shape: []int64{1}, Data: []byte{n}}}
	}
	if differenceOf(ints(1), ints(1), ofForms) != 0 || differenceOf(ints(1), ints(2), ofForms) <= 1 {
		t.Error("whole numbers must be equal")
	}
	for bits, want := range map[uint16]float64{0: 0, 0x3c00: 1, 0xc000: -2, 0x3555: 0.333251953125,
		1: math.Ldexp(1, -24), 0x7c00: math.Inf(1)} {
		if got := float64(tensor.FromHalf(bits)); got != want {
			t.Errorf("%#x is %g, want %g", bits, got, want)
		}
	}
}
