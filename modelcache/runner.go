package modelcache

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
)

// runnerGrace is how long a runner may take to end after its standard input has ended.
const runnerGrace = 2 * time.Second

// Runner is a process that has one model loaded and serves streams on its own socket.
type Runner struct {
	setup  control.Setup
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	ended  chan struct{} // closed when the process is gone and nothing of it is left
	events events
	log    *zap.Logger

	mu      sync.Mutex         // guards the fields below
	leases  map[string]lease   // that have not opened a stream
	streams map[string]*stream // open ones, by lease
	conn    *grpc.ClientConn   // for relaying; made on first use
	retired bool               // takes no lease any more
	closing bool               // the front ends it
	ready   bool
	counts  control.Counts // as last reported
}

// lease may still open a stream.
type lease struct {
	request string // its request_id
	expires time.Time
}

// stream is one that a runner has open.
type stream struct {
	request string
	resting bool // nothing has moved on it for StreamRest
}

// events are what a runner tells the Cache. They are called without a lock held, one after the other.
type events struct {
	warming  func()
	counted  func(more control.Counts) // what was done since the last such call; Queued may be negative
	moved    func()                    // a stream or a lease ended, or rests: others may get its memory
	answered func()                    // the first record batch was answered
	pressed  func()                    // the device has no memory for one row
	shrunk   func(rows int)            // the most rows of a run that fit into the device's memory
	ended    func(end)
}

// loadError is what a runner says of a model that it could not load.
type loadError struct {
	error
	noMemory bool // of the device
}

