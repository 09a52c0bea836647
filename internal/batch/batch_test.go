// Tests of cutting, joining, padding, halving and leaving, on a machine that stands for TensorFlow.

package batch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// machine stands for TensorFlow: y is x + 1, for int64 rows of any width. It refuses a run that has a negative x. It
// notes which runs there were.
type machine struct {
	mem    *offheap.Allocator
	before func(first int64) // called by each run with its first number
	open   atomic.Int64      // outputs that were not closed
	room   atomic.Int64      // rows of a run for which there is memory, 0 is any number

	mu   sync.Mutex
	runs [][]int64 // the numbers of each run
	rows []int     // of each run
}

var errFull = fault.New(fault.Exhausted, "the device is full")

type outputs struct {
	machine *machine
	values  []tensor.Value
}

func (o *outputs) Values() []tensor.Value { return o.values }

func (o *outputs) Close() {
	for i := range o.values {
		o.values[i].Release()
	}
	o.machine.open.Add(-1)
}

func numbers(v tensor.Value) []int64 {
	list := make([]int64, len(v.Data)/8)
	for i := range list {
		list[i] = int64(binary.LittleEndian.Uint64(v.Data[8*i:]))
	}
	return list
}

func (m *machine) run(feeds []tensor.Feed, _ []string, _ time.Duration) (Outputs, error) {
	defer tensor.ReleaseFeeds(feeds)
	x := numbers(feeds[0].Value)
	m.mu.Lock()
	m.runs, m.rows = append(m.runs, x), append(m.rows, int(feeds[0].Value.Rows()))
	m.mu.Unlock()
	if m.before != nil {
		m.before(x[0])
	}
	if room := m.room.Load(); room > 0 && feeds[0].Value.Rows() > room {
		return nil, errFull
	}
	if slices.ContainsFunc(x, func(n int64) bool { return n < 0 }) {
		return nil, fault.New(fault.BadRequest, "there is a negative number")
	}
	y := tensor.Allocate(savedmodel.Int64, feeds[0].Value.Shape, m.mem)
	for i, n := range x {
		binary.LittleEndian.PutUint64(y.Data[8*i:], uint64(n+1))
	}
	m.open.Add(1)
	return &outputs{m, []tensor.Value{y}}, nil
}

// newScheduler returns a scheduler on a machine. At the end of the test no goroutine, byte or output may be left.
func newScheduler(t *testing.T, change func(*Options)) (*Scheduler, *machine) {
	t.Helper()
	m := &machine{mem: &offheap.Allocator{}}
	options := Options{
		MaxBatchSize: 8, MaxBatchBytes: 1 << 20, BatchTimeout: time.Second, MaxEnqueuedBatches: 3, NumBatchThreads: 2,
		Run: m.run, Memory: m.mem, Log: zap.NewNop(), Stuck: func(time.Duration) { t.Error("a run was stuck") },
	}
	if change != nil {
		change(&options)
	}
	s := New(options)
	t.Cleanup(func() {
		s.Close()
		if n := m.mem.Live(); n != 0 {
			t.Errorf("%d bytes were not freed", n)
		}
		if n := m.open.Load(); n != 0 {
			t.Errorf("%d outputs were not closed", n)
		}
		goleak.VerifyNone(t)
	})
	return s, m
}

func feed(m *machine, width int, x ...int64) []tensor.Feed {
	v := tensor.Allocate(savedmodel.Int64, []int64{int64(len(x) / width), int64(width)}, m.mem)
	for i, n := range x {
		binary.LittleEndian.PutUint64(v.Data[8*i:], uint64(n))
	}
	return []tensor.Feed{{Tensor: "x:0", Value: v}}
}

func call(limits Limits) Call {
	return Call{Fetches: []string{"y:0"}, Limits: limits, Check: func(values []tensor.Value, rows int) error {
		if values[0].Rows() != int64(rows) {
			return fault.New(fault.BadRequest, "%d rows for %d", values[0].Rows(), rows)
		}
		return nil
	}}
}

