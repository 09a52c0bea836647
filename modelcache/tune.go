package modelcache

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"flightsvc/gpu"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// oneDNN is the variable with which TensorFlow's oneDNN kernels are switched. TensorFlow reads it once, so each value needs
// a process of its own.
const oneDNN = "TF_ENABLE_ONEDNN_OPTS"

// How a search goes. A speed is the median of a few windows; of those within tie of the fastest the simplest is chosen,
// since two measurements of one configuration differ by as much. One measurement alone decides nothing: whatever is
// within reach of the fastest is measured again.
const (
	tuneWindow     = 400 * time.Millisecond
	tuneWindows    = 3
	tuneLongestRun = time.Second // a batch that would take longer makes everybody wait
	tuneSeed       = 1
	tie            = 0.03
	reach          = 0.10
	finalists      = 4 // that are measured again at most, in turns, beside the default
	rounds         = 3 // in which they are
)

// tuneSizes are the batch sizes to try where the model's settings allow all.
var tuneSizes = []int{4, 16, 64, 256, 1024}

// TuneOptions say what a search is for.
type TuneOptions struct {
	Signature string // that is measured, savedmodel.DefaultSignature if ""
	Quick     bool   // one question after the other in about a minute, in place of all combinations
}

// Candidate is one configuration that was measured, or why it was not.
type Candidate struct {
	Choice
	RowsPerSecond float64 `json:"rows_per_s"` // median of the windows
	Relative      float64 `json:"relative"`   // to the default; 0 until that is known
	Agrees        bool    `json:"agrees"`
	// Difference is the largest one to the reference as a share of what is tolerated; above 1 it does not agree.
	Difference float64 `json:"difference"`
	Reason     string  `json:"reason,omitempty"` // why there is no speed
}

// Tuning is what came of a search.
type Tuning struct {
	Model     string `json:"model"`
	Version   string `json:"version"`
	Signature string `json:"signature"`
	Digest    string `json:"digest"`
	Machine   string `json:"machine"`
	Quick     bool   `json:"quick"`
	// NotFrozen says why the graph was not frozen; "" if it was.
	NotFrozen  string      `json:"not_frozen,omitempty"`
	Candidates []Candidate `json:"candidates"` // the fastest first
	Default    Candidate   `json:"default"`    // what runs without a choice
	Chosen     Candidate   `json:"chosen"`
	// Freezing and OneDNN are the median ratios of candidates that differ in that alone; 0 where there are none.
	Freezing float64 `json:"freezing"`
	OneDNN   float64 `json:"onednn"`
	Stored   string  `json:"stored"` // the file of the profile
}

// tuner is one search.
type tuner struct {
	c         *Cache
	model     Model
	digest    string
	options   TuneOptions
	signature savedmodel.Signature
	library   string
	cores     int
	standard  Choice // what runs without a choice; its BatchSize is set once it was measured
	sizes     []int
	onednn    []bool // the values to try
	reference []MeasuredOutput
	progress  func(Candidate)
	tried     []Candidate
	notFrozen string // what is wrong with the model itself
}

