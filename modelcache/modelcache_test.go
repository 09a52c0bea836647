package modelcache

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// behave makes a name of this test's own binary a runner that behaves as mode says from its next start; see fakeRunner.
func behave(t *testing.T, binary, mode string) {
	t.Helper()
	expect.Write(t, binary+modeSuffix, mode)
}

const modeSuffix = ".mode"

func TestMain(m *testing.M) {
	if mode, err := os.ReadFile(os.Args[0] + modeSuffix); err == nil {
		fakeRunner(string(mode))
		os.Exit(0)
	}
	_ = flag.Set("test.parallel", "8")           // they wait more than they work
	_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // a fake runner under the race detector ends at once
	goleak.VerifyTestMain(m)
}

const testBuild = "build-1"

// fakeRunner speaks the protocol of flightsvc-runner without a model. Each start leaves a file <pid>.started in the
// folder of the model.
func fakeRunner(mode string) {
	input := bufio.NewReader(os.Stdin)
	line, _ := input.ReadBytes('\n')
	var setup control.Setup
	if err := json.Unmarshal(line, &setup); err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(setup.Dir, fmt.Sprint(os.Getpid(), ".started")), nil, 0o600); err != nil {
		panic(err)
	}
	say := func(report control.Report) { _ = json.NewEncoder(os.Stdout).Encode(report) }
	ready := control.Report{Build: testBuild, TensorFlow: "none", Ready: true}
	switch mode {
	case "measures":
		say(control.Report{Build: testBuild, Measured: []control.Measured{{BatchSize: setup.Measure.BatchSizes[0], Median: float64(setup.Cores)}}})
		return
	case "dies":
		os.Exit(3)
	case "hangs":
		// Neither speaks nor listens: not even the end of its input ends it.
		time.Sleep(time.Hour)
	case "mute":
		_ = os.Stdout.Close()
		time.Sleep(time.Hour)
	case "refuses":
		say(control.Report{Build: testBuild, Error: "model m cannot be loaded: truncated", Kind: fault.BadRequest})
		os.Exit(1)
	case "no memory": // at the first start
		if others, _ := filepath.Glob(filepath.Join(setup.Dir, "*.started")); len(others) == 1 {
			say(control.Report{Build: testBuild, Error: "the device has no memory for it", Kind: fault.Exhausted, NoMemory: true})
			os.Exit(1)
		}
	case "other build":
		ready.Build = "build-2"
	case "noisy":
		fmt.Println("a library says hello")
	case "gated": // loads until the test says go
		for {
			if _, err := os.Stat(filepath.Join(setup.Dir, "go")); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	listener, err := net.Listen("unix", setup.Socket)
	if err != nil {
		panic(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // the front clears up
	say(ready)
	for { // lines after the setup make it report a stream
		line, err := input.ReadString('\n')
		if err != nil {
			return
		}
		verb, lease, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch verb {
		case "open":
			say(control.Report{Opened: lease})
		case "close":
			say(control.Report{Closed: lease, Counts: &control.Counts{Rows: 70, Runs: 7, JoinedRuns: 3, Queued: 5}})
		case "rest":
			say(control.Report{Resting: lease})
		case "stir":
			say(control.Report{Stirring: lease})
		case "answer":
			say(control.Report{Answered: true})
		case "fits":
			rows, _ := strconv.Atoi(lease)
			say(control.Report{DeviceBatch: rows})
		}
	}
}

// newCache returns a cache of fake runners and a model for it. Closing the cache, at the latest at the end of the
// test, must leave no process and no socket.
func newCache(t *testing.T, mode string, change func(*Options)) (*Cache, repository.Model) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(t.TempDir(), "runner")
	if err := os.Symlink(self, binary); err != nil {
		t.Fatal(err)
	}
	behave(t, binary, mode)
	folder, err := os.MkdirTemp("/tmp", "fs-")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	expect.Write(t, filepath.Join(filepath.Join(root, "m"), savedmodel.File), expect.SavedModel())
	options := Options{
		Profiles: tuning.NewProfiles(t.TempDir()), Folder: folder, Binary: binary, Build: testBuild, LoadTimeout: time.Minute, LogLevel: "info",
		Library: func(context.Context) (string, error) { return "/lib", nil }, Log: zap.NewNop(),
	}
	if change != nil {
		change(&options)
	}
	if options.Repository == nil {
		options.Repository = repository.New(repository.Options{ModelRoot: root, CacheDir: t.TempDir(), Quiet: 1, Log: zap.NewNop()})
	}
	cache := New(options)
	model, err := cache.Resolve(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cache.Close()
		options.Repository.Close()
		if entries, err := os.ReadDir(folder); err != nil || len(entries) != 0 {
			t.Errorf("the folder holds %v, %v", entries, err)
		}
		_ = os.RemoveAll(folder)
		for _, pid := range started(t, model) {
			if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
				t.Errorf("runner %d is still there: %v", pid, err)
			}
		}
	})
	return cache, model
}

