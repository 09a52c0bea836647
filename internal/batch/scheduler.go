// The Scheduler: the queue of all streams of one model, and the threads that run what waits there.

package batch

import (
	"context"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/tensor"
)

// TensorFlow checks its timeout only between operations, so a run may end later. A stream is answered answerGrace after
// the timeout at the latest; a run that has not ended stuckGrace after it counts as stuck.
const (
	answerGrace = time.Second
	stuckGrace  = 10 * time.Second
)

// Outputs are the results of one run. The values view memory that is not theirs until Close.
type Outputs interface {
	Values() []tensor.Value
	Close()
}

// Options configure a Scheduler. Its numbers are limits; a stream can only lower them.
type Options struct {
	MaxBatchSize int // rows of one run
	// MaxBatchBytes bounds the inputs of one run, padding included. Only a single row, or a run of the smallest
	// allowed size, may have more.
	MaxBatchBytes      int64
	BatchTimeout       time.Duration // how long a batch that is not full may wait for further rows
	MaxEnqueuedBatches int           // waiting record batches at which the queue is full
	NumBatchThreads    int           // concurrent runs
	// Spread makes tasks of a few milliseconds, and joins no more than that, so that all threads work on each record
	// batch. It is for runs that take one processor each.
	Spread bool
	// AllowedBatchSizes are the only numbers of rows that Run is given, ascending; a batch of another size is
	// padded to the next one with copies of its first row. Empty allows every size.
	AllowedBatchSizes []int
	// Shrink, if set, makes the scheduler lower the rows of a run that fails as Exhausted: the device has too
	// little memory for them.
	Shrink *Shrink
	// Run feeds graph tensors and fetches others. It takes over the feeds and releases them, also on error. A
	// fault of kind BadRequest blames the rows. timeout bounds the run; 0 does not. Several goroutines call it at
	// once.
	Run func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error)
	// RunAlone, if set, is called in place of Run for a record batch that was not cut, while nothing else runs or
	// waits: such a run may take all processors.
	RunAlone func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error)
	// Stuck is called when a run has ignored its timeout for 10 s. It ends the process, because nothing else
	// ends such a run.
	Stuck  func(timeout time.Duration)
	Memory memory.Allocator // for joined feeds; 64-byte aligned and off the Go heap
	Log    *zap.Logger
}

// Shrink adapts a scheduler to the memory of a device. A run that does not fit is halved, or cut to the next smaller of
// AllowedBatchSizes, and no later run has more rows than that.
type Shrink struct {
	// Fits is called with the new row limit as soon as a run within it has succeeded.
	Fits func(rows int)
	// Pressed is called when a run fails that cannot have fewer rows. It is tried once more after Wait, in which
	// others may free memory, and then fails for good.
	Pressed func()
	Wait    time.Duration
}

// Counts are what a scheduler has done so far.
type Counts struct {
	Runs       int64
	JoinedRuns int64         // runs that served more than one stream
	RunTime    time.Duration // sum over all runs, concurrent ones included
	QueueTime  time.Duration // sum of the waiting times of all tasks
	Queued     int64         // rows that wait now
}

// Scheduler runs the tasks of all streams of one model. It is safe for concurrent use.
type Scheduler struct {
	options Options
	threads sync.WaitGroup

	runs, joined       atomic.Int64
	runTime, queueTime atomic.Int64 // nanoseconds
	lastRun            atomic.Int64 // duration of the last run, in nanoseconds
	rowTime            atomic.Int64 // of a run, in nanoseconds a row; 0 before the first run
	running            atomic.Int64 // runs under way
	rowLimit           atomic.Int64 // of one run, even where Limits.Off; lowered by Shrink
	reportedLimit      atomic.Int64 // the rowLimit at the start, or of the last call of Shrink.Fits

	mu       sync.Mutex // guards the fields below, and those of tasks and streams
	runnable *sync.Cond // signalled when there may be a batch to run
	turns    []*Stream  // streams with waiting tasks; the first is served next
	waiting  int        // tasks
	closed   bool
	timer    *time.Timer // wakes a thread when a batch has waited for its BatchTimeout
}

