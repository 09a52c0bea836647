// Command flightsvc-runner loads one SavedModel and serves streams of inference for it on its own Unix socket. The
// front starts it and talks to it over standard input and output; it ends when its standard input ends.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"flightsvc/handlers"
	"flightsvc/internal/batch"
	"flightsvc/internal/build"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/logging"
	"flightsvc/internal/offheap"
	"flightsvc/internal/tensorflow"
)

func main() {
	// The front decides when a runner ends: an interrupt in a terminal reaches both, and the front drains first.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	signal.Ignore(syscall.SIGPIPE) // the reader of the log may end before this process
	pipe, err := controlPipe()
	if err == nil {
		err = run(os.Stdin, &reporter{out: json.NewEncoder(pipe)})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "flightsvc-runner: "+err.Error())
		os.Exit(1)
	}
}

// controlPipe reserves standard output for reports: what a model prints there goes to standard error instead.
func controlPipe() (*os.File, error) {
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "control"), unix.Dup3(2, 1, 0)
}

// run reads the setup, loads the model, reports it as ready, and serves until the end of stdin.
func run(stdin io.Reader, reports *reporter) error {
	input := bufio.NewReader(stdin)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return errors.New("flightsvc starts this program and sends its setup on standard input; do not run it yourself")
	}
	var setup control.Setup
	if err := json.Unmarshal(line, &setup); err != nil {
		return fmt.Errorf("setup: %w", err)
	}
	log, err := logging.New(setup.LogLevel, "runner")
	if err != nil {
		return err
	}
	serving := make(chan *grpc.Server, 1)
	go func() { // runs until the process ends
		_, _ = io.Copy(io.Discard, input)
		// The front has drained, has died, or needs the memory. This also ends a load that hangs in native code.
		_ = os.Remove(setup.Socket)
		select {
		case server := <-serving:
			finish(server)
		default:
		}
		os.Exit(0)
	}()
	if len(setup.OpLibraries) > 0 { // logged before, because loading one may end the process
		log.Info("loading op_libraries", zap.String("model", setup.Model), zap.Strings("libraries", setup.OpLibraries))
	}
	memory := &offheap.Allocator{}
	engine, err := open(setup)
	if saved, ok := engine.(*loaded); ok && err == nil && setup.WarmUp {
		reports.write(control.Report{Warming: true})
		err = saved.warmUp(setup, memory, log)
	}
	if saved, ok := engine.(*loaded); ok && err == nil && setup.Replay != "" {
		err = saved.replay(setup.Replay, memory)
	}
	if err != nil {
		kind, ok := fault.KindOf(err)
		if !ok {
			kind = fault.Internal
		}
		reports.write(control.Report{Build: build.ID(), Error: err.Error(), Kind: kind,
			NoMemory: setup.Device != "" && kind == fault.Exhausted})
		return err
	}
	if setup.Measure != nil {
		return measure(setup, engine, reports, log)
	}
	listener, err := handlers.Listen(setup.Socket, log)
	if err != nil {
		return err
	}
	b := setup.Batching
	options := batch.Options{
		MaxBatchSize:       cmp.Or(b.MaxBatchSize, maxBatchSize),
		MaxBatchBytes:      maxBatchBytes,
		BatchTimeout:       cmp.Or(time.Duration(b.BatchTimeoutMicros)*time.Microsecond, batchTimeout),
		MaxEnqueuedBatches: cmp.Or(b.MaxEnqueuedBatches, maxEnqueuedBatches),
		NumBatchThreads:    cmp.Or(b.NumBatchThreads, max(setup.Cores, 1)),
		AllowedBatchSizes:  b.AllowedBatchSizes,
		Run:                engine.Run,
		Stuck: func(timeout time.Duration) {
			log.Error("a TensorFlow run ignores its timeout, so this runner ends", zap.String("model", setup.Model),
				zap.Duration("run_timeout", timeout))
			_ = os.Remove(setup.Socket)
			os.Exit(1)
		},
		Memory: memory,
		Log:    log,
	}
	if saved, ok := engine.(*loaded); ok && setup.Device == "" {
		options.Spread, options.RunAlone = true, saved.RunAlone
		if setup.Sample != "" {
			saved.sampler = &sampler{path: setup.Sample, saved: saved.saved, log: log}
		}
	}
	if setup.Device != "" {
		options.Shrink = &batch.Shrink{Fits: reports.deviceBatch, Pressed: reports.pressed, Wait: memoryWait}
	}
	batches := batch.New(options)
	service := handlers.NewRunner(handlers.RunnerOptions{
		Engine: engine, Batches: batches, Events: reports, Key: setup.Key, Server: setup.Server, Form: setup.Form,
		Memory: memory, Log: log,
	})
	server := handlers.NewServer(service, log)
	log.Info("model loaded", zap.String("model", setup.Model), zap.String("tensorflow", tensorflow.Version()))
	reports.write(control.Report{Build: build.ID(), TensorFlow: tensorflow.Version(), Ready: true})
	reports.count(service.Counts)
	serving <- server
	return server.Serve(listener)
}