// started returns the processes that were started for a model.
func started(t *testing.T, model repository.Model) []int {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(model.Dir, "*.started"))
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range entries {
		var pid int
		if _, err := fmt.Sscan(strings.TrimSuffix(filepath.Base(path), ".started"), &pid); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func TestOneLoadForAllCallers(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "gated", nil)
	first, leave := context.WithCancel(context.Background())
	left := make(chan error, 1)
	go func() {
		_, err := cache.Ready(first, model, "")
		left <- err
	}()
	expect.Eventually(t, "the load has begun", func() bool { return len(started(t, model)) == 1 })
	runners := make(chan *Runner, 50)
	var working sync.WaitGroup
	for range cap(runners) {
		working.Go(func() {
			runner, err := cache.Ready(context.Background(), model, "")
			if err != nil {
				t.Error(err)
			}
			runners <- runner
		})
	}
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller that left got %v", err)
	}
	if _, ok := cache.Loaded(model, ""); ok || !cache.Busy() || cache.Status()[0].State != StateLoading {
		t.Errorf("while it loads the status is %+v", cache.Status())
	}
	expect.Write(t, filepath.Join(model.Dir, "go"), "")
	working.Wait()
	one := <-runners
	for range cap(runners) - 1 {
		if other := <-runners; other != one {
			t.Fatal("two callers have two runners")
		}
	}
	if pids := started(t, model); len(pids) != 1 || pids[0] != one.PID() || !one.Alive() {
		t.Errorf("the processes %v were started, the runner is %d", pids, one.PID())
	}
	if got, ok := cache.Loaded(model, ""); !ok || got != one || cache.Busy() {
		t.Errorf("loaded %v, %t; the status is %+v", got, ok, cache.Status())
	}
	want := protocol.ModelStatus{Model: "m", Version: "1", Dir: model.Dir, State: StateReady, PID: one.PID()}
	got := cache.Status()
	if len(got) == 1 { // what depends on the machine
		want.Memory, want.Reserved, want.Digest = got[0].Memory, got[0].Reserved, got[0].Digest
	}
	if len(got) != 1 || got[0] != want {
		t.Errorf("the status is %+v, want %+v", got, want)
	}
	if info, err := os.Stat(strings.TrimPrefix(one.Endpoint(), "grpc+unix://")); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Errorf("the endpoint %s: %v", one.Endpoint(), err)
	}
}

