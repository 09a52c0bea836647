// The search for the fastest configuration of a model.

package tuning

import (
	"cmp"
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
)

// oneDNN is the environment variable that switches TensorFlow's oneDNN kernels on or off. TensorFlow reads it once, so
// each value needs a process of its own.
const oneDNN = "TF_ENABLE_ONEDNN_OPTS"

// How a search goes. A speed is the median of a few windows. One measurement alone decides nothing: configurations
// whose speed is within reach of the fastest are measured again. Of those within tie of the fastest the simplest is
// chosen, because two measurements of one configuration differ by as much.
const (
	tuneWindow     = 400 * time.Millisecond
	tuneWindows    = 3
	tuneLongestRun = time.Second // a batch that would take longer is not tried: all callers would wait for it
	tuneSeed       = 1
	tie            = 0.03 // a share of the fastest speed
	reach          = 0.10 // also a share of it
	finalists      = 2    // configurations that are measured again at most, besides the default
	rounds         = 3    // in each of which all finalists take their turn; fewer when time is short
)

// A search takes searchTime at most, unless its first configurations alone take longer. Other configurations are tried
// for the first trialTime of it.
const (
	searchTime = time.Minute
	trialTime  = searchTime * 2 / 3
)

// tuneSizes are the batch sizes to try where the model's settings allow all.
var tuneSizes = []int{4, 16, 64, 256, 1024}

// Pool is what a search needs of modelcache.Cache, which keeps the models in memory.
type Pool interface {
	// Measure starts one more runner of a model, configured by choice instead of the model's own configuration, and
	// returns what it has measured. It waits for memory, as a load does. When it returns, the process has ended.
	Measure(
		ctx context.Context, model repository.Model, choice protocol.Choice, what control.Measurement,
	) (control.Report, error)
	// Busy reports whether any model is in use or being loaded.
	Busy() bool
	// InMemory returns the models that are ready.
	InMemory() []repository.Model

	// Loading reports whether a load is under way, or waits.
	Loading() bool
	// Sampled returns the models that might be served in their folded form, once they have answered real rows.
	Sampled() []Sampled
	// Spare takes host memory that is free now, false if there is not enough.
	Spare(bytes int64) (release func(), ok bool)
	// Replace lets the folded form of a model, which has a digest of its own, take over from the saved one, if it
	// answers rows alike. Faults: Exhausted without memory for both, Unavailable if the runner has ended, Precondition
	// if the answers do not agree; those of a load.
	Replace(ctx context.Context, model Sampled, folded string) error
	// KeepSaved records why the model with a digest is served in its saved form.
	KeepSaved(digest, why string)
}

// Sampled is a model in memory that has answered real rows.
type Sampled struct {
	Model  repository.Model
	Digest string
}

// Options are what a Tuner needs.
type Options struct {
	Pool       Pool
	Repository *repository.Repository // keeps the frozen models
	Profiles   *Profiles
	Cores      int // that a runner may use; 0 means all
	// Library finds the folder of libtensorflow; its error is a sentence that says what to install.
	Library func(context.Context) (string, error)
	// Python finds an interpreter that has flightsvc and TensorFlow, given the folder of libtensorflow. Its
	// error is a sentence that says what to install. Nil means that no graph is frozen.
	Python func(ctx context.Context, library string) (string, error)
	// OwnMemory returns the bytes of the host that a process has for itself.
	OwnMemory func(pid int) (int64, error)
	Log       *zap.Logger
}

// Tuner finds out how models run fastest, one at a time.
type Tuner struct {
	options   Options
	searching sync.Mutex // held while Tune measures
	untunable sync.Map   // digests of models that tuneIdle has given up
	folds     folds
}

// New returns a tuner.
func New(options Options) *Tuner { return &Tuner{options: options} }

// search is the state of one call of Tune.
type search struct {
	t         *Tuner
	model     repository.Model
	digest    string
	signature string // its name
	library   string
	cores     int
	standard  protocol.Choice // the default configuration, without a batch size; its graph is set by narrow
	sizes     []int
	onednn    []bool // the values to try
	reference []control.Tensor
	progress  func(protocol.Candidate)
	began     time.Time
	longest   time.Duration // of a measurement so far
	tried     []protocol.Candidate
	notFrozen string // the reason, if the model itself cannot be frozen
}

