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

// How late a run may be. TensorFlow looks at its timeout between operations, so a run may end
// after it. A stream is answered lateAnswer after the timeout in any case, and lateEnd after it
// the run counts as stuck.
const (
	lateAnswer = time.Second
	lateEnd    = 10 * time.Second
)

// Outputs are the results of one run. The values view memory that is not theirs until Close.
type Outputs interface {
	Values() []tensor.Value
	Close()
}

// Options are what a Scheduler needs. The numbers are limits that a stream may only lower.
type Options struct {
	MaxBatchSize int // rows of one run
	// bytes of the inputs of one run with its padding, unless a single row, or the smallest allowed size, has more
	MaxBatchBytes      int64
	BatchTimeout       time.Duration // the longest that a batch which is not full may wait for further rows
	MaxEnqueuedBatches int           // waiting record batches at which the queue is full
	NumBatchThreads    int           // runs at once
	// AllowedBatchSizes are the only numbers of rows that Run is given, ascending: a batch of another size is
	// padded to the next with copies of its first row. None allows all.
	AllowedBatchSizes []int
	// Shrink, if set, says that a run which fails as Exhausted had too many rows for the memory of a device.
	Shrink *Shrink
	// Run feeds graph tensors and fetches others. It takes over the feeds and releases them, also on
	// error. A fault of kind BadRequest says that the rows are to blame. timeout bounds the run, 0
	// is none. It is called by several goroutines at once.
	Run func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error)
	// Stuck is called when a run has ignored its timeout for 10 s. It ends the process; only that
	// ends such a run.
	Stuck  func(timeout time.Duration)
	Memory memory.Allocator // for what is joined; 64-byte aligned and off the Go heap
	Log    *zap.Logger
}

// Shrink is how a scheduler gets along with the memory of a device. A run that does not fit is cut in two, or with
// AllowedBatchSizes to the next lower one, and no later run has more rows than that.
type Shrink struct {
	// Fits is called when a run has succeeded with fewer rows than one that failed before, with the most rows
	// that a run has from then on.
	Fits func(rows int)
	// Pressed is called when a run fails that cannot have fewer rows. It is tried once more after Wait, in which
	// others may give memory back, and then fails for good.
	Pressed func()
	Wait    time.Duration
}

// Counts are what a scheduler has done so far.
type Counts struct {
	Runs       int64
	JoinedRuns int64         // that served more than one stream
	RunTime    time.Duration // of all runs; those at once count each
	QueueTime  time.Duration // that tasks have waited
	Queued     int64         // rows that wait now
}

// Scheduler runs the tasks of all streams of one model. It is safe for concurrent use.
type Scheduler struct {
	options Options
	threads sync.WaitGroup

	runs, joined       atomic.Int64
	runTime, queueTime atomic.Int64 // nanoseconds
	recent             atomic.Int64 // how long the last run took, in nanoseconds
	most               atomic.Int64 // rows of one run, also where a stream is not to be cut; lowered by Shrink
	told               atomic.Int64 // what Fits was called with, or most at the start

	mu      sync.Mutex // guards the fields below, and those of tasks and streams
	work    *sync.Cond // there may be a batch to run
	turns   []*Stream  // streams with waiting tasks; the first has its turn
	waiting int        // tasks
	closed  bool
	timer   *time.Timer // wakes a thread when a batch has waited for long enough
}

// New returns a scheduler with its threads running.
func New(options Options) *Scheduler {
	s := &Scheduler{options: options}
	s.most.Store(math.MaxInt)
	if len(options.AllowedBatchSizes) > 0 {
		s.most.Store(int64(s.allowed(options.MaxBatchSize)))
	}
	s.told.Store(s.most.Load())
	s.work = sync.NewCond(&s.mu)
	s.timer = time.AfterFunc(time.Hour, func() {
		s.mu.Lock() // else it could come between a thread's last look and its wait
		defer s.mu.Unlock()
		s.work.Broadcast()
	})
	for range max(options.NumBatchThreads, 1) {
		s.threads.Go(s.thread)
	}
	return s
}

// Counts returns what was done so far, and what waits.
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