func TestDeadRunnerIsReplaced(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "good", nil)
	for range 3 {
		runner, err := cache.Ready(context.Background(), model, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := runner.Client(); err != nil {
			t.Fatal(err)
		}
		runner.Leased("l", "", time.Now().Add(time.Hour))
		if err := syscall.Kill(runner.PID(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		expect.Eventually(t, "the end is known", func() bool { return !runner.Alive() })
		if _, ok := cache.Loaded(model, ""); ok || cache.Busy() || len(cache.Status()) != 0 {
			t.Errorf("a dead runner is counted: %+v", cache.Status())
		}
		cache.Pardon(model)
		runner.Close() // a second end does no harm
	}
	if n := len(started(t, model)); n != 3 {
		t.Errorf("%d processes were started, want 3", n)
	}
}

func TestLoadFails(t *testing.T) {
	for mode, c := range map[string]struct {
		change func(*Options)
		kind   fault.Kind
		parts  []string
	}{
		"dies":        {nil, fault.Internal, []string{"model m", "its runner ended while loading (exit status 3)", "log"}},
		"mute":        {nil, fault.Internal, []string{"model m", "its runner ended while loading (signal: killed)"}},
		"refuses":     {nil, fault.BadRequest, []string{"model m cannot be loaded: truncated"}},
		"other build": {nil, fault.Precondition, []string{"flightsvc-runner is build build-2, flightsvc is build build-1", "one release"}},
		"hangs":       {func(o *Options) { o.LoadTimeout = 200 * time.Millisecond }, fault.Deadline, []string{"model m: not loaded within 200ms (load-timeout)"}},
		"no library": {func(o *Options) {
			o.Library = func(context.Context) (string, error) { return "", errors.New("run pip install") }
		}, fault.Precondition, []string{"model m: run pip install"}},
		"no binary": {func(o *Options) { o.Binary = "/nope/flightsvc-runner" }, fault.Precondition, []string{"model m: start /nope/flightsvc-runner"}},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			cache, model := newCache(t, mode, c.change)
			_, err := cache.Ready(context.Background(), model, "")
			expect.Fault(t, err, c.kind, c.parts...)
			if status := cache.Status(); cache.Busy() || len(status) > 1 || len(status) == 1 && status[0].State != StateFailed {
				t.Errorf("after a failure the status is %+v", status)
			}
			for _, pid := range started(t, model) {
				if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
					t.Errorf("runner %d is still there: %v", pid, err)
				}
			}
			if mode == "dies" || mode == "refuses" { // a failure does not stand in the way of another try
				behave(t, cache.options.Binary, "good")
				if _, err := cache.Ready(context.Background(), model, ""); err != nil {
					t.Errorf("the next try: %v", err)
				}
			}
		})
	}
}

func TestNoiseIsNoHandshake(t *testing.T) {
	cache, model := newCache(t, "noisy", func(o *Options) { o.LoadTimeout = 10 * time.Second })
	if _, err := cache.Ready(context.Background(), model, ""); err != nil {
		t.Error(err)
	}
}

func TestPins(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "good", nil)
	runner, err := cache.Ready(context.Background(), model, "")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	pins := func(at time.Time) string { return fmt.Sprint(runner.Pins(at)) }
	runner.Leased("a", "", now.Add(time.Minute))
	runner.Leased("b", "", now.Add(time.Second))
	if got := pins(now); got != "0 2" || !cache.Busy() {
		t.Errorf("two leases are %s", got)
	}
	if got := pins(now.Add(3 * time.Second)); got != "0 1" {
		t.Errorf("with one expired they are %s", got)
	}
	tell := func(line string) {
		if _, err := fmt.Fprintln(runner.stdin, line); err != nil {
			t.Fatal(err)
		}
	}
	tell("open a")
	expect.Eventually(t, "a stream is open", func() bool { return pins(now) == "1 0" })
	if !cache.Busy() || cache.Streams() != 1 || cache.Status()[0].Streams != 1 {
		t.Errorf("with a stream the status is %+v", cache.Status())
	}
	runner.Leased("a", "", now.Add(time.Minute)) // the front was slower than the client
	if got := pins(now); got != "1 0" {
		t.Errorf("a lease noted late counts twice: %s", got)
	}
	tell("open x") // a lease that the front has not noted yet
	expect.Eventually(t, "two streams are open", func() bool { return pins(now) == "2 0" })
	tell("close a")
	tell("close x")
	expect.Eventually(t, "the streams are closed", func() bool { return pins(now) == "0 0" })
	if cache.Busy() || cache.Streams() != 0 {
		t.Errorf("at rest the status is %+v", cache.Status())
	}
	if string(runner.Key()) == "" || len(runner.Key()) < 32 {
		t.Errorf("a key of %d bytes", len(runner.Key()))
	}
}