// Tune measures configurations of a model, each in a runner of its own, one after the other. It stores the fastest one
// whose answers agree with the reference, the unchanged model without oneDNN; the next load of the model uses it.
// progress is called with each candidate, on the caller's goroutine. When ctx ends, the search ends at once and stores
// nothing.
//
// Faults: NotFound for an unknown signature; BadRequest for one that cannot be measured (strings, unknown dimensions,
// assigned variables, random numbers); Precondition without libtensorflow; Unavailable while another search runs; those
// of a load.
func (t *Tuner) Tune(
	ctx context.Context, model repository.Model, signature string, progress func(protocol.Candidate),
) (protocol.Tuning, error) {
	if !t.searching.TryLock() {
		return protocol.Tuning{}, fault.New(fault.Unavailable, "another model is being tuned; parallel measurements "+
			"would distort each other, so try again later")
	}
	defer t.searching.Unlock()
	signature = cmp.Or(signature, savedmodel.DefaultSignature)
	if model.Dir == "" {
		return protocol.Tuning{}, fault.New(fault.BadRequest,
			"model %s is built in; there is nothing to tune", model.Ref)
	}
	spec, err := model.Saved.Signature(signature)
	if err != nil {
		return protocol.Tuning{}, fault.New(fault.NotFound, "model %s: %w", model.Ref, err)
	}
	if spec.Assigns != "" {
		return protocol.Tuning{}, fault.New(fault.BadRequest, "model %s, signature %s: it assigns variables (%s), so "+
			"running it changes it; it cannot be tuned", model.Ref, signature, spec.Assigns)
	}
	digest, err := t.options.Repository.Digest(ctx, model)
	if err != nil {
		return protocol.Tuning{}, err
	}
	if digest == "" {
		return protocol.Tuning{}, fault.New(fault.BadRequest, "model %s: its folder %s holds links, so it has no "+
			"digest to store a result under; copy it without links", model.Ref, model.Dir)
	}
	library, err := t.options.Library(ctx)
	if err != nil {
		return protocol.Tuning{}, fault.New(fault.Precondition, "model %s: %w", model.Ref, err)
	}
	s := &search{t: t, model: model, digest: digest, signature: signature, library: library, progress: progress,
		began: time.Now()}
	s.cores = cmp.Or(t.options.Cores, runtime.GOMAXPROCS(0))
	if model.Settings.Cores > 0 {
		s.cores = min(s.cores, model.Settings.Cores)
	}
	runs := cmp.Or(model.Settings.Batching.NumBatchThreads, s.cores)
	s.standard = protocol.Choice{OneDNN: os.Getenv(oneDNN) != "0", Cores: max(s.cores/runs, 1), BatchThreads: runs}
	s.onednn = []bool{true, false}
	if _, set := os.LookupEnv(oneDNN); set { // the environment has decided
		s.onednn = []bool{s.standard.OneDNN}
	}
	s.sizes = sizesFor(model.Settings.Batching)
	about := protocol.Tuning{Model: model.Ref, Version: model.Version, Signature: signature, Digest: digest,
		Machine: Machine(), Busy: busyShare(ctx)}
	if err := s.run(ctx, &about); err != nil {
		return protocol.Tuning{}, err
	}
	about.Stored = t.options.Profiles.path(digest)
	err = t.options.Profiles.Change(digest, func(p *Profile) {
		if p.Tuned == nil {
			p.Tuned = map[string]protocol.Choice{}
		}
		p.Tuned[about.Machine], p.NotFrozen = about.Chosen.Choice, s.notFrozen
	})
	return about, err
}

// sizesFor returns the batch sizes to try, ascending, as far as the model's settings allow them.
func sizesFor(b control.Batching) []int {
	if len(b.AllowedBatchSizes) > 0 {
		return b.AllowedBatchSizes
	}
	sizes := slices.Clone(tuneSizes)
	if b.MaxBatchSize > 0 {
		sizes = slices.DeleteFunc(sizes, func(n int) bool { return n >= b.MaxBatchSize })
		sizes = append(sizes, b.MaxBatchSize)
	}
	return sizes
}

// run makes the search and fills in its result.
func (s *search) run(ctx context.Context, about *protocol.Tuning) (err error) {
	plain := s.standard
	plain.OneDNN = false // the reference, with which all answers are compared
	if _, s.reference, err = s.measure(ctx, plain, s.sizes[:1], 1); err != nil {
		return err
	}
	frozen, err := s.t.freeze(ctx, s.model, s.library, 0)
	var cannot notFrozen
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &cannot):
		s.notFrozen, about.NotFrozen = string(cannot), string(cannot)
	case err != nil: // this host cannot freeze; the other configurations are measured all the same
		about.NotFrozen = err.Error()
	}
	if err := s.narrow(ctx, frozen); err != nil {
		return err
	}
	list, err := s.finals(ctx)
	if err == nil {
		s.conclude(about, list)
	}
	return err
}