// answer runs a record batch of rows of one number; the answer is closed at the end of the test.
func answer(t *testing.T, s *Scheduler, m *machine, limits Limits, x ...int64) *Answer {
	t.Helper()
	a, err := s.Stream(call(limits)).Run(t.Context(), feed(m, 1, x...), len(x), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func (s *Scheduler) queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// runMixed runs random record batches, some with rows to refuse, of many streams at once with all kinds of limits, and
// compares each answer.
func runMixed(t *testing.T, s *Scheduler, m *machine, seed uint64, batches int) {
	t.Helper()
	var working sync.WaitGroup
	for stream := range 12 {
		working.Go(func() {
			r := rand.New(rand.NewPCG(uint64(stream), seed))
			limits := []Limits{{}, {Off: true}, {MaxBatchSize: 3}, {BatchTimeout: 2 * time.Millisecond},
				{MaxBatchSize: 100}, {Alone: true}}[stream%6]
			st := s.Stream(call(limits))
			for range batches {
				width, rows := 1+r.IntN(2), 1+r.IntN(20)
				x := make([]int64, rows*width)
				bad := map[int]bool{}
				for i := range x {
					if x[i] = r.Int64N(1000); r.IntN(30) == 0 {
						x[i], bad[i/width] = -1, true
					}
				}
				a, err := st.Run(t.Context(), feed(m, width, x...), rows, false)
				if err != nil {
					t.Error(err)
					return
				}
				var want []int64
				for i, n := range x {
					if !bad[i/width] {
						want = append(want, n+1)
					}
				}
				var got []int64
				if a.Values != nil {
					got = numbers(a.Values[0])
				}
				if len(a.Refused) != len(bad) || !slices.Equal(got, want) {
					t.Errorf("stream %d: %v became %v, refused %v", stream, x, got, a.Refused)
				}
				for row := range a.Refused {
					if !bad[row] {
						t.Errorf("row %d of %v was refused", row, x)
					}
				}
				if a.TFRows < rows-len(bad) {
					t.Errorf("%d rows of runs for %d rows", a.TFRows, rows)
				}
				a.Close()
			}
		})
	}
	working.Wait()
}

func TestRowsComeBack(t *testing.T) {
	s, m := newScheduler(t, nil)
	runMixed(t, s, m, 5, 60)
	if c := s.Counts(); c.JoinedRuns == 0 || c.JoinedRuns >= c.Runs || c.Runs != int64(len(m.runs)) {
		t.Errorf("%+v of %d runs", c, len(m.runs))
	}
	for _, rows := range m.rows {
		if rows > 20 {
			t.Errorf("a run of %d rows", rows)
		}
	}
}

// TestAllowedBatchSizes prescribes random batch sizes, on devices with and without room for the largest of them. Limits
// of bytes and of streams that fit no size must not bring in another.
func TestAllowedBatchSizes(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		var sizes []int
		for size := 1 + r.IntN(4); size <= 1+r.IntN(40); size += 1 + r.IntN(9) {
			sizes = append(sizes, size)
		}
		if len(sizes) == 0 {
			sizes = []int{4}
		}
		room := 0
		if seed%2 == 1 {
			room = sizes[r.IntN(len(sizes))]
		}
		t.Run(fmt.Sprintf("%v room %d", sizes, room), func(t *testing.T) {
			var fits atomic.Int64
			s, m := newScheduler(t, func(o *Options) {
				o.AllowedBatchSizes, o.MaxBatchSize = sizes, sizes[len(sizes)-1]
				o.Shrink = &Shrink{Fits: func(rows int) { fits.Store(int64(rows)) },
					Pressed: func() { t.Error("pressed, with room for a run") }}
				if seed%3 == 0 {
					o.MaxBatchBytes = 24
				}
			})
			m.room.Store(int64(room))
			runMixed(t, s, m, seed, 20)
			for _, rows := range m.rows {
				if !slices.Contains(sizes, rows) {
					t.Errorf("a run of %d rows", rows)
				}
			}
			if got := int(fits.Load()); got != 0 && got != room {
				t.Errorf("told that %d rows fit, there is room for %d", got, room)
			}
		})
	}
}

func TestPadding(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) { o.AllowedBatchSizes, o.MaxBatchSize = []int{2, 8}, 8 })
	x := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}
	a := answer(t, s, m, Limits{Off: true}, x...)
	if got := numbers(a.Values[0]); len(got) != 11 || got[10] != 12 || a.TFRows != 11 {
		t.Errorf("%v of %d rows", got, a.TFRows)
	}
	slices.SortFunc(m.runs, func(a, b []int64) int { return int(a[0] - b[0]) })
	if got := fmt.Sprint(m.runs); got != "[[1 2 3 4 5 6 7 8] [9 10 11 9 9 9 9 9]]" {
		t.Errorf("the runs were %s", got)
	}
}

