package modelcache

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"flightsvc/gpu"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

// oneDNN is the variable with which TensorFlow's oneDNN kernels are switched. TensorFlow reads it once, so each value needs
// a process of its own.
const oneDNN = "TF_ENABLE_ONEDNN_OPTS"

// How a search goes. A speed is the median of a few windows; of those within tie of the fastest the simplest is chosen,
// since two measurements of one configuration differ by as much.
const (
	tuneWindow     = 400 * time.Millisecond
	tuneWindows    = 3
	tuneLongestRun = time.Second // a batch that would take longer makes everybody wait
	tuneSeed       = 1
	tie            = 0.03
	finalists      = 3 // that are measured again, in turns, beside the default
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
	reference []MeasuredOutput
	progress  func(Candidate)
	tried     []Candidate
	finalists []Candidate // that were measured again, the fastest first
	notFrozen string      // what is wrong with the model itself
}

// Tune measures configurations of a model, each in a runner of its own, one after the other, and stores the fastest one whose
// answers agree with the reference, which is the model as it is without oneDNN. The next load of the model uses it.
// progress is called with each candidate, in the goroutine of the caller. The end of ctx ends the search at once and stores nothing.
//
// Faults: BadRequest for a signature that cannot be measured (strings, unknown dimensions, assigned variables); Unavailable
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
func (t *tuner) search(ctx context.Context, about *Tuning) error {
	// The reference comes first; without it nothing can be compared.
	plain := t.standard
	plain.OneDNN = false
	sizes := t.sizes
	if t.options.Quick {
		sizes = sizes[:1]
	}
	if err := t.try(ctx, plain, sizes); err != nil {
		return err
	}
	if t.tried[0].Reason != "" {
		return fault.New(fault.BadRequest, "%s", t.tried[0].Reason)
	}
	if err := t.try(ctx, t.standard, t.sizes); err != nil {
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
	if t.options.Quick {
		err = t.quick(ctx, frozen)
	} else {
		err = t.full(ctx, frozen)
	}
	if err != nil {
		return err
	}
	if err := t.finals(ctx); err != nil {
		return err
	}
	t.conclude(about)
	return nil
}

// full tries all combinations.
func (t *tuner) full(ctx context.Context, frozen string) error {
	for _, graph := range slices.Compact([]string{"", frozen}) {
		for _, threads := range t.threads() {
			for _, on := range []bool{true, false} {
				if err := t.try(ctx, Choice{Frozen: graph, OneDNN: on, Cores: threads[0], BatchThreads: threads[1]}, t.sizes); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// quick asks one question after the other, each of the best configuration so far: without oneDNN, frozen with and without, and
// with other threads; all with the batch size that is best for the default.
func (t *tuner) quick(ctx context.Context, frozen string) error {
	size := []int{t.best()[0].BatchSize}
	for _, graph := range slices.Compact([]string{"", frozen}) {
		for _, on := range []bool{true, false} {
			choice := t.standard
			choice.Frozen, choice.OneDNN = graph, on
			if err := t.try(ctx, choice, size); err != nil {
				return err
			}
		}
	}
	for _, threads := range t.threads() {
		choice := t.best()[0].Choice
		choice.Cores, choice.BatchThreads = threads[0], threads[1]
		if err := t.try(ctx, choice, size); err != nil {
			return err
		}
	}
	return nil
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
	sizes = slices.DeleteFunc(slices.Clone(sizes), func(size int) bool {
		choice := choice
		choice.BatchSize = size
		return slices.ContainsFunc(t.tried, func(c Candidate) bool { return c.Choice == choice })
	})
	fixed, set := os.LookupEnv(oneDNN)
	asked := slices.ContainsFunc(t.tried, func(c Candidate) bool {
		return c.Frozen == choice.Frozen && c.OneDNN == choice.OneDNN && c.Cores == choice.Cores && c.BatchThreads == choice.BatchThreads
	})
	if len(sizes) == 0 || asked && len(sizes) > 1 || set && t.reference != nil && choice.OneDNN != (fixed != "0") { // whoever set the variable has decided
		return nil
	}
	found, answers, err := t.run(ctx, choice, sizes, tuneWindows)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		t.note(Candidate{Choice: choice, Reason: err.Error()})
		return nil
	}
	if t.reference == nil {
		t.reference = answers
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

// best returns the candidates that agree, the fastest first.
func (t *tuner) best() []Candidate {
	list := slices.DeleteFunc(slices.Clone(t.tried), func(c Candidate) bool { return !c.Agrees || c.Reason != "" })
	slices.SortStableFunc(list, func(a, b Candidate) int { return -cmp.Compare(a.RowsPerSecond, b.RowsPerSecond) })
	return list
}

// finals measures the fastest few and the default again, in turns, since a machine that others use slows down for a while
// at a time. The median of these rounds counts.
func (t *tuner) finals(ctx context.Context) error {
	list := t.best()
	rounds, first := 3, finalists
	if t.options.Quick {
		rounds, first = 2, finalists-1
	}
	again := slices.Clone(list[:min(first, len(list))])
	var standard []Candidate // the default, with the largest of its fastest batch sizes
	for _, c := range list {
		if t.deviation(c.Choice) == 0 && (standard == nil || c.RowsPerSecond >= (1-tie)*standard[0].RowsPerSecond) {
			standard = append(standard, c)
		}
	}
	if standard != nil {
		again = append(again, slices.MaxFunc(standard, func(a, b Candidate) int { return cmp.Compare(a.BatchSize, b.BatchSize) }))
	}
	slices.SortFunc(again, func(a, b Candidate) int { return cmp.Compare(fmt.Sprint(a.Choice), fmt.Sprint(b.Choice)) })
	again = slices.CompactFunc(again, func(a, b Candidate) bool { return a.Choice == b.Choice })
	speeds := make([][]float64, len(again)) // without the first ones, which made them finalists by good luck, too
	for range rounds {
		for i, c := range again {
			found, _, err := t.run(ctx, c.Choice, []int{c.BatchSize}, tuneWindows)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err == nil && len(found) == 1 {
				speeds[i] = append(speeds[i], found[0].Median)
			}
		}
	}
	for i, c := range again {
		if len(speeds[i]) == 0 {
			speeds[i] = []float64{c.RowsPerSecond}
		}
		slices.Sort(speeds[i])
		at := slices.IndexFunc(t.tried, func(other Candidate) bool { return other.Choice == c.Choice })
		t.tried[at].RowsPerSecond = (speeds[i][(len(speeds[i])-1)/2] + speeds[i][len(speeds[i])/2]) / 2 // the median
		again[i] = t.tried[at]
	}
	slices.SortStableFunc(again, func(a, b Candidate) int { return -cmp.Compare(a.RowsPerSecond, b.RowsPerSecond) })
	t.finalists = again
	return nil
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

// conclude chooses.
func (t *tuner) conclude(about *Tuning) {
	list := t.finalists // who was measured once and had luck is no winner
	for _, c := range list {
		if t.deviation(c.Choice) == 0 {
			about.Default = c
			break
		}
	}
	about.Chosen = list[0]
	for _, c := range list[1:] {
		simpler := cmp.Or(-cmp.Compare(t.deviation(c.Choice), t.deviation(about.Chosen.Choice)), cmp.Compare(c.BatchSize, about.Chosen.BatchSize))
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
	slices.SortStableFunc(about.Candidates, func(a, b Candidate) int { return -cmp.Compare(a.RowsPerSecond, b.RowsPerSecond) })
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
	slices.Sort(ratios)
	return ratios[len(ratios)/2]
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
		at = func(b []byte) float64 {
			return float64(math.Float32frombits(uint32(binary.LittleEndian.Uint16(b)) << 16))
		}
	case savedmodel.Float16:
		at = func(b []byte) float64 { return half(binary.LittleEndian.Uint16(b)) }
	default:
		return nil, false
	}
	list := make([]float64, len(o.Data)/size)
	for i := range list {
		list[i] = at(o.Data[i*size:])
	}
	return list, true
}

// half returns the value of an IEEE 754 binary16.
func half(bits uint16) float64 {
	sign, exponent, fraction := 1.0, int(bits>>10&31), float64(bits&1023)
	if bits>>15 != 0 {
		sign = -1
	}
	switch exponent {
	case 0:
		return sign * math.Ldexp(fraction, -24)
	case 31:
		if fraction != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	}
	return sign * math.Ldexp(1024+fraction, exponent-25)
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
	args := []string{"-m", "flightsvc.freeze", t.model.Dir, out}
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

// idleTime is how long nothing may happen before an idle cache measures.
const idleTime = 10 * time.Second

// idleTuning tunes while nobody uses a model. It belongs to one goroutine.
type idleTuning struct {
	cache  *Cache
	busy   time.Time          // when somebody last used a model
	cancel context.CancelFunc // of the search under way
	done   chan struct{}      // closed when that is over
}

// look begins a search when nobody has used a model for long enough, and ends it when somebody does.
func (t *idleTuning) look(now time.Time) {
	if t.cache.Busy() {
		t.busy = now
		t.stop()
		return
	}
	if now.Sub(t.busy) < idleTime {
		return
	}
	if t.done != nil {
		select {
		case <-t.done:
			t.busy = now // not at once again
			t.stop()
		default:
		}
		return
	}
	ctx, cancel := context.WithCancel(t.cache.ctx)
	done := make(chan struct{})
	t.cancel, t.done = cancel, done
	t.cache.working.Go(func() {
		defer close(done)
		t.cache.tuneIdle(ctx)
	})
}

// stop ends the search under way; its process is gone soon after.
func (t *idleTuning) stop() {
	if t.cancel != nil {
		t.cancel()
		t.cancel, t.done = nil, nil
	}
}

// tuneIdle tunes what is in memory and was not tuned on a machine of this kind, one model after the other. The end of ctx ends
// the search under way, which then starts anew another time.
func (c *Cache) tuneIdle(ctx context.Context) {
	for _, status := range c.Status() {
		if status.State != StateReady || ctx.Err() != nil {
			continue
		}
		model, err := c.Resolve(ctx, status.Model, status.Version)
		if err != nil || model.Dir == "" {
			continue
		}
		digest, err := c.digest(ctx, model)
		if err != nil {
			continue
		}
		if _, tuned := c.profiles.read(digest).Tuned[Machine()]; tuned {
			continue
		}
		if _, failed := c.untunable.Load(digest); failed {
			continue
		}
		about, err := c.Tune(ctx, model, TuneOptions{Quick: true}, func(Candidate) {})
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			c.untunable.Store(digest, true)
			c.options.Log.Info("model cannot be tuned", zap.String("model", model.Ref), zap.Error(err))
		default:
			c.options.Log.Info("model tuned", zap.String("model", model.Ref), zap.Any("choice", about.Chosen.Choice), zap.Float64("relative", about.Chosen.Relative))
		}
	}
}