// narrow varies one thing after the other, each time starting from the best configuration so far: the batch size, the
// graph with and without oneDNN, the threads. The default has the frozen graph if there is one and its answers agree.
func (s *search) narrow(ctx context.Context, frozen string) error {
	saved := s.standard
	if s.model.Settings.Form != repository.FormSaved {
		s.standard.Frozen = frozen
	}
	if err := s.try(ctx, s.standard, s.sizes); err != nil {
		return err
	}
	if _, err := s.best(); err != nil && frozen != "" {
		s.standard = saved
		if err := s.try(ctx, s.standard, s.sizes); err != nil {
			return err
		}
	}
	sizes := s.sizesOf(s.standard)
	for _, graph := range slices.Compact([]string{"", frozen}) {
		for _, on := range s.onednn {
			choice := s.standard
			choice.Frozen, choice.OneDNN = graph, on
			if err := s.try(ctx, choice, sizes); err != nil {
				return err
			}
		}
	}
	best, err := s.best()
	if err != nil {
		return err
	}
	for _, n := range s.threads() {
		choice := best[0].Choice
		choice.Cores, choice.BatchThreads = n[0], n[1]
		if err := s.try(ctx, choice, sizes); err != nil {
			return err
		}
	}
	return nil
}

// sizesOf returns the batch sizes, ascending, at which a configuration was within reach of its own fastest; all sizes
// if it was not measured.
func (s *search) sizesOf(choice protocol.Choice) (sizes []int) {
	var own []protocol.Candidate
	fastest := 0.0
	for _, c := range s.tried {
		if c.Reason == "" && process(c.Choice) == process(choice) {
			own, fastest = append(own, c), max(fastest, c.RowsPerSecond)
		}
	}
	for _, c := range own {
		if c.RowsPerSecond >= (1-reach)*fastest {
			sizes = append(sizes, c.BatchSize)
		}
	}
	if len(sizes) == 0 {
		return s.sizes
	}
	return sizes
}

// process returns a choice without its batch size: two choices with the same one can share a runner.
func process(c protocol.Choice) protocol.Choice {
	c.BatchSize = 0
	return c
}

// threads lists pairs to try: threads of TensorFlow's pools, and runs at once. Both as many as cores; all threads for
// one run; one thread, with as many runs as cores; and from 4 cores on half the threads with two runs.
func (s *search) threads() [][2]int {
	n := s.cores
	list := [][2]int{{n, n}, {n, 1}, {1, n}}
	if n >= 4 {
		list = append(list, [2]int{n / 2, 2})
	}
	if s.model.Settings.Batching.NumBatchThreads > 0 { // the model's settings have decided
		list = [][2]int{{s.standard.Cores, s.standard.BatchThreads}, {n, s.standard.BatchThreads}}
	}
	slices.SortFunc(list, func(a, b [2]int) int { return cmp.Or(-cmp.Compare(a[0], b[0]), -cmp.Compare(a[1], b[1])) })
	return slices.Compact(list)
}

// try measures one configuration with several batch sizes, unless that has been done. When it is late, only the default
// is tried.
func (s *search) try(ctx context.Context, choice protocol.Choice, sizes []int) error {
	late := time.Since(s.began) > trialTime && choice != s.standard
	if late || slices.ContainsFunc(s.tried, func(c protocol.Candidate) bool {
		return process(c.Choice) == process(choice)
	}) {
		return nil
	}
	found, answers, err := s.measure(ctx, choice, sizes, tuneWindows)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		s.note(protocol.Candidate{Choice: choice, Reason: err.Error()})
	}
	difference := differenceOf(answers, s.reference, ofChoices)
	for _, m := range found {
		choice.BatchSize = m.BatchSize
		s.note(protocol.Candidate{
			Choice: choice, RowsPerSecond: m.Median, Agrees: difference <= 1, Difference: difference,
		})
	}
	return nil
}

func (s *search) note(candidate protocol.Candidate) {
	s.tried = append(s.tried, candidate)
	s.progress(candidate)
}

// best returns the candidates whose answers agree, the fastest first. Its fault is BadRequest if there is none.
func (s *search) best() ([]protocol.Candidate, error) {
	list := slices.DeleteFunc(slices.Clone(s.tried), func(c protocol.Candidate) bool {
		return !c.Agrees || c.Reason != ""
	})
	if len(list) == 0 {
		why := cmp.Or(s.tried[0].Reason, "in no configuration do its answers agree with the reference; does it use "+
			"random numbers?")
		return nil, fault.New(fault.BadRequest, "model %s, signature %s: it cannot be tuned: %s", s.model.Ref,
			s.signature, why)
	}
	bySpeed(list)
	return list, nil
}

func bySpeed(list []protocol.Candidate) {
	slices.SortStableFunc(list, func(a, b protocol.Candidate) int {
		return -cmp.Compare(a.RowsPerSecond, b.RowsPerSecond)
	})
}