func TestCloseEndsWhatLoads(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "hangs", nil)
	failed := make(chan error, 1)
	go func() {
		_, err := cache.Ready(context.Background(), model, "")
		failed <- err
	}()
	expect.Eventually(t, "the load has begun", func() bool { return len(started(t, model)) == 1 })
	cache.Close()
	expect.Fault(t, <-failed, fault.Unavailable, "this server is ending")
	_, err := cache.Ready(context.Background(), model, "")
	expect.Fault(t, err, fault.Unavailable, "this server is ending")
}

func TestRunnerEnvironment(t *testing.T) {
	got := strings.Join(runnerEnv([]string{"A=1", "AWS_SECRET_ACCESS_KEY=s", "AZURE_STORAGE_KEY=s", "GOOGLE_APPLICATION_CREDENTIALS=s", "CUDA_VISIBLE_DEVICES=0,1", "LD_LIBRARY_PATH=/old:/older", "B=x=y"},
		"/lib", []string{"TF_ENABLE_ONEDNN_OPTS=0"}, []string{"CUDA_VISIBLE_DEVICES=-1"}), " ")
	if got != "TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=1 TF_ENABLE_ONEDNN_OPTS=0 A=1 CUDA_VISIBLE_DEVICES=0,1 LD_LIBRARY_PATH=/old:/older B=x=y CUDA_VISIBLE_DEVICES=-1 LD_LIBRARY_PATH=/lib:/old:/older" {
		t.Error(got)
	}
	// The last of two entries is the one that counts.
	cmd := exec.Command("sh", "-c", "echo $TF_CPP_MIN_LOG_LEVEL $TF_ENABLE_ONEDNN_OPTS")
	cmd.Env = runnerEnv([]string{"TF_CPP_MIN_LOG_LEVEL=0"}, "/lib", nil, nil)
	if out, err := cmd.Output(); err != nil || string(out) != "0 1\n" {
		t.Errorf("a runner's environment says %q, %v", out, err)
	}
}