// New starts a scheduler with its threads.
func New(options Options) *Scheduler {
	s := &Scheduler{options: options}
	s.rowLimit.Store(math.MaxInt)
	if len(options.AllowedBatchSizes) > 0 {
		s.rowLimit.Store(int64(s.allowed(options.MaxBatchSize)))
	}
	s.reportedLimit.Store(s.rowLimit.Load())
	s.runnable = sync.NewCond(&s.mu)
	s.timer = time.AfterFunc(time.Hour, func() {
		s.mu.Lock() // else the broadcast could come between a thread's last check and its wait
		defer s.mu.Unlock()
		s.runnable.Broadcast()
	})
	for range max(options.NumBatchThreads, 1) {
		s.threads.Go(s.thread)
	}
	return s
}

// Counts returns what was done so far, and how many rows wait.
func (s *Scheduler) Counts() Counts {
	c := Counts{Runs: s.runs.Load(), JoinedRuns: s.joined.Load(), RunTime: time.Duration(s.runTime.Load()),
		QueueTime: time.Duration(s.queueTime.Load())}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stream := range s.turns {
		c.Queued += int64(rowsOf(stream.tasks))
	}
	return c
}

// Full reports whether the record batches of MaxEnqueuedBatches streams are waiting and, if so, after about what time a
// new stream should try again.
func (s *Scheduler) Full() (retryAfter time.Duration, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.turns) < s.options.MaxEnqueuedBatches {
		return 0, false
	}
	took := time.Duration(s.lastRun.Load()) * time.Duration(s.waiting/max(s.options.NumBatchThreads, 1))
	return min(max(took, 50*time.Millisecond), 5*time.Second), true
}

// Close waits for the runs under way and ends the threads. Tasks that wait fail as Unavailable.
func (s *Scheduler) Close() {
	s.mu.Lock()
	s.closed = true
	s.timer.Stop()
	for _, stream := range s.turns {
		for _, t := range stream.tasks {
			t.answerLocked(result{err: errClosed})
		}
		stream.tasks = nil
	}
	s.turns, s.waiting = nil, 0
	s.mu.Unlock()
	s.runnable.Broadcast()
	s.threads.Wait()
}

var errClosed = fault.New(fault.Unavailable, "the server is shutting down; try again")

// allowed returns the largest allowed batch size up to a number of rows, or the smallest one if all are larger.
func (s *Scheduler) allowed(rows int) int {
	sizes := s.options.AllowedBatchSizes
	if len(sizes) == 0 {
		return rows
	}
	for _, size := range slices.Backward(sizes) {
		if size <= rows {
			return size
		}
	}
	return sizes[0]
}

// padded returns how many rows a run of so many has with its padding.
func (s *Scheduler) padded(rows int) int {
	for _, size := range s.options.AllowedBatchSizes {
		if size >= rows {
			return size
		}
	}
	return rows
}

// shrink lowers the row limit after a run of so many rows did not fit into the device's memory, if fewer are possible.
func (s *Scheduler) shrink(rows int) {
	rows = s.padded(rows)
	lower := int64(rows+1) / 2
	if len(s.options.AllowedBatchSizes) > 0 {
		lower = int64(s.allowed(rows - 1))
	}
	for {
		limit := s.rowLimit.Load()
		if lower >= min(limit, int64(rows)) || s.rowLimit.CompareAndSwap(limit, lower) {
			return
		}
	}
}

// reportLimit calls Shrink.Fits after a run that succeeded, if the row limit has fallen since the last call.
func (s *Scheduler) reportLimit() {
	if s.options.Shrink == nil {
		return
	}
	if limit := s.rowLimit.Load(); s.reportedLimit.Swap(limit) != limit {
		s.options.Shrink.Fits(int(limit))
	}
}