// finals measures the fastest few configurations and the default again, in turns and at the batch sizes that were fast,
// and returns these candidates, the fastest first. A machine that others use is slow for a while at a time; a candidate
// is therefore rated by its share of the fastest speed of the same round, of which the median over the rounds counts.
func (s *search) finals(ctx context.Context) ([]protocol.Candidate, error) {
	list, err := s.best()
	if err != nil {
		return nil, err
	}
	again := []protocol.Choice{}
	for _, c := range list {
		if one := process(c.Choice); c.RowsPerSecond >= (1-reach)*list[0].RowsPerSecond && len(again) < finalists &&
			!slices.Contains(again, one) {
			again = append(again, one)
		}
	}
	if !slices.Contains(again, s.standard) && slices.ContainsFunc(list,
		func(c protocol.Candidate) bool { return process(c.Choice) == s.standard }) {
		again = append(again, s.standard)
	}
	parts, fastest := map[protocol.Choice][]float64{}, []float64{}
	for range rounds {
		if time.Since(s.began)+time.Duration(len(again))*s.longest > searchTime {
			break
		}
		speeds, most := map[protocol.Choice]float64{}, 0.0
		for _, choice := range again {
			found, _, err := s.measure(ctx, choice, s.sizesOf(choice), tuneWindows)
			if err != nil { // it ran before: a configuration that fails now is left out
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				continue
			}
			for _, m := range found {
				choice.BatchSize = m.BatchSize
				speeds[choice], most = m.Median, max(most, m.Median)
			}
		}
		for choice, speed := range speeds {
			parts[choice] = append(parts[choice], speed/most)
		}
		fastest = append(fastest, most)
	}
	if len(fastest) == 0 { // no time for it: the single measurements decide
		return list, nil
	}
	list = nil
	for i, c := range s.tried {
		if len(parts[c.Choice]) == len(fastest) {
			s.tried[i].RowsPerSecond = median(parts[c.Choice]) * median(fastest)
			list = append(list, s.tried[i])
		}
	}
	if len(list) == 0 {
		return nil, fault.New(fault.Unavailable, "model %s: no configuration could be measured a second time; see "+
			"the runners' messages in the log", s.model.Ref)
	}
	bySpeed(list)
	return list, nil
}

// median returns the middle value, the higher one if there are two.
func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// deviation counts in how many ways a configuration is not the default.
func (s *search) deviation(c protocol.Choice) int {
	n := 0
	for _, differs := range []bool{c.Frozen != s.standard.Frozen, c.OneDNN != s.standard.OneDNN,
		c.Cores != s.standard.Cores || c.BatchThreads != s.standard.BatchThreads} {
		if differs {
			n++
		}
	}
	return n
}

// conclude chooses the simplest of the candidates within tie of the fastest, which comes first in the list.
func (s *search) conclude(about *protocol.Tuning, list []protocol.Candidate) {
	about.Chosen = list[0]
	for _, c := range list {
		if s.deviation(c.Choice) == 0 && about.Default.BatchSize == 0 {
			about.Default = c
		}
		simpler := cmp.Or(cmp.Compare(s.deviation(about.Chosen.Choice), s.deviation(c.Choice)),
			cmp.Compare(c.BatchSize, about.Chosen.BatchSize))
		if c.RowsPerSecond >= (1-tie)*list[0].RowsPerSecond && simpler > 0 {
			about.Chosen = c
		}
	}
	for i := range s.tried {
		s.tried[i].Relative = ratio(s.tried[i].RowsPerSecond, about.Default.RowsPerSecond)
	}
	about.Default.Relative = 1
	about.Chosen.Relative = ratio(about.Chosen.RowsPerSecond, about.Default.RowsPerSecond)
	about.Candidates = slices.Clone(s.tried)
	bySpeed(about.Candidates)
}

func ratio(a, b float64) float64 {
	if b <= 0 {
		return 0
	}
	return a / b
}

// Environment returns the environment variables that a runner needs for a choice, besides its Setup.
func Environment(c protocol.Choice) []string {
	if c.OneDNN {
		return []string{oneDNN + "=1"}
	}
	return []string{oneDNN + "=0"}
}

// measure measures one configuration in a process of its own, and returns its speeds and answers.
func (s *search) measure(
	ctx context.Context, choice protocol.Choice, sizes []int, windows int,
) ([]control.Measured, []control.Tensor, error) {
	folder, err := os.MkdirTemp("", "flightsvc-tune-")
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = os.RemoveAll(folder) }()
	began := time.Now()
	defer func() { s.longest = max(s.longest, time.Since(began)) }()
	report, err := s.t.options.Pool.Measure(ctx, s.model, choice, control.Measurement{
		Signature: s.signature, BatchSizes: sizes, Window: tuneWindow, Windows: windows, LongestRun: tuneLongestRun,
		Seed: tuneSeed, Folder: folder,
	})
	if err != nil {
		return nil, nil, err
	}
	answers, err := control.ReadAnswers(folder)
	return report.Measured, answers, err
}
