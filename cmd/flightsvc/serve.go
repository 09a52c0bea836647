// Serving: the command serve, from its settings to the end of the last stream.

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"flightsvc/gpu"
	"flightsvc/handlers"
	"flightsvc/handlers/front"
	"flightsvc/internal/build"
	"flightsvc/internal/config"
	"flightsvc/internal/logging"
	"flightsvc/internal/protocol"
	"flightsvc/internal/rundir"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// frontSocket is the name of the front's socket in its folder.
const frontSocket = "front.sock"

// idleTick is how often a detached front checks whether it is idle.
const idleTick = 500 * time.Millisecond

// serve runs the front until a signal arrives, its owner ends, it is idle or it is asked to shut down, and then removes
// its files.
func serve(settings config.Serve) (err error) {
	log, err := logging.New(settings.LogLevel, "front")
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(context.Background())
	defer end(nil)

	if settings.Owner != "" {
		owner, err := rundir.ParseProcess(settings.Owner)
		if err != nil {
			return err
		}
		defer func() {
			if context.Cause(ctx) == errOwnerEnded {
				removeDriver(os.TempDir(), owner)
			}
		}()
		if err := owner.Watch(ctx, settings.OwnerFD, func() { end(errOwnerEnded) }); err != nil {
			return err
		}
	}
	if settings.Child {
		// SIGPIPE: when the reader of standard output has ended, this process still has to clear up. SIGINT: Ctrl-C in
		// a notebook, which cancels a job there, reaches this process, too.
		signal.Ignore(syscall.SIGPIPE, syscall.SIGINT, syscall.SIGHUP)
		go untilEOF(os.Stdin, func() { end(errOwnerEnded) }) // reads for as long as this process lives
	}
	place, socket, err := claim(&settings)
	if err != nil {
		return err
	}
	defer func() {
		if rmErr := place.Release(); rmErr != nil && err == nil {
			err = fmt.Errorf("clear up: %w", rmErr)
		}
	}()
	devices := gpu.Open(gpu.Options{Visible: strings.Join(settings.GPUs, ","), Log: log})
	defer devices.Close()
	models, err := newModels(settings, place.Path, devices, log)
	if err != nil {
		return err
	}
	defer models.close()
	cache := models.cache

	listener, err := handlers.Listen(socket, log)
	if err != nil {
		return err
	}
	activity := &activity{}
	front := front.New(front.Options{
		Repository: models.repository, Cache: cache, Tuner: models.tuner, Version: build.Version, Build: build.ID(),
		Server: serverName(settings.Executor), Executor: settings.Executor,
		Shutdown: func() { end(errAsked) }, Log: log,
	})
	server := handlers.NewServer(front, log, grpc.StatsHandler(activity))
	healthy := health.NewServer()
	healthpb.RegisterHealthServer(server, healthy)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	if !settings.Child {
		signal.Notify(signals, syscall.SIGINT)
	}
	defer signal.Stop(signals)
	if os.Getenv(detachedVariable) != "" && settings.IdleTimeout > 0 {
		go watchIdle(ctx, settings.IdleTimeout, activity, cache, func() { end(errIdle) })
	}

	greeting := hello{Flightsvc: build.Version, Build: build.ID(), Endpoint: protocol.Scheme + socket, PID: os.Getpid()}
	if err := greeting.print(); err != nil {
		return fmt.Errorf("write handshake: %w", err)
	}
	if settings.Child {
		go report(ctx, cache, func() { end(errOwnerEnded) })
	}
	log.Info("serving", zap.String("endpoint", greeting.Endpoint), zap.String("version", greeting.Flightsvc),
		zap.String("build", greeting.Build), zap.String("model_root", settings.ModelRoot),
		zap.Int("cores", settings.Cores), zap.String("owner", settings.Owner))

	dropStartupPages()

	select {
	case err := <-served:
		return err
	case s := <-signals:
		end(fmt.Errorf("signal %s", s))
	case <-ctx.Done():
	}
	cause := context.Cause(ctx)
	log.Info("ending", zap.String("cause", cause.Error()))
	healthy.Shutdown()
	if cause != errOwnerEnded {
		drain(server, cache, settings.DrainTimeout, signals)
	}
	time.AfterFunc(endGrace, func() { giveUp(place, log) })
	server.Stop() // waits for handlers
	return nil
}