// TestTooLargeForTheDevice finds by halving how many rows fit, and remembers it.
func TestTooLargeForTheDevice(t *testing.T) {
	var told []int
	s, m := newScheduler(t, func(o *Options) {
		o.NumBatchThreads, o.MaxBatchSize = 1, 100
		o.Shrink = &Shrink{Fits: func(rows int) { told = append(told, rows) }, Pressed: func() { t.Error("pressed") }}
	})
	m.room.Store(30)
	x := make([]int64, 100)
	for i := range x {
		x[i] = int64(i)
	}
	for _, limits := range []Limits{{}, {Off: true}, {}} {
		for i, n := range numbers(answer(t, s, m, limits, x...).Values[0]) {
			if n != int64(i)+1 {
				t.Fatalf("row %d became %d", i, n)
			}
		}
	}
	if got := fmt.Sprint(m.rows); got != "[100 50 25 25 25 25 25 25 25 25 25 25 25 25]" {
		t.Errorf("runs of %s rows", got)
	}
	if !slices.Equal(told, []int{25}) {
		t.Errorf("told %v", told)
	}
}

// TestLimitFallsBeforeAJoinedRun lowers the row limit after two tasks were joined and before they run.
func TestLimitFallsBeforeAJoinedRun(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) {
		o.NumBatchThreads = 1
		o.Shrink = &Shrink{Fits: func(int) {}, Pressed: func() { t.Error("pressed, with room for each of the two") }}
	})
	release := busy(t, s, m)
	var working sync.WaitGroup
	start(t, s, m, &working, Limits{}, 1)
	start(t, s, m, &working, Limits{}, 2)
	s.mu.Lock()
	tasks := s.takeLocked(time.Now())
	s.mu.Unlock()
	s.shrink(2)
	s.serve(tasks)
	release()
	working.Wait()
	if got := fmt.Sprint(m.runs[1:]); len(tasks) != 2 || len(m.runs) != 3 {
		t.Errorf("the runs of %d tasks were %s", len(tasks), got)
	}
}

// TestNoRoomForOneRow asks others to make room, once.
func TestNoRoomForOneRow(t *testing.T) {
	pressed, lasting := 0, false
	var m *machine
	s, made := newScheduler(t, func(o *Options) {
		o.NumBatchThreads = 1
		o.Shrink = &Shrink{Fits: func(int) {}, Wait: time.Millisecond, Pressed: func() {
			if pressed++; !lasting {
				m.room.Store(0)
			}
		}}
		run := o.Run
		o.Run = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
			if m.room.Load() == 1 {
				tensor.ReleaseFeeds(feeds)
				return nil, errFull
			}
			return run(feeds, fetches, timeout)
		}
	})
	m = made
	m.room.Store(1)
	a, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 1, 2, 3, -4), 4, false)
	// The row behind it may have run already when the first found no room.
	if err != nil || pressed < 1 || pressed > 2 || fmt.Sprint(numbers(a.Values[0]), len(a.Refused)) != "[2 3 4] 1" {
		t.Fatalf("pressed %d times, %v", pressed, err)
	}
	a.Close()

	m.room.Store(1)
	lasting = true
	_, err = s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 1, 2), 2, false)
	expect.Fault(t, err, fault.Exhausted, "a run of 1 rows, the smallest possible, failed twice",
		"the device is full")
	ctx, cancel := context.WithCancel(t.Context())
	s.options.Shrink.Wait, s.options.Shrink.Pressed = time.Hour, cancel
	if _, err = s.Stream(call(Limits{})).Run(ctx, feed(m, 1, 1), 1, false); !errors.Is(err, context.Canceled) {
		t.Errorf("a stream that left waits for memory: %v", err)
	}
}