// start runs flightsvc-runner and waits until its model is ready. ctx bounds the wait. tuned and device
// are for runnerEnv. events.ended is called in any case, and last.
func start(ctx context.Context, options Options, setup control.Setup, tuned, device []string, events events) (*Runner, error) {
	setup.Key = []byte(rand.Text() + rand.Text())                             // 260 bits
	setup.Socket = filepath.Join(options.Folder, "r"+rand.Text()[:4]+".sock") // as long as front.sock: both fit or neither
	r := &Runner{
		setup:   setup,
		ended:   make(chan struct{}),
		events:  events,
		log:     options.Log.With(zap.String("model", setup.Model)),
		leases:  map[string]lease{},
		streams: map[string]*stream{},
	}
	handshake, err := r.run(ctx, options, tuned, device)
	if err != nil {
		events.ended(end{asked: true})
		return nil, err
	}
	select {
	case report := <-handshake:
		err = r.greet(report, options.Build)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// run starts the process and follows it.
func (r *Runner) run(ctx context.Context, options Options, tuned, device []string) (<-chan control.Report, error) {
	library, err := options.Library(ctx)
	if err != nil {
		return nil, fault.New(fault.Precondition, "model %s: %w", r.setup.Model, err)
	}
	line, err := json.Marshal(r.setup)
	if err != nil {
		return nil, err
	}
	r.cmd = exec.Command(options.Binary) //nolint:gosec // the binary lies beside our own
	r.cmd.Env = runnerEnv(os.Environ(), library, tuned, device)
	r.cmd.Stderr = os.Stderr
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, fault.New(fault.Precondition, "model %s: start %s: %w", r.setup.Model, options.Binary, err)
	}
	handshake := make(chan control.Report, 1)
	go r.follow(stdout, handshake)
	_, _ = r.stdin.Write(append(line, '\n')) // a runner that is gone already says why in its handshake, or not at all
	return handshake, nil
}

// runnerEnv passes the environment on with the library's folders in front of the search path, and
// with TensorFlow's settings that are ours: for all models, and as this one was tuned. What the environment says of them
// goes over that, since the last of two entries counts. Which device there is, the front alone says.
func runnerEnv(environ []string, library string, tuned, device []string) []string {
	env := append([]string{
		"TF_CPP_MIN_LOG_LEVEL=2",  // errors alone: libpng warns of many a picture
		"TF_ENABLE_ONEDNN_OPTS=1", // measured: EfficientNet-Lite0 runs 1.7 times as fast with AVX2
	}, tuned...)
	env = append(append(env, environ...), device...)
	// A model is a program: it does not see the credentials for stores.
	env = slices.DeleteFunc(env, func(entry string) bool {
		return strings.HasPrefix(entry, "AWS_") || strings.HasPrefix(entry, "GOOGLE_") || strings.HasPrefix(entry, "AZURE_")
	})
	search := libraryFolders(library)
	for _, entry := range environ {
		if path, ok := strings.CutPrefix(entry, "LD_LIBRARY_PATH="); ok {
			search = append(search, path)
		}
	}
	return append(env, "LD_LIBRARY_PATH="+strings.Join(search, ":"))
}

// LibraryFile is what makes a folder TensorFlow's: the library that the C API is in.
const LibraryFile = "libtensorflow_cc.so.2"

// libraryFolders returns where a runner finds the libraries that it is linked with and those that these open: the
// folder of libtensorflow, and those of NVIDIA's packages that were installed beside it (tensorflow[and-cuda] brings
// them: nvidia/cudnn/lib and others). The folder may hold links; what they lead to says which installation it is.
func libraryFolders(library string) []string {
	folders := []string{library}
	if file, err := filepath.EvalSymlinks(filepath.Join(library, LibraryFile)); err == nil {
		site := filepath.Dir(filepath.Dir(file))
		beside, _ := fs.Glob(os.DirFS(site), "nvidia/*/lib")
		for _, folder := range beside {
			folders = append(folders, filepath.Join(site, folder))
		}
	}
	return folders
}

// greet checks the handshake.
func (r *Runner) greet(report control.Report, build string) error {
	switch {
	case report.Error != "":
		return &loadError{error: fault.New(report.Kind, "%s", report.Error), noMemory: report.NoMemory}
	case !report.Ready:
		r.Close() // it closed its standard output, and has ended or will now
		return fault.New(fault.Internal, "model %s: its runner ended while loading (%s); the log has what it said", r.setup.Model, r.cmd.ProcessState)
	case report.Build != build:
		return fault.New(fault.Precondition, "flightsvc-runner is build %s, flightsvc is build %s; install both from one release", report.Build, build)
	}
	r.log.Debug("runner ready", zap.Int("runner", r.PID()), zap.String("tensorflow", report.TensorFlow))
	return nil
}

// follow reads the runner's reports until it ends, then clears up after it.
func (r *Runner) follow(stdout io.Reader, handshake chan<- control.Report) {
	lines := bufio.NewScanner(stdout)
	greeted, refused := false, false
	for lines.Scan() {
		var report control.Report
		if err := json.Unmarshal(lines.Bytes(), &report); err != nil {
			r.log.Warn("runner wrote a line that is no report", zap.Error(err)) // some library, say
			continue
		}
		if !greeted && (report.Ready || report.Error != "") {
			greeted, refused = true, report.Error != ""
			r.mu.Lock()
			r.ready = report.Ready
			r.mu.Unlock()
			handshake <- report
		}
		r.note(report)
	}
	r.mu.Lock()
	by := end{asked: r.closing, loading: !r.ready, reported: refused}
	r.mu.Unlock()
	close(handshake) // a handshake that never came reads as an empty report
	err := r.cmd.Wait()
	if rmErr := os.Remove(r.setup.Socket); rmErr != nil && !os.IsNotExist(rmErr) {
		r.log.Warn("socket not removed", zap.Error(rmErr))
	}
	r.mu.Lock()
	if r.conn != nil {
		_ = r.conn.Close()
	}
	by.how = r.cmd.ProcessState.String()
	for _, s := range r.streams {
		if !slices.Contains(by.requests, s.request) {
			by.requests = append(by.requests, s.request)
		}
	}
	clear(r.leases)
	clear(r.streams)
	r.retired = true
	queued := r.counts.Queued
	r.mu.Unlock()
	r.events.counted(control.Counts{Queued: -queued})
	r.log.Info("runner ended", zap.Int("runner", r.PID()), zap.Error(err))
	r.events.ended(by)
	close(r.ended)
}

// note keeps what a report says, and tells the Cache.
func (r *Runner) note(report control.Report) {
	r.mu.Lock()
	moved := report.Closed != "" || report.Resting != ""
	if id := report.Opened; id != "" {
		r.streams[id] = &stream{request: r.leases[id].request}
		delete(r.leases, id)
	}
	if report.Closed != "" {
		delete(r.streams, report.Closed)
	}
	var more control.Counts
	if report.Counts != nil {
		more, r.counts = report.Counts.Sub(r.counts), *report.Counts
	}
	if s, ok := r.streams[report.Resting]; ok {
		s.resting = true
	}
	if s, ok := r.streams[report.Stirring]; ok {
		s.resting = false
	}
	r.mu.Unlock()
	if more != (control.Counts{}) {
		r.events.counted(more)
	}
	switch {
	case report.Warming:
		r.events.warming()
	case report.Answered:
		r.events.answered()
	case report.DeviceBatch > 0:
		r.events.shrunk(report.DeviceBatch)
	case report.Pressed:
		r.events.pressed()
	case moved:
		r.events.moved()
	}
}

// Leased records a lease that was granted for this runner, to a request. It reports false if the runner is ending:
// the lease is void, and Cache.Ready has another runner.
func (r *Runner) Leased(id, request string, expires time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.retired {
		return false
	}
	if s, open := r.streams[id]; open {
		s.request = request // the client was faster
	} else {
		r.leases[id] = lease{request: request, expires: expires}
	}
	return true
}

// retire makes the runner refuse leases from now on, unless it has moving streams or leases: it returns how many.
func (r *Runner) retire(now time.Time) (streams, leases int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	streams, leases = r.pinsLocked(now)
	r.retired = r.retired || streams+leases == 0
	return streams, leases
}

// refuse makes the runner refuse leases from now on.
func (r *Runner) refuse() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retired = true
}