// tooLarge reports whether a run failed, or would fail, because it has too many rows.
func (s *Scheduler) tooLarge(err error) bool {
	kind, ok := fault.KindOf(err)
	return err == errTooLarge || s.options.Shrink != nil && ok && kind == fault.Exhausted
}

// errTooLarge is the result of a task with more rows than any run may have.
var errTooLarge = fault.New(fault.Exhausted, "its outputs depend on all rows of a run together, "+
	"and it has more rows than one run may have; send fewer rows in a record batch")

// Call is what all runs of a stream have in common.
type Call struct {
	Fetches []string
	Timeout time.Duration // bounds each run; 0 does not
	// Check validates the outputs of a run of so many rows, before they are divided among its tasks.
	Check  func(outputs []tensor.Value, rows int) error
	Limits Limits
}

// Limits are a stream's own limits of batching; they can only lower the scheduler's.
type Limits struct {
	// Off makes each record batch one run, unless it has more rows than the largest allowed batch size or than fit
	// into a device's memory, or unless its padding would exceed MaxBatchBytes.
	Off          bool
	Alone        bool          // record batches are cut, but not joined with those of other streams
	MaxBatchSize int           // 0 is the scheduler's
	BatchTimeout time.Duration // 0 does not wait for further rows
}

// Stream is the place of one stream in the queue; its record batches come one after the other.
type Stream struct {
	scheduler *Scheduler
	call      Call
	key       string // tasks of streams with the same key may run together if their shapes agree

	tasks []*task // waiting, the oldest first; guarded by scheduler.mu
}

// Stream makes a place for a stream. It needs no closing.
func (s *Scheduler) Stream(call Call) *Stream {
	limit := s.options.MaxBatchSize
	if call.Limits.MaxBatchSize > 0 {
		limit = min(limit, call.Limits.MaxBatchSize)
	}
	call.Limits.MaxBatchSize = s.allowed(limit)
	call.Limits.BatchTimeout = min(call.Limits.BatchTimeout, s.options.BatchTimeout)
	key := fmt.Sprintf("%s|%d|%d|%d", strings.Join(call.Fetches, ","), call.Timeout, limit, call.Limits.BatchTimeout)
	return &Stream{scheduler: s, call: call, key: key}
}

// rowLimit returns how many rows a run of the stream may have.
func (st *Stream) rowLimit() int {
	limit := int(st.scheduler.rowLimit.Load())
	if !st.call.Limits.Off {
		limit = min(limit, st.call.Limits.MaxBatchSize)
	}
	return limit
}

// task is a slice of a stream's record batch that waits for a run.
type task struct {
	stream *Stream
	key    string // tasks with the same key may run together; "" runs alone
	feeds  []tensor.Feed
	rows   int
	bytes  int64
	whole  bool // no other task of its record batch runs beside it
	queued time.Time
	done   chan result // takes one

	// Guarded by the scheduler's mu.
	taken    bool     // by a thread
	returned bool     // its caller has returned without the result
	running  *running // its run, once that has begun
}

// running is a run under way.
type running struct {
	callers   int           // tasks whose caller waits; guarded by the scheduler's mu
	abandoned chan struct{} // closed when no caller waits any more
}

// result is the outcome of a task.
type result struct {
	outputs *share // of the run; nil with err
	values  []tensor.Value
	err     error
	checked bool // err is Call.Check's: no row is to blame
	ran     int  // rows of the run, without padding
	queue   time.Duration
	run     time.Duration
}

func (r *result) close() {
	for i := range r.values {
		r.values[i].Release()
	}
	if r.outputs != nil {
		r.outputs.close()
	}
}

// share is the outputs of a run that several tasks own; the last to close it closes them.
type share struct {
	outputs Outputs
	owners  atomic.Int32
}

func (s *share) close() {
	if s.owners.Add(-1) == 0 {
		s.outputs.Close()
	}
}