// Tune measures configurations of a model, each in a runner of its own, one after the other, and stores the fastest one whose
// answers agree with the reference, which is the model as it is without oneDNN. The next load of the model uses it.
// progress is called with each candidate, in the goroutine of the caller. The end of ctx ends the search at once and stores nothing.
//
// Faults: BadRequest for a signature that cannot be measured (strings, unknown dimensions, assigned variables, chance); Unavailable
// while another search runs; those of a load.
func (c *Cache) Tune(ctx context.Context, model Model, options TuneOptions, progress func(Candidate)) (Tuning, error) {
	if !c.tuning.TryLock() {
		return Tuning{}, fault.New(fault.Unavailable, "another model is being tuned; measurements beside one another would spoil both")
	}
	defer c.tuning.Unlock()
	options.Signature = cmp.Or(options.Signature, savedmodel.DefaultSignature)
	if model.Dir == "" {
		return Tuning{}, fault.New(fault.BadRequest, "model %s is built in; there is nothing to tune", model.Ref)
	}
	signature, err := model.Saved.Signature(options.Signature)
	if err != nil {
		return Tuning{}, fault.New(fault.NotFound, "model %s: %w", model.Ref, err)
	}
	if signature.Assigns != "" {
		return Tuning{}, fault.New(fault.BadRequest, "model %s, signature %s: it assigns variables (%s), so running it changes it; it cannot be tuned", model.Ref, options.Signature, signature.Assigns)
	}
	digest, err := c.digest(ctx, model)
	if err != nil {
		return Tuning{}, err
	}
	if digest == "" {
		return Tuning{}, fault.New(fault.BadRequest, "model %s: its folder %s holds links, so it has no digest to keep a choice by; copy it without links", model.Ref, model.Dir)
	}
	library, err := c.options.Library(ctx)
	if err != nil {
		return Tuning{}, fault.New(fault.Precondition, "model %s: %w", model.Ref, err)
	}
	t := &tuner{c: c, model: model, digest: digest, options: options, signature: signature, library: library, progress: progress}
	t.cores = cmp.Or(c.options.Cores, runtime.GOMAXPROCS(0))
	if model.Settings.Cores > 0 {
		t.cores = min(t.cores, model.Settings.Cores)
	}
	t.standard = Choice{OneDNN: os.Getenv(oneDNN) != "0", Cores: t.cores, BatchThreads: cmp.Or(model.Settings.Batching.NumBatchThreads, t.cores)}
	t.onednn = []bool{true, false}
	if _, set := os.LookupEnv(oneDNN); set { // whoever set the variable has decided
		t.onednn = []bool{t.standard.OneDNN}
	}
	t.sizes = sizesFor(model.Settings.Batching)
	about := Tuning{Model: model.Ref, Version: model.Version, Signature: options.Signature, Digest: digest, Machine: Machine(), Quick: options.Quick}
	if err := t.search(ctx, &about); err != nil {
		return Tuning{}, err
	}
	about.Stored = c.profiles.path(digest)
	err = c.profiles.change(digest, func(p *Profile) {
		if p.Tuned == nil {
			p.Tuned = map[string]Choice{}
		}
		p.Tuned[about.Machine], p.NotFrozen = about.Chosen.Choice, t.notFrozen
	})
	return about, err
}

func sizesFor(b Batching) []int {
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

// search measures, and fills in what came of it.
func (t *tuner) search(ctx context.Context, about *Tuning) (err error) {
	plain := t.standard // without the reference nothing can be compared
	plain.OneDNN = false
	if _, t.reference, err = t.run(ctx, plain, t.sizes[:1], 1); err != nil {
		return err
	}
	frozen, err := t.freeze(ctx)
	var cannot notFrozen
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &cannot):
		t.notFrozen, about.NotFrozen = string(cannot), string(cannot)
	case err != nil: // of this host, and no reason to leave the rest alone
		about.NotFrozen = err.Error()
	}
	graphs := slices.Compact([]string{"", frozen})
	if t.options.Quick {
		err = t.quick(ctx, graphs)
	} else {
		err = t.grid(ctx, graphs, t.threads(), t.sizes)
	}
	if err != nil {
		return err
	}
	list, err := t.finals(ctx)
	if err == nil {
		t.conclude(about, list)
	}
	return err
}