// endGrace bounds the rest of the shutdown after streams have been drained. It is longer than the 2 s after which a
// runner that does not end is killed.
const endGrace = 4 * time.Second

// giveUp ends this process although something hangs, for instance a file system that does not answer, or a runner whose
// child keeps its output open. The runners end with this process.
func giveUp(place *rundir.Folder, log *zap.Logger) {
	log.Error("the shutdown hangs, so the process ends without waiting for it")
	released := make(chan struct{})
	go func() {
		defer close(released)
		_ = place.Release() // waits while another process has the folder's lock to start a front
	}()
	select {
	case <-released:
	case <-time.After(time.Second):
	}
	os.Exit(exitFailed)
}

// Why a front ends, besides a signal.
var (
	errOwnerEnded = fmt.Errorf("the owner has ended")
	errAsked      = fmt.Errorf("asked by %s", "server.shutdown")
	errIdle       = fmt.Errorf("idle")
)

// claim takes the folder of the endpoint that is set, else a folder of its own below the run-dir, and removes the
// folders of dead fronts there. It sets settings.RunDir, and returns the folder and the path of the front's socket.
func claim(settings *config.Serve) (*rundir.Folder, string, error) {
	runDir, err := filepath.Abs(cmp.Or(settings.RunDir, rundir.Default()))
	if err != nil {
		return nil, "", err
	}
	settings.RunDir = runDir
	if err := rundir.Ensure(runDir); err != nil {
		return nil, "", fmt.Errorf("run-dir: %w", err)
	}
	if err := rundir.Sweep(runDir); err != nil {
		return nil, "", fmt.Errorf("run-dir: %w", err)
	}
	socket := filepath.Join(runDir, folderName(), frontSocket)
	if settings.Endpoint != "" {
		if socket, err = protocol.SocketPath(settings.Endpoint); err != nil {
			return nil, "", err
		}
	}
	if _, err := protocol.SocketPath(protocol.Scheme + socket); err != nil {
		return nil, "", err
	}
	place, err := rundir.Claim(runDir, filepath.Dir(socket))
	return place, socket, err
}

// folderName returns the name of the front's folder if no endpoint is set: 8 hex digits that stand for this process.
func folderName() string {
	self, err := rundir.Of(os.Getpid())
	if err != nil {
		self.PID = os.Getpid() // /proc cannot be read; rundir.Claim will report it
	}
	return nameOf(self)
}

// nameOf returns the 8 hex digits that stand for a process in names of folders.
func nameOf(process rundir.Process) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %d", process.PID, process.Start))
	return hex.EncodeToString(sum[:4])
}

// removeDriver removes the private folder of a driver (private_folder in shipping.py). A driver that was killed could
// not remove it.
func removeDriver(temporary string, driver rundir.Process) {
	// fails only for a malformed pattern
	folders, _ := filepath.Glob(filepath.Join(temporary, "flightsvc-driver-"+nameOf(driver)+"-*"))
	for _, folder := range folders {
		var about unix.Stat_t
		if err := unix.Lstat(folder, &about); err == nil && about.Uid == uint32(os.Geteuid()) &&
			about.Mode&unix.S_IFMT == unix.S_IFDIR {
			_ = os.RemoveAll(folder) // the next driver removes what is left
		}
	}
}

// models are the parts of a front that find, load and tune models.
type models struct {
	repository *repository.Repository
	cache      *modelcache.Cache
	tuner      *tuning.Tuner
	close      func()
}