func TestLibraryFolders(t *testing.T) {
	site := t.TempDir() // another environment's site-packages
	for _, folder := range []string{"tensorflow", "nvidia/cudnn/lib", "nvidia/cublas/lib", "nvidia/cuda_nvcc/bin"} {
		if err := os.MkdirAll(filepath.Join(site, folder), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	library := filepath.Join(site, "tensorflow")
	if err := os.WriteFile(filepath.Join(library, LibraryFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	links := t.TempDir()
	if err := os.Symlink(filepath.Join(library, LibraryFile), filepath.Join(links, LibraryFile)); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{library, links} {
		want := []string{folder, filepath.Join(site, "nvidia/cublas/lib"), filepath.Join(site, "nvidia/cudnn/lib")}
		if got := libraryFolders(folder); !slices.Equal(got, want) {
			t.Errorf("for %s: %q, want %q", folder, got, want)
		}
	}
	if got := libraryFolders("/nowhere"); !slices.Equal(got, []string{"/nowhere"}) {
		t.Error(got)
	}
}

func TestUnload(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "good", nil)
	unload := func() error {
		version, err := cache.Unload(t.Context(), "m", "")
		if version != "1" {
			t.Errorf("the version is %q", version)
		}
		return err
	}
	if err := unload(); err != nil {
		t.Errorf("a model that is not in memory: %v", err)
	}
	_, err := cache.Unload(t.Context(), "nope", "")
	expect.Fault(t, err, fault.NotFound, "model nope")

	runner, err := cache.Ready(context.Background(), model, "")
	if err != nil {
		t.Fatal(err)
	}
	runner.Leased("a", "", time.Now().Add(time.Hour))
	expect.Fault(t, unload(), fault.Precondition, "model m, version 1", "0 open streams and 1 leases")
	if _, err := fmt.Fprintln(runner.stdin, "open a"); err != nil {
		t.Fatal(err)
	}
	expect.Eventually(t, "a stream is open", func() bool { streams, _ := runner.Pins(time.Now()); return streams == 1 })
	expect.Fault(t, unload(), fault.Precondition, "1 open streams and 0 leases", "when they have ended")
	if _, err := fmt.Fprintln(runner.stdin, "close a"); err != nil {
		t.Fatal(err)
	}
	expect.Eventually(t, "the stream is closed", func() bool { streams, _ := runner.Pins(time.Now()); return streams == 0 })
	if s := cache.Status()[0]; s.Runs != 7 || s.JoinedRuns != 3 {
		t.Errorf("the runner reported 7 runs, 3 of them joined; the status is %+v", s)
	}
	if total := cache.Totals(); total.Rows != 70 || total.Batches != 7 || total.Queued != 5 || total.Models != 1 || total.Memory == 0 {
		t.Errorf("the runner reported 70 rows, 7 runs and 5 rows that wait; the totals are %+v", total)
	}
	if err := unload(); err != nil || runner.Alive() || len(cache.Status()) != 0 {
		t.Errorf("%v; the status is %+v", err, cache.Status())
	}
	if total := cache.Totals(); total.Rows != 70 || total.Batches != 7 || total.Queued != 0 || total.Models != 0 {
		t.Errorf("what was done stays done when the runner has ended, and nothing waits; the totals are %+v", total)
	}
	if runner.Leased("b", "", time.Now().Add(time.Hour)) {
		t.Error("a runner that has ended takes a lease")
	}

	// A model whose folder has gone is still known by the name it was loaded with.
	if _, err := cache.Ready(context.Background(), model, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(model.Dir, savedmodel.File)); err != nil {
		t.Fatal(err)
	}
	if err := unload(); err != nil || len(cache.Status()) != 0 {
		t.Errorf("%v; the status is %+v", err, cache.Status())
	}
}

func TestUnloadWhileLoading(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "gated", nil)
	loaded := make(chan error, 1)
	go func() {
		_, err := cache.Ready(context.Background(), model, "")
		loaded <- err
	}()
	expect.Eventually(t, "the load has begun", func() bool { return len(started(t, model)) == 1 })
	_, err := cache.Unload(t.Context(), "m", "1")
	expect.Fault(t, err, fault.Precondition, "it is being loaded")
	expect.Write(t, filepath.Join(model.Dir, "go"), "")
	if err := <-loaded; err != nil {
		t.Error(err)
	}
}

// TestUnloadGrantsNoLeaseOnTheWayOut races callers with unloads: whoever gets a lease has a runner that lives.
func TestUnloadGrantsNoLeaseOnTheWayOut(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "good", nil)
	var working sync.WaitGroup
	for caller := range 4 {
		working.Go(func() {
			for turn := range 10 {
				runner, err := cache.Ready(context.Background(), model, "")
				if err != nil {
					t.Error(err)
					return
				}
				id := fmt.Sprint(caller, "-", turn)
				if !runner.Leased(id, "", time.Now().Add(time.Hour)) {
					continue
				}
				if !runner.Alive() {
					t.Error("a lease was granted for a runner that has ended")
				}
				runner.note(control.Report{Opened: id})
				if _, err := cache.Unload(t.Context(), "m", ""); err == nil {
					t.Error("unloaded under an open stream")
				}
				runner.note(control.Report{Closed: id})
				if _, err := cache.Unload(t.Context(), "m", ""); err != nil {
					expect.Fault(t, err, fault.Precondition)
				}
			}
		})
	}
	working.Wait()
}