// busy keeps the only thread in a run until the result is called.
func busy(t *testing.T, s *Scheduler, m *machine) (release func()) {
	t.Helper()
	held, running := make(chan struct{}), make(chan struct{})
	m.before = func(first int64) {
		if first == 1_000_000 {
			close(running)
			<-held
		}
	}
	var working sync.WaitGroup
	working.Go(func() {
		a, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 1_000_000), 1, false)
		if err != nil {
			t.Error(err)
			return
		}
		a.Close()
	})
	<-running
	return func() {
		close(held)
		working.Wait()
	}
}

func one(o *Options) { o.NumBatchThreads = 1 }

// start runs a record batch in the background and waits until it is queued.
func start(t *testing.T, s *Scheduler, m *machine, working *sync.WaitGroup, limits Limits, x ...int64) {
	t.Helper()
	before := s.queued()
	working.Go(func() {
		a, err := s.Stream(call(limits)).Run(t.Context(), feed(m, 1, x...), len(x), false)
		if err != nil {
			t.Error(err)
			return
		}
		defer a.Close()
		for i, n := range numbers(a.Values[0]) {
			if n != x[i]+1 {
				t.Errorf("%v became %v", x, numbers(a.Values[0]))
			}
		}
	})
	expect.Eventually(t, "it is queued", func() bool { return s.queued() > before })
}

// TestWaitingStreamsAreJoined has record batches that all wait for the only thread.
func TestWaitingStreamsAreJoined(t *testing.T) {
	bulk := make([]int64, 24)
	for i := range bulk {
		bulk[i] = int64(i)
	}
	for name, c := range map[string]struct {
		bytes   int64
		sizes   []int
		batches [][]int64
		alone   int // the batch that is not joined with others
		want    string
	}{
		"a row too many for the first batch": {1 << 20, nil, [][]int64{{1, 2}, {3}, {4, 5, 6}, {7, 8, 9, 10}, {11}}, 1,
			"[[1 2 4 5 6 11] [3] [7 8 9 10]]"},
		"a bulk beside a row that came later": {1 << 20, nil, [][]int64{bulk, {100}}, -1,
			"[[0 1 2 3 4 5 6 7] [100] [8 9 10 11 12 13 14 15] [16 17 18 19 20 21 22 23]]"},
		"padded to more bytes than a run has": {32, []int{1, 3, 100}, [][]int64{{1}, {2}, {3}, {4}, {5, 6, 7, 8}}, 4,
			"[[1 2 3] [5 6 7] [4] [8]] or [[1 2 3] [4] [5 6 7] [8]]"},
		"a row larger than all bounds is padded anyway": {8, []int{2, 4}, [][]int64{{1}, {2}, {3}}, -1,
			"[[1 2] [3 3]]"},
	} {
		t.Run(name, func(t *testing.T) {
			s, m := newScheduler(t, func(o *Options) {
				if o.NumBatchThreads, o.MaxBatchBytes = 1, c.bytes; c.sizes != nil {
					o.AllowedBatchSizes, o.MaxBatchSize = c.sizes, c.sizes[len(c.sizes)-1]
				}
			})
			release := busy(t, s, m)
			var working sync.WaitGroup
			for i, x := range c.batches {
				start(t, s, m, &working, Limits{Off: i == c.alone}, x...)
			}
			release()
			working.Wait()
			got := fmt.Sprint(m.runs[1:])
			if !slices.Contains(strings.Split(c.want, " or "), got) || s.Counts().Runs != int64(len(m.runs)) {
				t.Errorf("the runs were %s", got)
			}
		})
	}
}

