// Runners for tests of policy: they are no processes, and report what the test says.

package modelcache

import (
	"context"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// fakeRunners starts runners that are no processes: they report what a test has them report.
type fakeRunners struct {
	mu   sync.Mutex
	mode string // how the next ones behave
	all  []*fakeProcess
}

// Start is part of Starter.
func (f *fakeRunners) Start(_ context.Context, setup control.Setup, _, _ []string) (Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &fakeProcess{pid: len(f.all) + 1, setup: setup, reports: make(chan control.Report, 100),
		ended: make(chan struct{})}
	f.all = append(f.all, p)
	if setup.Replay != "" { // as a runner does before it is ready
		value := byte(1)
		if f.mode == "other answers" {
			value = 2
		}
		if err := sampleOf(value).Write(control.Replayed(setup.Replay)); err != nil {
			return nil, err
		}
	}
	switch f.mode {
	case "gated": // until the test calls ready
	case "dies":
		p.end("exit status 3")
	case "refuses":
		p.say(control.Report{Build: testBuild, Error: "model m cannot be loaded: truncated", Kind: fault.BadRequest})
		p.end("exit status 1")
	case "no memory": // at the first start
		if len(f.all) == 1 {
			p.say(control.Report{Build: testBuild, Error: "the device has no memory for it", Kind: fault.Exhausted,
				NoMemory: true})
			p.end("exit status 1")
			break
		}
		p.ready()
	default:
		p.ready()
	}
	return p, nil
}

// sampleOf is a run whose answer is a number.
func sampleOf(value byte) control.Sample {
	return control.Sample{Outputs: []control.Tensor{
		{Name: "y", DType: savedmodel.Uint8, Shape: []int64{1}, Data: []byte{value}},
	}}
}

// fakeProcess is one of them.
type fakeProcess struct {
	pid     int
	setup   control.Setup
	reports chan control.Report

	mu    sync.Mutex
	how   string
	ended chan struct{}
}

func (p *fakeProcess) ready() {
	p.say(control.Report{Build: testBuild, TensorFlow: "none", Ready: true})
}

// say reports something. It is an error of the test to say so much that nobody hears it.
func (p *fakeProcess) say(report control.Report) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.how == "" {
		p.reports <- report
	}
}

// end ends the runner.
func (p *fakeProcess) end(how string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.how == "" {
		p.how = how
		close(p.reports)
		close(p.ended)
	}
}

func (p *fakeProcess) PID() int               { return p.pid }
func (p *fakeProcess) Stop()                  { p.end("exit status 0") }
func (p *fakeProcess) Kill()                  { p.end("signal: killed") }
func (p *fakeProcess) Memory() (int64, error) { return 100 << 20, nil }

func (p *fakeProcess) Report() (control.Report, error) {
	if report, ok := <-p.reports; ok {
		return report, nil
	}
	return control.Report{}, io.EOF
}

func (p *fakeProcess) Wait() string {
	<-p.ended
	return p.how
}

// behave makes the runners of a pool behave otherwise from the next start; see fakeRunners.Start.
func behave(cache *Cache, mode string) {
	f := cache.options.Runners.(*fakeRunners)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mode = mode
}

// started returns the runners that a pool has started.
func started(cache *Cache) []*fakeProcess {
	f := cache.options.Runners.(*fakeRunners)
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.all)
}

// newPool returns a cache of fake runners and a model for it.
func newPool(t *testing.T, mode string, change func(*Options)) (*Cache, repository.Model) {
	t.Helper()
	root := t.TempDir()
	expect.Write(t, filepath.Join(root, "m", savedmodel.File), expect.SavedModel())
	options := Options{
		Repository: repository.New(repository.Options{ModelRoot: root, CacheDir: filepath.Join(t.TempDir(), "cache"),
			Quiet: 1, Log: zap.NewNop()}),
		Profiles: tuning.NewProfiles(t.TempDir()), Folder: t.TempDir(), Runners: &fakeRunners{mode: mode},
		Build:       testBuild,
		LoadTimeout: time.Minute, LogLevel: "info", Log: zap.NewNop(),
	}
	if change != nil {
		change(&options)
	}
	cache := New(options)
	t.Cleanup(func() {
		cache.Close()
		options.Repository.Close()
		for _, p := range started(cache) {
			if p.how == "" {
				t.Errorf("the runner of model %s is still there", p.setup.Model)
			}
		}
	})
	model, err := cache.Resolve(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	return cache, model
}

// poolOf returns a cache of fake runners with room for a number of models, and its models a, b, c ...
func poolOf(t *testing.T, room, models int, change func(*Options)) (*Cache, []repository.Model) {
	t.Helper()
	cache, _ := newPool(t, "good", func(o *Options) {
		o.Memory = int64(room) * modelMemory
		if change != nil {
			change(o)
		}
	})
	list := make([]repository.Model, models)
	for i := range list {
		list[i] = add(t, cache, string(rune('a'+i)), `{"memory":"1GiB"}`)
	}
	return cache, list
}

// add makes a model of one version, with settings, and resolves it.
func add(t *testing.T, cache *Cache, name, settings string) repository.Model {
	t.Helper()
	base := filepath.Join(rootOf(t, cache), name)
	expect.Write(t, filepath.Join(base, "1", savedmodel.File), expect.SavedModel())
	expect.Write(t, filepath.Join(base, control.SettingsFile), settings)
	model, err := cache.Resolve(t.Context(), name, "")
	if err != nil {
		t.Fatal(err)
	}
	return model
}

// rootOf returns the model-root of a cache that newPool has made.
func rootOf(t *testing.T, cache *Cache) string {
	t.Helper()
	model, err := cache.Resolve(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(model.Dir)
}

// leaseOf makes a model ready and takes a lease.
func leaseOf(t *testing.T, cache *Cache, model repository.Model, id string) *Runner {
	t.Helper()
	runner, err := cache.Ready(t.Context(), model, "")
	if err != nil {
		t.Fatal(err)
	}
	if !runner.Leased(id, id, time.Now().Add(time.Hour)) {
		t.Fatalf("model %s gives no lease", model.Ref)
	}
	return runner
}

// tell makes a fake runner report something, and waits until the pool knows it.
func tell(t *testing.T, runner *Runner, line string) {
	t.Helper()
	report(runner, line)
	synctest.Wait()
}

// report makes a fake runner report something.
func report(runner *Runner, line string) {
	verb, lease, _ := strings.Cut(line, " ")
	rows, _ := strconv.Atoi(lease)
	about, ok := map[string]control.Report{
		"open":   {Opened: lease},
		"close":  {Closed: lease, Counts: &control.Counts{Rows: 70, Runs: 7, JoinedRuns: 3, Queued: 5}},
		"rest":   {Resting: lease},
		"stir":   {Stirring: lease},
		"answer": {Answered: true},
		"fits":   {DeviceBatch: rows},
	}[verb]
	if !ok {
		panic("no report " + line)
	}
	runner.process.(*fakeProcess).say(about)
}

// Interface guards.
var (
	_ Starter = (*fakeRunners)(nil)
	_ Process = (*fakeProcess)(nil)
)