// flushGrace is how long a runner that ends continues to send: a stream counts as closed when its handler has returned,
// but its last answer and its status may not have been sent by then.
const flushGrace = 300 * time.Millisecond

// finish sends what is left of closed streams, and cuts off open ones.
func finish(server *grpc.Server) {
	done := make(chan struct{})
	go func() {
		server.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(flushGrace):
	}
}

// Defaults of batching, in TF Serving's terms. max_batch_size is near its default of 1,000; max_batch_bytes bounds runs
// of large rows, such as pictures, to what one message may hold.
const (
	maxBatchSize       = 1024
	maxBatchBytes      = 64 << 20
	batchTimeout       = 10 * time.Millisecond
	maxEnqueuedBatches = 128
)

// memoryWait is how long a run that does not fit into a device's memory waits for a second try, after the front was
// asked to free memory: 2 s until another runner has ended, and 5 s until its memory is free, the longest that Ollama
// observed (server/sched.go, waitForVRAMRecovery).
const memoryWait = 7 * time.Second

// reporter writes reports to the front, a line each.
type reporter struct {
	mu     sync.Mutex // guards the fields below
	out    *json.Encoder
	counts func() control.Counts // nil before the model serves
	sent   control.Counts        // the last counts that the front was sent
}

// countInterval is how often changed counts are sent to the front.
const countInterval = time.Second

// count sends the counts from now on, until the process ends.
func (r *reporter) count(counts func() control.Counts) {
	r.mu.Lock()
	r.counts = counts
	r.mu.Unlock()
	go func() {
		for range time.Tick(countInterval) {
			r.sendCounts()
		}
	}()
}

func (r *reporter) sendCounts() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if counts := r.changedLocked(); counts != nil {
		_ = r.out.Encode(control.Report{Counts: counts})
	}
}

// changedLocked returns the counts, or nil if they have not changed since they were last sent.
func (r *reporter) changedLocked() *control.Counts {
	if r.counts == nil {
		return nil
	}
	now := r.counts()
	if now == r.sent {
		return nil
	}
	r.sent = now
	return &now
}

func (r *reporter) write(report control.Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	report.Counts = r.changedLocked()
	_ = r.out.Encode(report) // fails only if the front has ended, and then this process ends soon
}

// StreamOpened reports that a lease has opened its stream.
func (r *reporter) StreamOpened(lease string) { r.write(control.Report{Opened: lease}) }

// StreamClosed reports that a stream has ended.
func (r *reporter) StreamClosed(lease string) { r.write(control.Report{Closed: lease}) }

// StreamResting reports that a stream has become idle.
func (r *reporter) StreamResting(lease string) { r.write(control.Report{Resting: lease}) }

// StreamStirring reports that an idle stream is active again.
func (r *reporter) StreamStirring(lease string) { r.write(control.Report{Stirring: lease}) }

// Answered reports that the runner has answered its first record batch.
func (r *reporter) Answered() { r.write(control.Report{Answered: true}) }

func (r *reporter) deviceBatch(rows int) { r.write(control.Report{DeviceBatch: rows}) }

func (r *reporter) pressed() { r.write(control.Report{Pressed: true}) }

// Interface guards.
var _ handlers.StreamEvents = (*reporter)(nil)