func newModels(settings config.Serve, folder string, devices *gpu.Inventory, log *zap.Logger) (*models, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	root := strings.TrimPrefix(settings.ModelRoot, "file://")
	if root != "" && !repository.IsURI(root) {
		if root, err = filepath.Abs(root); err != nil {
			return nil, err
		}
	}
	cacheDir, err := filepath.Abs(cmp.Or(settings.CacheDir, rundir.CacheDir(settings.RunDir)))
	if err != nil {
		return nil, err
	}
	library, cores := library(settings.Libtensorflow, settings.Python), cmp.Or(settings.Cores, runtime.GOMAXPROCS(0))
	profiles := tuning.NewProfiles(cacheDir)
	m := &models{}
	m.repository = repository.New(repository.Options{
		ModelRoot: root, CacheDir: cacheDir, CacheBytes: int64(settings.CacheSize), PollInterval: settings.PollInterval,
		OpLibraries: settings.OpLibraries, Log: log,
	})
	m.cache = modelcache.New(modelcache.Options{
		Repository: m.repository,
		Profiles:   profiles,
		Folder:     folder,
		Runners: &modelcache.Programs{Binary: filepath.Join(filepath.Dir(self), "flightsvc-runner"),
			Library: library, Log: log},
		Build:          build.ID(),
		Server:         serverName(settings.Executor),
		Cores:          cores,
		MaxImagePixels: settings.MaxImagePixels,
		MaxImageBytes:  settings.MaxImageBytes,
		LogLevel:       settings.LogLevel,
		Memory:         cmp.Or(int64(settings.Memory), defaultMemory()),
		Devices:        devices,
		CPUFallback:    settings.AllowCPUFallback,
		KeepAlive:      settings.KeepAlive,
		PollInterval:   settings.PollInterval,
		LoadTimeout:    settings.LoadTimeout,
		Fold:           settings.Tune != config.TuneOff,
		Log:            log,
	})
	m.tuner = tuning.New(tuning.Options{
		Pool: m.cache, Repository: m.repository, Profiles: profiles, Cores: cores, Library: library,
		Python: freezer(settings.Python), OwnMemory: modelcache.OwnMemory, Log: log,
	})
	ctx, cancel := context.WithCancel(context.Background())
	var background sync.WaitGroup
	if settings.Tune != config.TuneOff {
		background.Go(func() { m.tuner.InBackground(ctx, settings.Tune == config.TuneQuick) })
	}
	m.close = func() {
		cancel()
		background.Wait()
		m.cache.Close()
		m.repository.Close()
	}
	return m, nil
}

// serverName returns the name of this server in answers and status: Spark's executor, if there is one, the host and the
// process id.
func serverName(executor string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	name := fmt.Sprintf("%s:%d", host, os.Getpid())
	if executor != "" {
		return "executor " + executor + " " + name
	}
	return name
}

// untilEOF calls gone when the other end of a pipe has been closed, as it is when its process ends.
func untilEOF(pipe io.Reader, gone func()) {
	_, _ = io.Copy(io.Discard, pipe)
	gone()
}

// reportInterval is how often a front with --child writes its counts.
const reportInterval = time.Second

// report writes the counts of the cache to standard output, as lines of JSON, until ctx ends. It calls gone if the
// reader has closed the pipe.
func report(ctx context.Context, cache *modelcache.Cache, gone func()) {
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	lines := json.NewEncoder(os.Stdout)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := lines.Encode(cache.Totals()); err != nil {
			gone()
			return
		}
	}
}

// drain waits until all streams have ended, the bound is over, or a second signal arrives. Meanwhile new calls are
// refused as Unavailable.
func drain(server *grpc.Server, cache *modelcache.Cache, bound time.Duration, signals <-chan os.Signal) {
	over := time.NewTimer(bound)
	defer over.Stop()
	stopped := make(chan struct{})
	go func() { // ends with server.Stop at the latest
		defer close(stopped)
		server.GracefulStop()
	}()
	tick := time.NewTicker(idleTick / 10)
	defer tick.Stop()
	for waiting := true; waiting; {
		select {
		case <-over.C:
			waiting = false
		case <-signals:
			waiting = false
		case <-tick.C:
			select {
			case <-stopped:
				waiting = cache.Streams() > 0
			default:
			}
		}
	}
}

// activity counts the calls under way and keeps the time of the last one, for watchIdle.
type activity struct {
	open atomic.Int64
	last atomic.Int64 // Unix nanoseconds
}

// watchIdle calls idle once no call, stream or load has been under way for the timeout.
func watchIdle(ctx context.Context, timeout time.Duration, calls *activity, cache *modelcache.Cache, idle func()) {
	tick := time.NewTicker(idleTick)
	defer tick.Stop()
	calls.touch()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if calls.open.Load() > 0 || cache.Busy() {
			calls.touch()
		}
		if time.Since(time.Unix(0, calls.last.Load())) > timeout {
			idle()
			return
		}
	}
}