func TestAWholeBatchIsNotTouched(t *testing.T) {
	s, m := newScheduler(t, nil)
	var fed *byte
	s.options.Run = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
		fed = &feeds[0].Value.Data[0]
		return m.run(feeds, fetches, timeout)
	}
	x := feed(m, 1, 1, 2, 3, 4, 5, 6, 7, 8)
	first := &x[0].Value.Data[0]
	a, err := s.Stream(call(Limits{})).Run(t.Context(), x, 8, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if fed != first || len(m.runs) != 1 || a.TFRows != 8 {
		t.Errorf("copied: %t, in %d runs of %d rows", fed != first, len(m.runs), a.TFRows)
	}
}

func TestBytesBoundARun(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) { o.MaxBatchBytes = 48 })
	a, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 5, false)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if got := numbers(a.Values[0]); len(m.runs) != 2 || !slices.Equal(got, []int64{2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) {
		t.Errorf("%v in runs of %v", got, m.runs)
	}
}

// TestBatchTimeout makes a batch wait for a second stream, though the thread is idle.
func TestBatchTimeout(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) { o.BatchTimeout = 5 * time.Second })
	var working sync.WaitGroup
	started := time.Now()
	limits := Limits{MaxBatchSize: 3, BatchTimeout: time.Hour} // lowered to 5 s
	start(t, s, m, &working, limits, 1, 2)
	working.Go(func() {
		a, err := s.Stream(call(limits)).Run(t.Context(), feed(m, 1, 3), 1, false)
		if err != nil {
			t.Error(err)
			return
		}
		a.Close()
	})
	working.Wait()
	if len(m.runs) != 1 || time.Since(started) > 4*time.Second {
		t.Errorf("runs of %v after %s: a full batch does not wait", m.runs, time.Since(started))
	}
	limits.BatchTimeout = 20 * time.Millisecond
	if a := answer(t, s, m, limits, 4); a.Queue < 20*time.Millisecond {
		t.Errorf("alone it waited %v", a.Queue)
	}
}

func TestRefusedRowsAreFound(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) { o.MaxBatchSize = 1024 })
	st := s.Stream(call(Limits{}))
	x := make([]int64, 1000)
	x[500], x[3], x[999] = -1, -2, -3
	a, err := st.Run(t.Context(), feed(m, 1, x...), len(x), false)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Refused) != 3 || a.Refused[3] == "" || a.Refused[500] == "" ||
		a.Refused[999] != "there is a negative number" || len(numbers(a.Values[0])) != 997 {
		t.Errorf("refused %v", a.Refused)
	}
	a.Close()

	m.runs = nil
	if a, err = st.Run(t.Context(), feed(m, 1, x...), len(x), true); err != nil {
		t.Fatal(err)
	}
	if len(a.Refused) != 1 || a.Refused[3] == "" || len(m.runs) > 12 {
		t.Errorf("the first: %v, in %d runs", a.Refused, len(m.runs))
	}
	a.Close()

	m.runs = nil
	for i := range x {
		x[i] = int64(-(i % 2))
	}
	if a, err = st.Run(t.Context(), feed(m, 1, x...), len(x), false); err != nil {
		t.Fatal(err)
	}
	if n := len(m.runs); n > maxRuns || n < maxRuns-1 {
		t.Errorf("%d runs to find half of 1,000 rows", len(m.runs))
	}
	ran := 0
	if a.Values != nil {
		ran = len(numbers(a.Values[0]))
	}
	if len(a.Refused)+ran != len(x) || !strings.Contains(a.Refused[999], "refused together") ||
		!strings.Contains(a.Refused[999], "there is a negative number") {
		t.Errorf("%d refused, %d ran; the last: %s", len(a.Refused), ran, a.Refused[999])
	}
	a.Close()
}

// TestOutputsWhoseSizeDependsOnTheRun has outputs as wide as the largest number of the run.
func TestOutputsWhoseSizeDependsOnTheRun(t *testing.T) {
	s, m := newScheduler(t, asWideAsTheRun)
	a := answer(t, s, m, Limits{Off: true}, 1, 2, -1, 3)
	if len(a.Refused) != 1 || !slices.Equal(a.Values[0].Shape, []int64{3, 3}) ||
		fmt.Sprint(m.runs[len(m.runs)-1]) != "[1 2 3]" {
		t.Errorf("%v of runs %v", a.Values[0].Shape, m.runs)
	}
}

