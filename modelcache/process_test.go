// Tests with real processes: start, handshake, crash, kill.

package modelcache

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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

// behaveAs makes a name of this test's own binary a runner that behaves as mode says from its next start; see
// fakeRunner.
func behaveAs(t *testing.T, binary, mode string) {
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
		say(control.Report{Build: testBuild, Measured: []control.Measured{{BatchSize: setup.Measure.BatchSizes[0],
			Median: float64(setup.Threads)}}})
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
	case "explains": // at more length than bufio.Scanner takes
		say(control.Report{Build: testBuild, Error: "model m cannot be loaded: " + strings.Repeat("why", 100_000),
			Kind: fault.BadRequest})
		os.Exit(1)
	case "other build":
		ready.Build = "build-2"
	case "noisy":
		fmt.Println("a library says hello")
		fmt.Println(strings.Repeat("and more", maxReport/4))
	}
	listener, err := net.Listen("unix", setup.Socket)
	if err != nil {
		panic(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // the front clears up
	say(ready)
	_, _ = io.Copy(io.Discard, input)
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
	behaveAs(t, binary, mode)
	folder, err := os.MkdirTemp("/tmp", "fs-")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	expect.Write(t, filepath.Join(root, "m", savedmodel.File), expect.SavedModel())
	options := Options{
		Repository: repository.New(repository.Options{ModelRoot: root, CacheDir: t.TempDir(), Quiet: 1,
			Log: zap.NewNop()}),
		Profiles: tuning.NewProfiles(t.TempDir()), Folder: folder, Build: testBuild, LoadTimeout: time.Minute,
		LogLevel: "info",
		Runners: &Programs{Binary: binary, Library: func(context.Context) (string, error) { return "/lib", nil },
			Log: zap.NewNop()}, Log: zap.NewNop(),
	}
	if change != nil {
		change(&options)
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
		allEnded(t, model)
	})
	return cache, model
}

// allEnded fails the test if a process that was started for a model is still there.
func allEnded(t *testing.T, model repository.Model) {
	t.Helper()
	for _, pid := range pids(t, model) {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("runner %d is still there: %v", pid, err)
		}
	}
}

// pids returns the processes that were started for a model.
func pids(t *testing.T, model repository.Model) []int {
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

func TestDeadRunnerIsReplaced(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "good", nil)
	for range 3 {
		runner, err := cache.Ready(context.Background(), model, "")
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(strings.TrimPrefix(runner.Endpoint(), "grpc+unix://")); err != nil ||
			info.Mode().Type() != os.ModeSocket {
			t.Errorf("the endpoint %s: %v", runner.Endpoint(), err)
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
	if n := len(pids(t, model)); n != 3 {
		t.Errorf("%d processes were started, want 3", n)
	}
}

func TestLoadFails(t *testing.T) {
	for mode, c := range map[string]struct {
		change func(*Options)
		kind   fault.Kind
		parts  []string
	}{
		"dies":     {nil, fault.Internal, []string{"model m", "its runner ended while loading (exit status 3)", "log"}},
		"mute":     {nil, fault.Internal, []string{"model m", "its runner ended while loading (signal: killed)"}},
		"explains": {nil, fault.BadRequest, []string{"model m cannot be loaded: whywhy"}},
		"refuses":  {nil, fault.BadRequest, []string{"model m cannot be loaded: truncated"}},
		"other build": {nil, fault.Precondition, []string{"flightsvc-runner is build build-2, flightsvc is build " +
			"build-1", "one release"}},
		"hangs": {func(o *Options) { o.LoadTimeout = 200 * time.Millisecond }, fault.Deadline,
			[]string{"model m: not loaded within 200ms (load-timeout)"}},
		"no library": {func(o *Options) {
			failing := func(context.Context) (string, error) { return "", errors.New("run pip install") }
			o.Runners.(*Programs).Library = failing
		}, fault.Precondition, []string{"model m: run pip install"}},
		"no binary": {func(o *Options) { o.Runners.(*Programs).Binary = "/nope/flightsvc-runner" }, fault.Precondition,
			[]string{"model m: start /nope/flightsvc-runner"}},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			cache, model := newCache(t, mode, c.change)
			_, err := cache.Ready(context.Background(), model, "")
			expect.Fault(t, err, c.kind, c.parts...)
			if status := cache.Status(); cache.Busy() || len(status) > 1 || len(status) == 1 &&
				status[0].State != StateFailed {
				t.Errorf("after a failure the status is %+v", status)
			}
			allEnded(t, model)
			if mode == "dies" || mode == "refuses" { // a failure does not stand in the way of another try
				behaveAs(t, cache.options.Runners.(*Programs).Binary, "good")
				if _, err := cache.Ready(context.Background(), model, ""); err != nil {
					t.Errorf("the next try: %v", err)
				}
			}
		})
	}
}