// Full reports whether max_enqueued_batches record batches are waiting, each of its stream, and for
// how long, about, a new stream had better stay away.
func (s *Scheduler) Full() (retryAfter time.Duration, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.turns) < s.options.MaxEnqueuedBatches {
		return 0, false
	}
	took := time.Duration(s.recent.Load()) * time.Duration(s.waiting/max(s.options.NumBatchThreads, 1))
	return min(max(took, 50*time.Millisecond), 5*time.Second), true
}

// Close waits for the runs under way and ends the threads. Tasks that wait fail as Unavailable.
func (s *Scheduler) Close() {
	s.mu.Lock()
	s.closed = true
	s.timer.Stop()
	for _, stream := range s.turns {
		for _, t := range stream.tasks {
			t.answer(result{err: errClosed})
		}
		stream.tasks = nil
	}
	s.turns, s.waiting = nil, 0
	s.mu.Unlock()
	s.work.Broadcast()
	s.threads.Wait()
}

var errClosed = fault.New(fault.Unavailable, "the server is ending; ask again")

// allowed returns the largest allowed batch size up to a number of rows, at least the smallest there is.
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

// padded returns the rows that a run of so many gets.
func (s *Scheduler) padded(rows int) int {
	for _, size := range s.options.AllowedBatchSizes {
		if size >= rows {
			return size
		}
	}
	return rows
}

// shrink keeps later runs below one of so many rows, which the device had no memory for, where that can be.
func (s *Scheduler) shrink(rows int) {
	rows = s.padded(rows)
	lower := int64(rows+1) / 2
	if len(s.options.AllowedBatchSizes) > 0 {
		lower = int64(s.allowed(rows - 1))
	}
	for {
		most := s.most.Load()
		if lower >= min(most, int64(rows)) || s.most.CompareAndSwap(most, lower) {
			return
		}
	}
}

// fits tells how many rows fit, once something has run since that was found.
func (s *Scheduler) fits() {
	if s.options.Shrink == nil {
		return
	}
	if most := s.most.Load(); s.told.Swap(most) != most {
		s.options.Shrink.Fits(int(most))
	}
}

// tooLarge reports whether a run failed, or would fail, for the number of its rows.
func (s *Scheduler) tooLarge(err error) bool {
	kind, ok := fault.KindOf(err)
	return err == errTooLarge || s.options.Shrink != nil && ok && kind == fault.Exhausted
}

// errTooLarge is the result of a task that no run may have.
var errTooLarge = fault.New(fault.Exhausted, "its outputs depend on all rows of a run together, "+
	"and it has more rows than one run may have; send fewer rows in a record batch")

// Call is what a stream asks of each run.
type Call struct {
	Fetches []string
	Timeout time.Duration // bounds each run; 0 is none
	// Check says what is wrong with the outputs of a run of so many rows; nil is nothing. It is
	// called before they are cut.
	Check func(outputs []tensor.Value, rows int) error
	// Limits are the stream's own.
	Limits Limits
}

// Limits are what a stream asks of batching. Numbers may only lower the scheduler's; 0 leaves
// them, but a stream waits for others only if it says so.
type Limits struct {
	// each record batch is one run, unless it is larger than all allowed batch sizes or a device's memory, or its
	// padding too large
	Off          bool
	Alone        bool // record batches are cut, but not joined with other streams'
	MaxBatchSize int
	BatchTimeout time.Duration
}

// Stream is one stream's place in the queue, for one record batch after the other.
type Stream struct {
	scheduler *Scheduler
	call      Call
	key       string // of what its tasks may run together with, without the shapes

	tasks []*task // waiting, the oldest first; guarded by scheduler.mu
}

// Stream returns a place for a stream. It needs no closing.
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

// most returns the rows that a run of the stream may have.
func (st *Stream) most() int {
	most := int(st.scheduler.most.Load())
	if !st.call.Limits.Off {
		most = min(most, st.call.Limits.MaxBatchSize)
	}
	return most
}