// answerLocked releases the feeds and gives the task its result, or closes that if its caller has returned.
func (t *task) answerLocked(r result) {
	tensor.ReleaseFeeds(t.feeds)
	t.feeds = nil
	if t.returned {
		r.close()
		return
	}
	t.done <- r
}

// submit queues a task, which takes over the feeds. whole says that no other task of its record batch runs beside it,
// alone that it is not joined with other streams' tasks.
func (st *Stream) submit(feeds []tensor.Feed, rows int, whole, alone bool) *task {
	t := &task{stream: st, feeds: feeds, rows: rows, whole: whole, queued: time.Now(), done: make(chan result, 1)}
	for i := range feeds {
		t.bytes += feeds[i].Value.ByteSize()
	}
	if !alone && !st.call.Limits.Off && !st.call.Limits.Alone {
		t.key = st.key
		for _, feed := range feeds {
			t.key += fmt.Sprintf("|%s %d %v", feed.Tensor, feed.Value.DType, feed.Value.Shape[1:])
		}
	}
	s := st.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		t.answerLocked(result{err: errClosed})
		return t
	}
	if len(st.tasks) == 0 {
		s.turns = append(s.turns, st)
	}
	st.tasks = append(st.tasks, t)
	s.waiting++
	s.runnable.Signal()
	return t
}

// wait returns the task's result. If ctx ends first, a waiting task is dropped, and the result of a running one is
// closed when it comes.
func (t *task) wait(ctx context.Context) result {
	select {
	case r := <-t.done:
		return r
	case <-ctx.Done():
	}
	s := t.stream.scheduler
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case r := <-t.done:
		r.close()
	default:
		t.returned = true
		if !t.taken {
			s.removeLocked(t)
			t.answerLocked(result{})
		} else if r := t.running; r != nil {
			if r.callers--; r.callers == 0 {
				close(r.abandoned)
			}
		}
	}
	return result{err: ctx.Err()}
}

// removeLocked takes a waiting task out of the queue.
func (s *Scheduler) removeLocked(t *task) {
	st := t.stream
	st.tasks = slices.DeleteFunc(st.tasks, func(other *task) bool { return other == t })
	if len(st.tasks) == 0 {
		s.turns = slices.DeleteFunc(s.turns, func(other *Stream) bool { return other == st })
	}
	s.waiting--
}

// thread runs batches until the scheduler closes.
func (s *Scheduler) thread() {
	for {
		tasks := s.next()
		if tasks == nil {
			return
		}
		s.serve(tasks)
	}
}

// next waits for a batch and takes it; nil when the scheduler is closed.
func (s *Scheduler) next() []*task {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed {
		if tasks := s.takeLocked(time.Now()); tasks != nil {
			return tasks
		}
		s.runnable.Wait()
	}
	return nil
}

// takeLocked returns the batch to run next: the first task of a stream, and those of other streams that may run with
// it. A batch that is not full and may wait longer is passed over.
func (s *Scheduler) takeLocked(now time.Time) []*task {
	var wake time.Time
	for _, first := range s.turns {
		tasks, ready := s.gatherLocked(first)
		if due := tasks[0].queued.Add(first.call.Limits.BatchTimeout); !ready && due.After(now) {
			if wake.IsZero() || due.Before(wake) {
				wake = due
			}
			continue
		}
		for _, t := range tasks {
			t.taken = true
			s.removeLocked(t)
			s.queueTime.Add(int64(now.Sub(t.queued)))
		}
		for _, t := range tasks { // a stream with further tasks goes to the end
			if at := slices.Index(s.turns, t.stream); at >= 0 {
				s.turns = append(slices.Delete(s.turns, at, at+1), t.stream)
			}
		}
		if s.waiting > 0 {
			s.runnable.Signal()
		}
		return tasks
	}
	if !wake.IsZero() {
		s.timer.Reset(wake.Sub(now))
	}
	return nil
}