// grid tries all combinations.
func (t *tuner) grid(ctx context.Context, graphs []string, threads [][2]int, sizes []int) error {
	for _, graph := range graphs {
		for _, n := range threads {
			for _, on := range t.onednn {
				if err := t.try(ctx, Choice{Frozen: graph, OneDNN: on, Cores: n[0], BatchThreads: n[1]}, sizes); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// quick asks one question after the other, each of the best configuration so far: which batch sizes, frozen and oneDNN or
// not, and which threads.
func (t *tuner) quick(ctx context.Context, graphs []string) error {
	if err := t.try(ctx, t.standard, t.sizes); err != nil {
		return err
	}
	sizes := t.sizesOf(t.standard)
	if err := t.grid(ctx, graphs, [][2]int{{t.standard.Cores, t.standard.BatchThreads}}, sizes); err != nil {
		return err
	}
	best, err := t.best()
	if err != nil {
		return err
	}
	for _, n := range t.threads() {
		choice := best[0].Choice
		choice.Cores, choice.BatchThreads = n[0], n[1]
		if err := t.try(ctx, choice, sizes); err != nil {
			return err
		}
	}
	return nil
}

// sizesOf returns, ascending, the batch sizes with which a configuration was within reach of its fastest; all where it has none.
func (t *tuner) sizesOf(choice Choice) (sizes []int) {
	var own []Candidate
	fastest := 0.0
	for _, c := range t.tried {
		if c.Reason == "" && c.configuration() == choice.configuration() {
			own, fastest = append(own, c), max(fastest, c.RowsPerSecond)
		}
	}
	for _, c := range own {
		if c.RowsPerSecond >= (1-reach)*fastest {
			sizes = append(sizes, c.BatchSize)
		}
	}
	if len(sizes) == 0 {
		return t.sizes
	}
	return sizes
}

// configuration is what a process is started with: a choice without its batch size.
func (c Choice) configuration() Choice {
	c.BatchSize = 0
	return c
}

// threads lists the combinations of threads of TensorFlow's pools and runs at once: both as many as cores, one large run at a
// time, as many small ones as cores, and what lies between.
func (t *tuner) threads() [][2]int {
	n := t.cores
	list := [][2]int{{n, n}, {n, 1}, {1, n}}
	if n >= 4 {
		list = append(list, [2]int{n / 2, 2})
	}
	if t.model.Settings.Batching.NumBatchThreads > 0 { // the owner has decided
		list = [][2]int{{n, t.standard.BatchThreads}}
	}
	slices.SortFunc(list, func(a, b [2]int) int { return cmp.Or(-cmp.Compare(a[0], b[0]), -cmp.Compare(a[1], b[1])) })
	return slices.Compact(list)
}

// try measures one configuration with several batch sizes, unless that has been done.
func (t *tuner) try(ctx context.Context, choice Choice, sizes []int) error {
	if slices.ContainsFunc(t.tried, func(c Candidate) bool { return c.configuration() == choice.configuration() }) {
		return nil
	}
	found, answers, err := t.run(ctx, choice, sizes, tuneWindows)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		t.note(Candidate{Choice: choice, Reason: err.Error()})
	}
	difference := differenceOf(answers, t.reference)
	for _, m := range found {
		choice.BatchSize = m.BatchSize
		t.note(Candidate{Choice: choice, RowsPerSecond: m.Median, Agrees: difference <= 1, Difference: difference})
	}
	return nil
}

func (t *tuner) note(candidate Candidate) {
	t.tried = append(t.tried, candidate)
	t.progress(candidate)
}

// best returns the candidates that agree, the fastest first. Its fault, BadRequest, is that there is none.
func (t *tuner) best() ([]Candidate, error) {
	list := slices.DeleteFunc(slices.Clone(t.tried), func(c Candidate) bool { return !c.Agrees || c.Reason != "" })
	if len(list) == 0 {
		why := cmp.Or(t.tried[0].Reason, "its answers are not those of the reference in any configuration; is there chance in it?")
		return nil, fault.New(fault.BadRequest, "model %s, signature %s: it cannot be tuned: %s", t.model.Ref, t.options.Signature, why)
	}
	bySpeed(list)
	return list, nil
}

func bySpeed(list []Candidate) {
	slices.SortStableFunc(list, func(a, b Candidate) int { return -cmp.Compare(a.RowsPerSecond, b.RowsPerSecond) })
}

// finals measures the fastest few configurations and the default again, in turns and with the batch sizes that were fast, and
// returns these candidates, the fastest first. A machine that others use is slow for a while at a time, so a candidate
// counts by its part of the fastest of the same round, the median of the rounds.
func (t *tuner) finals(ctx context.Context) ([]Candidate, error) {
	list, err := t.best()
	if err != nil {
		return nil, err
	}
	first, again := finalists, []Choice{}
	if t.options.Quick {
		first = finalists / 2
	}
	for _, c := range list {
		if one := c.configuration(); c.RowsPerSecond >= (1-reach)*list[0].RowsPerSecond && len(again) < first && !slices.Contains(again, one) {
			again = append(again, one)
		}
	}
	if !slices.Contains(again, t.standard) && slices.ContainsFunc(list, func(c Candidate) bool { return c.configuration() == t.standard }) {
		again = append(again, t.standard)
	}
	parts, fastest := map[Choice][]float64{}, []float64{}
	for range rounds {
		speeds, most := map[Choice]float64{}, 0.0
		for _, choice := range again {
			found, _, err := t.run(ctx, choice, t.sizesOf(choice), tuneWindows)
			if err != nil { // it ran before; who fails now is no choice
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
	list = nil
	for i, c := range t.tried {
		if len(parts[c.Choice]) == rounds {
			t.tried[i].RowsPerSecond = median(parts[c.Choice]) * median(fastest)
			list = append(list, t.tried[i])
		}
	}
	if len(list) == 0 {
		return nil, fault.New(fault.Unavailable, "model %s: no configuration could be measured a second time; the log has what its runners said", t.model.Ref)
	}
	bySpeed(list)
	return list, nil
}

// median returns the middle one, the higher of two.
func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// deviation counts in how many ways a configuration is not the default.
func (t *tuner) deviation(c Choice) int {
	n := 0
	for _, differs := range []bool{c.Frozen != "", c.OneDNN != t.standard.OneDNN, c.Cores != t.standard.Cores || c.BatchThreads != t.standard.BatchThreads} {
		if differs {
			n++
		}
	}
	return n
}

// conclude chooses among the finalists, the fastest first.
func (t *tuner) conclude(about *Tuning, list []Candidate) {
	about.Chosen = list[0]
	for _, c := range list {
		if t.deviation(c.Choice) == 0 && about.Default.BatchSize == 0 {
			about.Default = c
		}
		simpler := cmp.Or(cmp.Compare(t.deviation(about.Chosen.Choice), t.deviation(c.Choice)), cmp.Compare(c.BatchSize, about.Chosen.BatchSize))
		if c.RowsPerSecond >= (1-tie)*list[0].RowsPerSecond && simpler > 0 {
			about.Chosen = c
		}
	}
	for i := range t.tried {
		t.tried[i].Relative = ratio(t.tried[i].RowsPerSecond, about.Default.RowsPerSecond)
	}
	about.Default.Relative = 1
	about.Chosen.Relative = ratio(about.Chosen.RowsPerSecond, about.Default.RowsPerSecond)
	about.Candidates = slices.Clone(t.tried)
	bySpeed(about.Candidates)
	about.Freezing = t.effect(func(c Choice) (bool, Choice) {
		on := c.Frozen != ""
		c.Frozen = ""
		return on, c
	})
	about.OneDNN = t.effect(func(c Choice) (bool, Choice) {
		on := c.OneDNN
		c.OneDNN = false
		return on, c
	})
}

// effect returns the median ratio of the speeds of candidates that differ only in what split takes away.
func (t *tuner) effect(split func(Choice) (on bool, rest Choice)) float64 {
	with, without := map[Choice]float64{}, map[Choice]float64{}
	for _, c := range t.tried {
		on, rest := split(c.Choice)
		if on {
			with[rest] = c.RowsPerSecond
		} else {
			without[rest] = c.RowsPerSecond
		}
	}
	var ratios []float64
	for rest, speed := range with {
		if r := ratio(speed, without[rest]); r > 0 {
			ratios = append(ratios, r)
		}
	}
	if len(ratios) == 0 {
		return 0
	}
	return median(ratios)
}

func ratio(a, b float64) float64 {
	if b <= 0 {
		return 0
	}
	return a / b
}

// environment is what a runner of a choice needs besides its Setup.
func (c Choice) environment() []string {
	if c.OneDNN {
		return []string{oneDNN + "=1"}
	}
	return []string{oneDNN + "=0"}
}

// run measures one configuration in a process of its own, which is gone when it returns.
func (t *tuner) run(ctx context.Context, choice Choice, sizes []int, windows int) ([]Measured, []MeasuredOutput, error) {
	release, err := t.c.borrow(ctx, t.model, t.digest)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	folder, err := os.MkdirTemp("", "flightsvc-tune-")
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = os.RemoveAll(folder) }()
	setup := Setup{
		Model: t.model.Ref, Dir: t.model.Dir, Server: t.c.options.Server, LogLevel: t.c.options.LogLevel,
		Cores: choice.Cores, Batching: Batching{NumBatchThreads: choice.BatchThreads},
		MaxImagePixels: t.c.options.MaxImagePixels, MaxImageBytes: t.c.options.MaxImageBytes,
		Measure: &Measurement{
			Signature: t.options.Signature, BatchSizes: sizes, Window: tuneWindow, Windows: windows, LongestRun: tuneLongestRun, Seed: tuneSeed, Folder: folder,
		},
	}
	if choice.Frozen != "" {
		setup.Dir = t.c.place(choice.Frozen)
	}
	if setup.OpLibraries, err = t.c.allowedLibraries(t.model); err != nil {
		return nil, nil, err
	}
	unhold, err := t.c.hold(Model{Ref: t.model.Ref, Dir: setup.Dir})
	if err != nil {
		return nil, nil, err
	}
	defer unhold()
	var processor *gpu.Placement // it is what is tuned
	env := append(runnerEnv(os.Environ(), t.library, nil, processor.Env()), choice.environment()...)
	report, err := runToEnd(ctx, t.c.options, setup, env)
	if err != nil {
		return nil, nil, err
	}
	answers, err := ReadAnswers(folder)
	return report.Measured, answers, err
}

// runToEnd starts a runner that ends by itself and returns its report.
func runToEnd(ctx context.Context, options Options, setup Setup, env []string) (Report, error) {
	ctx, cancel := context.WithTimeout(ctx, options.LoadTimeout+5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, options.Binary) //nolint:gosec // the binary lies beside our own
	cmd.Env, cmd.Stderr = env, os.Stderr
	cmd.WaitDelay = runnerGrace
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return Report{}, err
	}
	defer func() { _ = stdin.Close() }() // its end would end the runner
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return Report{}, err
	}
	line, err := json.Marshal(setup)
	if err != nil {
		return Report{}, err
	}
	if err := cmd.Start(); err != nil {
		return Report{}, fault.New(fault.Precondition, "model %s: start %s: %w", setup.Model, options.Binary, err)
	}
	_, _ = stdin.Write(append(line, '\n')) // a runner that is gone says nothing, which is an error below
	var last Report
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		var report Report
		if json.Unmarshal(lines.Bytes(), &report) == nil && (report.Measured != nil || report.Error != "") {
			last = report
		}
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return last, ctx.Err()
	case last.Error != "":
		return last, fault.New(last.Kind, "%s", last.Error)
	case last.Measured == nil:
		return last, fault.New(fault.Internal, "model %s: its runner ended while it was measured (%v); the log has what it said", setup.Model, err)
	case last.Build != options.Build:
		return last, fault.New(fault.Precondition, "flightsvc-runner is build %s, flightsvc is build %s; install both from one release", last.Build, options.Build)
	}
	return last, nil
}

// notFrozen is why a model has to be served as it is.
type notFrozen string

func (n notFrozen) Error() string { return string(n) }

// freeze makes constants of the model's variables, with Python, and keeps the result among the pushed models; it returns its
// digest. Its error is a notFrozen where the model is the reason.
func (t *tuner) freeze(ctx context.Context) (digest string, err error) {
	c := t.c
	if c.options.Python == nil {
		return "", errors.New("this server has no Python to freeze it with")
	}
	python, err := c.options.Python(ctx, t.library)
	if err != nil {
		return "", err
	}
	dir, err := c.beside(pushPattern)
	if err != nil {
		return "", c.diskFault(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	out := filepath.Join(dir, "frozen")
	args := []string{"-m", "flightsvc.export.freeze", t.model.Dir, out}
	for _, name := range t.model.Saved.Names() {
		if t.model.Saved.Signatures[name].Assigns == "" {
			args = append(args, "--signature", name)
		}
	}
	cmd := exec.CommandContext(ctx, python, args...) //nolint:gosec // the user's own interpreter
	cmd.WaitDelay = runnerGrace
	var said, cause strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &cause
	err = cmd.Run()
	var told struct {
		Frozen bool   `json:"frozen"`
		Reason string `json:"reason"`
	}
	switch {
	case json.Unmarshal([]byte(lastLine(said.String())), &told) != nil:
		return "", fmt.Errorf("freezing failed (%w): %s", cmp.Or(err, io.ErrUnexpectedEOF), lastLine(cause.String()))
	case !told.Frozen:
		return "", notFrozen(told.Reason)
	}
	files, err := scan(out)
	if err != nil {
		return "", c.diskFault(err)
	}
	if digest, err = digestOf(ctx, Model{Ref: t.model.Ref, Version: t.model.Version, Dir: out, Stamp: files.stamp}); err != nil {
		return "", err
	}
	if err := c.keep(out, digest); err != nil {
		return "", c.diskFault(err)
	}
	c.collectSoon()
	return digest, nil
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