// task is a piece of a stream's record batch.
type task struct {
	stream *Stream
	key    string // tasks of one key may run together; "" runs alone
	feeds  []tensor.Feed
	rows   int
	bytes  int64
	queued time.Time
	done   chan result // takes one

	// Guarded by the scheduler's mu.
	taken   bool     // by a thread
	left    bool     // its stream waits no more
	running *running // its run, once that has begun
}

// running is a run under way.
type running struct {
	callers int           // tasks whose stream waits; guarded by the scheduler's mu
	gone    chan struct{} // closed when there are none left
}

// result is what becomes of a task.
type result struct {
	outputs *share // of the run; nil with err
	values  []tensor.Value
	err     error
	checked bool // err is of Call.Check: no row is to blame
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

// share closes outputs with the last of those who have a part of them.
type share struct {
	outputs Outputs
	owners  atomic.Int32
}

func (s *share) close() {
	if s.owners.Add(-1) == 0 {
		s.outputs.Close()
	}
}

// answer gives the task its result, or closes it if nobody waits any more. The feeds are released.
// The scheduler's mu is held.
func (t *task) answer(r result) {
	tensor.ReleaseFeeds(t.feeds)
	t.feeds = nil
	if t.left {
		r.close()
		return
	}
	t.done <- r
}

// submit queues a task, which takes over the feeds.
func (st *Stream) submit(feeds []tensor.Feed, rows int, alone bool) *task {
	t := &task{stream: st, feeds: feeds, rows: rows, queued: time.Now(), done: make(chan result, 1)}
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
		t.answer(result{err: errClosed})
		return t
	}
	if len(st.tasks) == 0 {
		s.turns = append(s.turns, st)
	}
	st.tasks = append(st.tasks, t)
	s.waiting++
	s.work.Signal()
	return t
}

// wait returns the task's result. When ctx ends first, a task that waits is dropped, and what a
// task that runs brings is closed when it comes.
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
		t.left = true
		if !t.taken {
			s.remove(t)
			t.answer(result{})
		} else if r := t.running; r != nil {
			if r.callers--; r.callers == 0 {
				close(r.gone)
			}
		}
	}
	return result{err: ctx.Err()}
}