// TestSuchOutputsWithAllowedBatchSizes needs a record batch in one run; no allowed size may be large enough.
func TestSuchOutputsWithAllowedBatchSizes(t *testing.T) {
	s, m := newScheduler(t, func(o *Options) {
		o.AllowedBatchSizes, o.MaxBatchSize = []int{2, 4}, 4
		asWideAsTheRun(o)
	})
	b := answer(t, s, m, Limits{Alone: true}, 1, -2, 3)
	if len(b.Refused) != 1 || !slices.Equal(b.Values[0].Shape, []int64{2, 3}) {
		t.Errorf("%v of runs %v", b.Values[0].Shape, m.runs)
	}
	_, err := s.Stream(call(Limits{Alone: true})).Run(t.Context(), feed(m, 1, 1, 1, 1, 1, 5), 5, false)
	expect.Fault(t, err, fault.Exhausted, "more rows than one run may have; send fewer rows in a record batch")
}

func asWideAsTheRun(o *Options) {
	run := o.Run
	o.Run = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
		x := numbers(feeds[0].Value)
		out, err := run(feeds, fetches, timeout)
		if err != nil {
			return nil, err
		}
		y := out.(*outputs)
		wide := tensor.Allocate(savedmodel.Int64, []int64{int64(len(x)), slices.Max(x)}, y.machine.mem)
		clear(wide.Data)
		y.values[0].Release()
		y.values[0] = wide
		return y, nil
	}
}

// TestOtherStreamsAreNotTouched joins a good and a bad stream.
func TestOtherStreamsAreNotTouched(t *testing.T) {
	s, m := newScheduler(t, one)
	release := busy(t, s, m)
	var working sync.WaitGroup
	start(t, s, m, &working, Limits{}, 1, 2)
	working.Go(func() {
		a, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 3, -4), 2, false)
		if err != nil || len(a.Refused) != 1 || a.Refused[1] == "" {
			t.Errorf("%+v, %v", a, err)
			return
		}
		a.Close()
	})
	expect.Eventually(t, "both wait", func() bool { return s.queued() == 2 })
	release()
	working.Wait()
	if got := fmt.Sprint(m.runs[1:]); got != "[[1 2 3 -4] [1 2] [3 -4] [3] [-4]]" {
		t.Errorf("the runs were %s", got)
	}
}

// TestOtherStreamsSeeNoError lets a joined run fail for a reason that no row can be blamed for.
func TestOtherStreamsSeeNoError(t *testing.T) {
	secret := fault.New(fault.Internal, "DATA_LOSS: what is in row 13")
	s, m := newScheduler(t, func(o *Options) {
		run := o.Run
		o.NumBatchThreads = 1
		o.Run = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
			if slices.Contains(numbers(feeds[0].Value), 13) {
				tensor.ReleaseFeeds(feeds)
				return nil, secret
			}
			return run(feeds, fetches, timeout)
		}
	})
	release := busy(t, s, m)
	var working sync.WaitGroup
	start(t, s, m, &working, Limits{}, 1, 2)
	working.Go(func() {
		if _, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 13), 1, false); !errors.Is(err, secret) {
			t.Errorf("got %v", err)
		}
	})
	expect.Eventually(t, "both wait", func() bool { return s.queued() == 2 })
	release()
	working.Wait()
	if c := s.Counts(); c.JoinedRuns != 1 {
		t.Errorf("counted %+v", c)
	}
}