// TestMeasureAProcess lets a runner measure beside those that serve, and end.
func TestMeasureAProcess(t *testing.T) {
	t.Parallel()
	cache, model := newCache(t, "measures", nil)
	report, err := cache.Measure(t.Context(), model, protocol.Choice{Cores: 3},
		control.Measurement{BatchSizes: []int{4}})
	if want := []control.Measured{{BatchSize: 4, Median: 3}}; err != nil || !slices.Equal(report.Measured, want) {
		t.Errorf("measured %v, %v", report.Measured, err)
	}
	for mode, part := range map[string]string{"dies": "ended while it was measured (exit status 3)",
		"explains": "cannot be loaded: why", "hangs": ""} {
		behaveAs(t, cache.options.Runners.(*Programs).Binary, mode)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if mode == "hangs" {
			expect.Write(t, filepath.Join(model.Dir, "again"), "")
			time.AfterFunc(200*time.Millisecond, cancel)
		}
		_, err := cache.Measure(ctx, model, protocol.Choice{}, control.Measurement{})
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v", mode, err)
		}
		cancel()
	}
	if held := cache.Memory().Reserved; held != 0 {
		t.Errorf("%d bytes are reserved", held)
	}
}

func TestNoiseIsNoHandshake(t *testing.T) {
	cache, model := newCache(t, "noisy", func(o *Options) { o.LoadTimeout = 10 * time.Second })
	if _, err := cache.Ready(context.Background(), model, ""); err != nil {
		t.Error(err)
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
	expect.Eventually(t, "the load has begun", func() bool { return len(pids(t, model)) == 1 })
	cache.Close()
	expect.Fault(t, <-failed, fault.Unavailable, "this server is ending")
	_, err := cache.Ready(context.Background(), model, "")
	expect.Fault(t, err, fault.Unavailable, "this server is ending")
}

func TestRunnerEnvironment(t *testing.T) {
	got := strings.Join(runnerEnv([]string{"A=1", "AWS_SECRET_ACCESS_KEY=s", "AZURE_STORAGE_KEY=s",
		"GOOGLE_APPLICATION_CREDENTIALS=s", "CUDA_VISIBLE_DEVICES=0,1", "LD_LIBRARY_PATH=/old:/older", "B=x=y"},
		"/lib", []string{"TF_ENABLE_ONEDNN_OPTS=0"}, []string{"CUDA_VISIBLE_DEVICES=-1"}), " ")
	if got != "TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=1 TF_ENABLE_ONEDNN_OPTS=0 A=1 CUDA_VISIBLE_DEVICES=0,1 "+
		"LD_LIBRARY_PATH=/old:/older B=x=y CUDA_VISIBLE_DEVICES=-1 LD_LIBRARY_PATH=/lib:/old:/older" {
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
	for _, file := range []string{"tensorflow/" + LibraryFile, "nvidia/cudnn/lib/a", "nvidia/cublas/lib/a",
		"nvidia/cuda_nvcc/bin/a"} {
		expect.Write(t, filepath.Join(site, file), "")
	}
	library := filepath.Join(site, "tensorflow")
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