// gatherLocked returns the first task of a stream with those of other streams that fit into its batch, in queue order.
// ready is false if the batch is not full and may wait.
func (s *Scheduler) gatherLocked(first *Stream) (tasks []*task, ready bool) {
	seed := first.tasks[0]
	tasks = []*task{seed}
	if seed.key == "" {
		return tasks, true
	}
	rows, bytes, limit := seed.rows, seed.bytes, min(first.rowLimit(), s.mostRows())
	for _, st := range s.turns {
		t := st.tasks[0]
		if st == first || t.key != seed.key {
			continue
		}
		// Rows that replace padding cost nothing.
		more := s.padded(rows + t.rows)
		if rows+t.rows > limit || more > s.padded(rows) &&
			int64(more)*((bytes+t.bytes)/int64(rows+t.rows)) > s.options.MaxBatchBytes {
			ready = true // the next task does not fit, so waiting would only delay it
			continue
		}
		rows, bytes = rows+t.rows, bytes+t.bytes
		tasks = append(tasks, t)
	}
	return tasks, ready || rows >= limit || first.call.Limits.BatchTimeout == 0
}

// serve runs one batch and answers its tasks.
func (s *Scheduler) serve(tasks []*task) {
	started := time.Now()
	tasks, current := s.begin(tasks)
	if len(tasks) == 0 {
		return
	}
	total := rowsOf(tasks)
	if int64(total) > s.rowLimit.Load() { // which has fallen since the tasks were taken
		if len(tasks) > 1 {
			s.separate(tasks)
		} else { // its stream cuts it into smaller tasks
			s.deliver(tasks, started, nil, errTooLarge)
		}
		return
	}
	outputs, err := s.run(tasks, current)
	switch {
	case err == nil:
		s.reportLimit()
	case s.tooLarge(err):
		s.shrink(total)
	}
	switch {
	case err == errAnswered:
	case err != nil && len(tasks) > 1:
		s.separate(tasks) // one stream's rows may be to blame; the others must neither fail nor see its error
	default:
		s.deliver(tasks, started, outputs, err)
	}
}

// separate puts joined tasks back into the queue, each to run alone.
func (s *Scheduler) separate(tasks []*task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range tasks {
		switch t.key, t.running = "", nil; {
		case t.returned, s.closed:
			t.answerLocked(result{err: errClosed})
			continue
		case len(t.stream.tasks) == 0:
			s.turns = append(s.turns, t.stream)
		}
		t.taken = false
		t.stream.tasks = slices.Insert(t.stream.tasks, 0, t)
		s.waiting++
	}
	s.runnable.Broadcast()
}

// begin drops the tasks whose caller has returned and registers the run of the others.
func (s *Scheduler) begin(tasks []*task) ([]*task, *running) {
	s.mu.Lock()
	defer s.mu.Unlock()
	current := &running{abandoned: make(chan struct{})}
	kept := make([]*task, 0, len(tasks))
	for _, t := range tasks {
		if t.returned {
			t.answerLocked(result{})
			continue
		}
		t.running = current
		current.callers++
		kept = append(kept, t)
	}
	return kept, current
}

func rowsOf(tasks []*task) (rows int) {
	for _, t := range tasks {
		rows += t.rows
	}
	return rows
}

// join returns the feeds of one run: of a single task without padding its own, with further references; else copies of
// the rows of all tasks and of the padding.
func (s *Scheduler) join(tasks []*task) (feeds []tensor.Feed, err error) {
	defer s.guard(&err)
	total := rowsOf(tasks)
	padding := s.padded(total) - total
	feeds = make([]tensor.Feed, len(tasks[0].feeds))
	for i, feed := range tasks[0].feeds {
		feeds[i].Tensor = feed.Tensor
		if len(tasks) == 1 && padding == 0 {
			feeds[i].Value = feed.Value.Slice(0, total)
			continue
		}
		values := make([]tensor.Value, len(tasks), len(tasks)+padding)
		for j, t := range tasks {
			values[j] = t.feeds[i].Value
		}
		first := feed.Value.Slice(0, 1)
		for range padding {
			values = append(values, first)
		}
		feeds[i].Value = tensor.Concat(values, s.options.Memory)
		first.Release()
	}
	return feeds, nil
}

