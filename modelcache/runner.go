// The front's view of a runner: its handshake, its leases and streams, its end.

package modelcache

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	setup   control.Setup
	process Process
	how     string        // how the process ended; set before exited is closed
	exited  chan struct{} // closed when the process has ended
	ended   chan struct{} // closed when its socket is removed and its memory given back, too
	events  events
	log     *zap.Logger

	mu      sync.Mutex         // guards the fields below
	leases  map[string]lease   // those that have not opened a stream
	streams map[string]*stream // open ones, by lease
	conn    *grpc.ClientConn   // for relaying; made on first use
	retired bool               // takes no lease any more
	closing bool               // the front is ending the process
	ready   bool
	counts  control.Counts // as last reported
}

// lease is the right to open one stream.
type lease struct {
	request string // request_id of the descriptor
	expires time.Time
}

// stream is an open stream of a runner.
type stream struct {
	request string
	resting bool // nothing has moved on it for StreamRest
}

// events tell the Cache what happens to a runner. They are called one after the other, without a lock held.
type events struct {
	warming  func()
	counted  func(more control.Counts) // what was done since the last call; Queued may be negative
	moved    func()                    // a stream has closed or rests, so that memory may come free
	answered func()                    // the first record batch was answered
	pressed  func()                    // the device has no memory for one row
	shrunk   func(rows int)            // the most rows of a run that fit into the device's memory
	ended    func(end)
}

// loadError is the error of a runner that could not load its model.
type loadError struct {
	error
	noMemory bool // the device had no memory for it
}

// Unwrap lets fault.KindOf find the runner's fault.
func (e *loadError) Unwrap() error { return e.error }

// start starts a runner and waits until its model is ready. ctx bounds the wait. defaults and fixed are for its
// environment, see Starter. events.ended is called in any case, and last.
func start(
	ctx context.Context, options Options, setup control.Setup, defaults, fixed []string, events events,
) (*Runner, error) {
	setup.Key = []byte(rand.Text() + rand.Text()) // 260 bits
	// as long as front.sock, so that its path fits into a socket's address if the front's does
	setup.Socket = filepath.Join(options.Folder, "r"+rand.Text()[:4]+".sock")
	process, err := options.Runners.Start(ctx, setup, defaults, fixed)
	if err != nil {
		events.ended(end{asked: true})
		return nil, err
	}
	r := &Runner{
		setup:   setup,
		process: process,
		exited:  make(chan struct{}),
		ended:   make(chan struct{}),
		events:  events,
		log:     options.Log.With(zap.String("model", setup.Model), zap.Int("runner", process.PID())),
		leases:  map[string]lease{},
		streams: map[string]*stream{},
	}
	handshake := make(chan control.Report, 1)
	go r.follow(handshake)
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

// greet returns why the runner that sent this handshake cannot be used, nil if it can.
func (r *Runner) greet(report control.Report, build string) error {
	switch {
	case report.Error != "":
		return &loadError{error: fault.New(report.Kind, "%s", report.Error), noMemory: report.NoMemory}
	case !report.Ready:
		r.Close() // no report will follow: end it, in case it still runs
		return fault.New(fault.Internal, "model %s: its runner ended while loading (%s); see its messages in the log",
			r.setup.Model, r.how)
	case report.Build != build:
		return fault.New(fault.Precondition, "flightsvc-runner is build %s, flightsvc is build %s; install both from "+
			"one release", report.Build, build)
	}
	r.log.Debug("runner ready", zap.String("tensorflow", report.TensorFlow))
	return nil
}

// follow reads the runner's reports until it ends, then closes and removes what belonged to it.
func (r *Runner) follow(handshake chan<- control.Report) {
	greeted, refused := false, false
	for {
		report, err := r.process.Report()
		if err != nil {
			break
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
	close(handshake) // where no handshake came, start gets an empty report
	r.how = r.process.Wait()
	close(r.exited)
	if rmErr := os.Remove(r.setup.Socket); rmErr != nil && !os.IsNotExist(rmErr) {
		r.log.Warn("socket not removed", zap.Error(rmErr))
	}
	r.mu.Lock()
	if r.conn != nil {
		_ = r.conn.Close()
	}
	by.how = r.how
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
	r.log.Info("runner ended", zap.String("how", r.how))
	r.events.ended(by)
	close(r.ended)
}

// note keeps what a report says of streams and counts, and tells the Cache.
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

// Leased records a lease for this runner that was granted to a request. It returns false if the runner is ending: then
// the lease is void, and Cache.Ready returns another runner.
func (r *Runner) Leased(id, request string, expires time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.retired {
		return false
	}
	r.leases[id] = lease{request: request, expires: expires}
	return true
}

// retire makes the runner refuse new leases, unless it has moving streams or unexpired leases. It returns their
// numbers.
func (r *Runner) retire(now time.Time) (streams, leases int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	streams, leases = r.pinsLocked(now)
	r.retired = r.retired || streams+leases == 0
	return streams, leases
}

// refuse makes the runner refuse new leases.
func (r *Runner) refuse() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retired = true
}

// Pins counts what keeps the runner in memory: streams that are not resting, and leases that may still open a stream.
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

// tally returns how many streams are open, how many of them rest, and the counts that were last reported.
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
func (r *Runner) PID() int { return r.process.PID() }

// Key returns the secret with which leases for this runner are signed.
func (r *Runner) Key() []byte { return r.setup.Key }

// Endpoint returns the address of the runner's socket.
func (r *Runner) Endpoint() string { return "grpc+unix://" + r.setup.Socket }

// Client returns a Flight client of the runner, for relaying. It is shared, and its connection ends with the runner.
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

// maxRelayBytes lets any answer through: the runner has bounded its size.
const maxRelayBytes = 1 << 30

// Close closes the process's standard input, which ends it, and kills it after runnerGrace. It returns when the process
// has ended, its socket is removed and its memory given back.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closing = true
	r.mu.Unlock()
	r.process.Stop()
	select {
	case <-r.exited:
	case <-time.After(runnerGrace):
		r.log.Warn("runner does not end, killing it")
		r.process.Kill()
	}
	<-r.ended
}