// remove takes a waiting task out of the queue. mu is held.
func (s *Scheduler) remove(t *task) {
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

// next waits for a batch and takes it.
func (s *Scheduler) next() []*task {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed {
		if tasks := s.take(time.Now()); tasks != nil {
			return tasks
		}
		s.work.Wait()
	}
	return nil
}

// take returns the batch whose turn it is: the task of the first stream, and those of other
// streams that may run with it. One that is not full and may wait longer is passed over. mu is
// held.
func (s *Scheduler) take(now time.Time) []*task {
	var wake time.Time
	for _, first := range s.turns {
		tasks, ready := s.gather(first)
		if due := tasks[0].queued.Add(first.call.Limits.BatchTimeout); !ready && due.After(now) {
			if wake.IsZero() || due.Before(wake) {
				wake = due
			}
			continue
		}
		for _, t := range tasks {
			t.taken = true
			s.remove(t)
			s.queueTime.Add(int64(now.Sub(t.queued)))
		}
		for _, t := range tasks { // behind all others, if they have more
			if at := slices.Index(s.turns, t.stream); at >= 0 {
				s.turns = append(slices.Delete(s.turns, at, at+1), t.stream)
			}
		}
		if s.waiting > 0 {
			s.work.Signal()
		}
		return tasks
	}
	if !wake.IsZero() {
		s.timer.Reset(wake.Sub(now))
	}
	return nil
}

// gather returns the first task of a stream with those of other streams that fit into its batch,
// in the order of their turns, and whether there is nothing to wait for. mu is held.
func (s *Scheduler) gather(first *Stream) (tasks []*task, ready bool) {
	seed := first.tasks[0]
	tasks = []*task{seed}
	if seed.key == "" {
		return tasks, true
	}
	rows, bytes, most := seed.rows, seed.bytes, first.most()
	for _, st := range s.turns {
		t := st.tasks[0]
		if st == first || t.key != seed.key {
			continue
		}
		// What fits into the padding costs nothing.
		more := s.padded(rows + t.rows)
		if rows+t.rows > most || more > s.padded(rows) &&
			int64(more)*((bytes+t.bytes)/int64(rows+t.rows)) > s.options.MaxBatchBytes {
			ready = true // waiting would not make it fuller, only those that follow wait longer
			continue
		}
		rows, bytes = rows+t.rows, bytes+t.bytes
		tasks = append(tasks, t)
	}
	return tasks, ready || rows >= most || first.call.Limits.BatchTimeout == 0
}

// serve runs one batch and answers its tasks.
func (s *Scheduler) serve(tasks []*task) {
	started := time.Now()
	tasks, under := s.begin(tasks)
	if len(tasks) == 0 {
		return
	}
	total := rowsOf(tasks)
	if int64(total) > s.most.Load() { // since it was queued
		if len(tasks) > 1 {
			s.part(tasks)
		} else { // its stream cuts it again
			s.deliver(tasks, started, nil, errTooLarge)
		}
		return
	}
	outputs, err := s.run(tasks, under)
	switch {
	case err == nil:
		s.fits()
	case s.tooLarge(err):
		s.shrink(total)
	}
	switch {
	case err == errAnswered:
	case err != nil && len(tasks) > 1:
		s.part(tasks) // one stream's rows may be to blame; the others' must not suffer, nor hear of them
	default:
		s.deliver(tasks, started, outputs, err)
	}
}

// part puts tasks that ran together back, each to run alone.
func (s *Scheduler) part(tasks []*task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range tasks {
		switch t.key, t.running = "", nil; {
		case t.left, s.closed:
			t.answer(result{err: errClosed})
			continue
		case len(t.stream.tasks) == 0:
			s.turns = append(s.turns, t.stream)
		}
		t.taken = false
		t.stream.tasks = slices.Insert(t.stream.tasks, 0, t)
		s.waiting++
	}
	s.work.Broadcast()
}

// begin drops the tasks whose stream has left and notes the run of the others.
func (s *Scheduler) begin(tasks []*task) ([]*task, *running) {
	s.mu.Lock()
	defer s.mu.Unlock()
	under := &running{gone: make(chan struct{})}
	stay := make([]*task, 0, len(tasks))
	for _, t := range tasks {
		if t.left {
			t.answer(result{})
			continue
		}
		t.running = under
		under.callers++
		stay = append(stay, t)
	}
	return stay, under
}

func rowsOf(tasks []*task) (rows int) {
	for _, t := range tasks {
		rows += t.rows
	}
	return rows
}

// join returns the feeds of one run. Those of a single task are its own with references of
// their own; those of several, and what is padded, are copied together.
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

// errAnswered says that the tasks were answered, or left, while their run went on.
var errAnswered = fmt.Errorf("answered already")

// outcome is what comes of a run.
type outcome struct {
	outputs Outputs
	err     error
}

// run runs tasks together. It does not wait for a run that ignores its timeout, whose tasks are
// answered then, or whose streams have all left: TensorFlow cannot be stopped, but the thread has
// others to serve.
func (s *Scheduler) run(tasks []*task, under *running) (Outputs, error) {
	call := tasks[0].stream.call
	feeds, err := s.join(tasks)
	if err != nil {
		return nil, err
	}
	s.runs.Add(1)
	if len(tasks) > 1 {
		s.joined.Add(1)
	}
	done := make(chan outcome, 1)
	started := time.Now()
	go func() { // ends with the run
		var o outcome
		defer func() { done <- o }()
		defer s.guard(&o.err)
		o.outputs, o.err = s.options.Run(feeds, call.Fetches, call.Timeout)
	}()
	var late, stuck <-chan time.Time // never, without a timeout
	if call.Timeout > 0 {
		late, stuck = time.After(call.Timeout+lateAnswer), time.After(call.Timeout+lateEnd)
	}
	select {
	case o := <-done:
		took := int64(time.Since(started))
		s.recent.Store(took)
		s.runTime.Add(took)
		return o.outputs, o.err
	case <-under.gone:
		// The last who left have been told; deliver gives the tasks back.
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

// deliver gives each task its rows of the outputs, and drops those of the padding.
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
		t.answer(r)
	}
}