func TestErrorsOfARunAreNotHalved(t *testing.T) {
	var runs atomic.Int64
	for name, c := range map[string]struct {
		run   func() error
		check error
		kind  fault.Kind
		text  string
	}{
		"of TensorFlow": {func() error { return fault.New(fault.Internal, "broken") }, nil, fault.Internal, "broken"},
		"a panic":       {func() error { panic("secret") }, nil, fault.Internal, "its log has the details"},
		"of the check":  {nil, fault.New(fault.BadRequest, "no batch"), fault.BadRequest, "no batch"},
	} {
		t.Run(name, func(t *testing.T) {
			var m *machine
			s, made := newScheduler(t, func(o *Options) {
				o.Run = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
					runs.Add(1)
					if c.check != nil {
						return m.run(feeds, fetches, timeout)
					}
					defer tensor.ReleaseFeeds(feeds)
					return nil, c.run()
				}
			})
			m = made
			runs.Store(0)
			asks := call(Limits{})
			asks.Check = func([]tensor.Value, int) error { return c.check }
			_, err := s.Stream(asks).Run(t.Context(), feed(m, 1, make([]int64, 30)...), 30, false)
			if kind, _ := fault.KindOf(err); kind != c.kind || err == nil ||
				err.Error() != c.text && !strings.Contains(err.Error(), c.text) ||
				strings.Contains(err.Error(), "secret") {
				t.Errorf("got %v", err)
			}
			if n := runs.Load(); n > 4 {
				t.Errorf("%d runs of 4 tasks", n)
			}
		})
	}
}

func TestCallersLeave(t *testing.T) {
	s, m := newScheduler(t, one)
	release := busy(t, s, m)
	ctx, cancel := context.WithCancel(t.Context())
	var working sync.WaitGroup
	for range 3 {
		working.Go(func() {
			_, err := s.Stream(call(Limits{})).Run(ctx, feed(m, 1, make([]int64, 20)...), 20, false)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
	expect.Eventually(t, "all wait", func() bool { return s.queued() == 6 })
	if after, full := s.Full(); !full || after < 50*time.Millisecond || after > 5*time.Second {
		t.Errorf("full: %t, ask again in %s", full, after)
	}
	cancel()
	working.Wait()
	if n := s.queued(); n != 0 {
		t.Errorf("%d tasks wait for nobody", n)
	}
	if _, full := s.Full(); full {
		t.Error("an empty queue is full")
	}
	release()
	if len(m.runs) != 1 {
		t.Errorf("%d runs", len(m.runs))
	}

	// One that leaves while its run is under way does not keep the thread.
	release = busy(t, s, m)
	ctx, cancel = context.WithCancel(t.Context())
	hold := make(chan struct{})
	inner := m.before
	m.before = func(first int64) {
		inner(first)
		if first == 5 {
			cancel()
			<-hold
		}
	}
	release()
	if _, err := s.Stream(call(Limits{})).Run(ctx, feed(m, 1, 5), 1, false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	answer(t, s, m, Limits{}, 6)
	close(hold)
}

// TestARunIgnoresItsTimeout answers the stream before the run ends, and says so in the end.
func TestARunIgnoresItsTimeout(t *testing.T) {
	stuck := make(chan time.Duration, 1)
	hold := make(chan struct{})
	s, m := newScheduler(t, func(o *Options) {
		o.NumBatchThreads = 1
		o.Stuck = func(timeout time.Duration) { stuck <- timeout }
	})
	m.before = func(first int64) {
		if first == 7 {
			<-hold
		}
	}
	c := call(Limits{})
	c.Timeout = time.Millisecond
	_, err := s.Stream(c).Run(t.Context(), feed(m, 1, 7), 1, false)
	if kind, _ := fault.KindOf(err); kind != fault.Deadline {
		t.Fatalf("got %v", err)
	}
	select {
	case <-stuck:
		t.Error("stuck too soon")
	default:
	}
	close(hold) // it ends after all
	a, err := s.Stream(c).Run(t.Context(), feed(m, 1, 8), 1, false)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func TestCloseRefusesWhatWaits(t *testing.T) {
	s, m := newScheduler(t, one)
	release := busy(t, s, m)
	refused := make(chan error, 1)
	go func() {
		_, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 1), 1, false)
		refused <- err
	}()
	expect.Eventually(t, "it waits", func() bool { return s.queued() == 1 })
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	if kind, _ := fault.KindOf(<-refused); kind != fault.Unavailable {
		t.Errorf("kind %d", kind)
	}
	release()
	<-closed
	if _, err := s.Stream(call(Limits{})).Run(t.Context(), feed(m, 1, 1), 1, false); err == nil {
		t.Error("a closed scheduler runs")
	}
}