// guard turns a panic, such as one for want of memory, into an error and a log line.
func (s *Scheduler) guard(err *error) {
	if cause := recover(); cause != nil {
		s.options.Log.Error("panic", zap.String("method", "run"), zap.Any("cause", cause),
			zap.ByteString("stack", debug.Stack()))
		*err = fault.New(fault.Internal, "the server hit a defect while running a batch; its log has the details")
	}
}

// errAnswered means that run has answered the tasks itself, while TensorFlow goes on.
var errAnswered = fmt.Errorf("answered already")

// outcome is what Options.Run returns.
type outcome struct {
	outputs Outputs
	err     error
}

// run runs tasks together. It answers them and returns early if the run ignores its timeout or if all callers have
// returned: TensorFlow cannot be stopped, but the thread has other tasks to run.
func (s *Scheduler) run(tasks []*task, current *running) (Outputs, error) {
	call := tasks[0].stream.call
	feeds, err := s.join(tasks)
	if err != nil {
		return nil, err
	}
	s.runs.Add(1)
	if len(tasks) > 1 {
		s.joined.Add(1)
	}
	run, alone := s.options.Run, s.running.Add(1) == 1 && s.options.RunAlone != nil && s.isAlone(tasks)
	if alone {
		run = s.options.RunAlone
	}
	done := make(chan outcome, 1)
	started := time.Now()
	go func() { // ends with the run
		var o outcome
		defer func() { done <- o }()
		defer s.running.Add(-1)
		defer s.guard(&o.err)
		o.outputs, o.err = run(feeds, call.Fetches, call.Timeout)
	}()
	var late, stuck <-chan time.Time // without a timeout they never fire
	if call.Timeout > 0 {
		late, stuck = time.After(call.Timeout+answerGrace), time.After(call.Timeout+stuckGrace)
	}
	select {
	case o := <-done:
		took := int64(time.Since(started))
		s.lastRun.Store(took)
		s.runTime.Add(took)
		if !alone && o.err == nil {
			s.learn(time.Duration(took), s.padded(rowsOf(tasks)))
		}
		return o.outputs, o.err
	case <-current.abandoned:
		// Every caller has returned; deliver releases the tasks.
		s.deliver(tasks, started, nil, context.Canceled)
	case <-late:
		s.deliver(tasks, started, nil, fault.New(fault.Deadline,
			"TensorFlow did not finish a batch within run_timeout_ms (%d)", call.Timeout.Milliseconds()))
	}
	s.threads.Go(func() { // ends with the run, or with the process
		select {
		case o := <-done:
			s.runTime.Add(int64(time.Since(started)))
			if o.outputs != nil {
				o.outputs.Close()
			}
		case <-stuck:
			s.options.Stuck(call.Timeout)
		}
	})
	return nil, errAnswered
}

// deliver gives each task its rows of the outputs, or the error; rows of the padding are dropped.
func (s *Scheduler) deliver(tasks []*task, started time.Time, outputs Outputs, err error) {
	took := time.Since(started)
	total := rowsOf(tasks)
	var values []tensor.Value
	var shared *share
	if err == nil {
		values, shared = outputs.Values(), &share{outputs: outputs}
		shared.owners.Store(int32(len(tasks)))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := 0
	for _, t := range tasks {
		r := result{err: err, ran: total, queue: started.Sub(t.queued), run: took}
		if err == errTooLarge {
			r.ran = 0
		}
		if err == nil {
			if r.err = t.stream.call.Check(values, s.padded(total)); r.err != nil {
				r.checked = true
				shared.close()
			} else {
				r.outputs, r.values = shared, make([]tensor.Value, len(values))
				for i := range values {
					r.values[i] = values[i].Slice(at, at+t.rows)
				}
			}
		}
		at += t.rows
		t.answerLocked(r)
	}
}