// Pins returns how many streams move, and how many leases may still open one. A stream that rests
// does not keep the runner in memory.
func (r *Runner) Pins(now time.Time) (streams, leases int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pinsLocked(now)
}

func (r *Runner) pinsLocked(now time.Time) (streams, leases int) {
	for id, lease := range r.leases {
		if now.After(lease.expires.Add(time.Second)) { // the report of its stream may still be on its way
			delete(r.leases, id)
		}
	}
	for _, s := range r.streams {
		if !s.resting {
			streams++
		}
	}
	return streams, len(r.leases)
}

// tally returns how many streams are open and how many of them rest, and what the runner last said of its work.
func (r *Runner) tally() (open, resting int, counts control.Counts) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.streams {
		if s.resting {
			resting++
		}
	}
	return len(r.streams), resting, r.counts
}

// Alive reports whether the process has not ended.
func (r *Runner) Alive() bool {
	select {
	case <-r.ended:
		return false
	default:
		return true
	}
}

// PID returns the process's id.
func (r *Runner) PID() int { return r.cmd.Process.Pid }

// Key returns the secret with which leases for this runner are signed.
func (r *Runner) Key() []byte { return r.setup.Key }

// Endpoint returns the address of the runner's socket.
func (r *Runner) Endpoint() string { return "grpc+unix://" + r.setup.Socket }

// Client returns a Flight client of the runner, for relaying. It is shared and ends with the
// runner.
func (r *Runner) Client() (flight.FlightServiceClient, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		conn, err := grpc.NewClient("unix://"+r.setup.Socket,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRelayBytes)))
		if err != nil {
			return nil, fmt.Errorf("connect to runner: %w", err)
		}
		r.conn = conn
	}
	return flight.NewFlightServiceClient(r.conn), nil
}

// maxRelayBytes lets any answer through: its size was bounded by the runner.
const maxRelayBytes = 1 << 30

// Close ends the process: its standard input ends, and if it is still there after a grace it is
// killed. It returns when nothing of it is left.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closing = true
	r.mu.Unlock()
	if err := r.stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		r.log.Debug("close standard input of runner", zap.Error(err))
	}
	select {
	case <-r.ended:
		return
	case <-time.After(runnerGrace):
	}
	r.log.Warn("runner does not end, killing it", zap.Int("runner", r.PID()))
	_ = r.cmd.Process.Kill() // an error means that it has ended
	<-r.ended
}
