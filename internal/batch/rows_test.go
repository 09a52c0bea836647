// Tests of how many rows a task gets, and which runs have all threads.

package batch

import (
	"slices"
	"sync"
	"testing"
	"time"

	"flightsvc/internal/tensor"
)

func TestSpread(t *testing.T) {
	s, _ := newScheduler(t, func(o *Options) { o.Spread, o.MaxBatchSize, o.NumBatchThreads = true, 1024, 4 })
	for _, test := range []struct {
		row    time.Duration // 0: not known yet
		rows   int
		limits Limits
		want   []int // rows of the tasks
	}{
		{rows: 1, want: []int{1}},
		{rows: 8, want: []int{4, 4}},
		{rows: 40, want: []int{10, 10, 10, 10}},
		{row: 10 * time.Microsecond, rows: 30, want: []int{30}},                    // each would be too short
		{row: 10 * time.Microsecond, rows: 120, want: []int{40, 40, 40}},           // three of 0.4 ms
		{row: 10 * time.Microsecond, rows: 2000, want: []int{500, 500, 500, 500}},  // as many as threads
		{row: 3 * time.Millisecond, rows: 100, want: slices.Repeat([]int{10}, 10)}, // of 30 ms
		{row: 20 * time.Millisecond, rows: 16, want: []int{4, 4, 4, 4}},            // never fewer than four for that
		{row: 20 * time.Millisecond, rows: 4, want: []int{1, 1, 1, 1}},             // but for the threads
		{row: 20 * time.Millisecond, rows: 16, limits: Limits{Off: true}, want: []int{16}},
		{row: 20 * time.Millisecond, rows: 16, limits: Limits{Alone: true}, want: []int{16}},
		{row: 20 * time.Millisecond, rows: 16, limits: Limits{MaxBatchSize: 2}, want: slices.Repeat([]int{2}, 8)},
		{row: 20 * time.Hour, rows: 5, want: []int{1, 2, 2}},
	} {
		s.rowTime.Store(int64(test.row))
		var got []int
		for _, task := range s.Stream(call(test.limits)).cut(slice{0, test.rows}, 8) {
			got = append(got, task.hi-task.lo)
		}
		slices.Sort(got)
		if !slices.Equal(got, test.want) {
			t.Errorf("%d rows of %v, %+v: tasks of %v, want %v", test.rows, test.row, test.limits, got, test.want)
		}
	}
}

// TestAllowedSizesAreNotSpread, since the model's owner has chosen them.
func TestAllowedSizesAreNotSpread(t *testing.T) {
	s, _ := newScheduler(t, func(o *Options) {
		o.Spread, o.MaxBatchSize, o.AllowedBatchSizes = true, 64, []int{1, 64}
	})
	s.rowTime.Store(int64(time.Second))
	if got := s.Stream(call(Limits{})).cut(slice{0, 64}, 8); len(got) != 1 {
		t.Errorf("cut into %v", got)
	}
}

func TestTheTimeOfARow(t *testing.T) {
	s, _ := newScheduler(t, nil)
	for _, step := range []struct{ took, want time.Duration }{
		{800, 100}, {80, 10}, {720, 20}, {0, 1},
	} {
		s.learn(step.took, 8)
		if got := time.Duration(s.rowTime.Load()); got != step.want {
			t.Errorf("after a run of %d ns a row takes %d ns, want %d", step.took, got, step.want)
		}
	}
}

// TestAlone gives all threads to a record batch beside which nothing runs, if it takes long enough.
func TestAlone(t *testing.T) {
	var mu sync.Mutex
	alone := 0
	s, m := newScheduler(t, func(o *Options) {
		run := o.Run
		o.Spread = true
		o.RunAlone = func(feeds []tensor.Feed, fetches []string, timeout time.Duration) (Outputs, error) {
			mu.Lock()
			defer mu.Unlock()
			alone++
			return run(feeds, fetches, timeout)
		}
	})
	answer(t, s, m, Limits{}, 1)
	s.rowTime.Store(int64(time.Second))
	answer(t, s, m, Limits{}, 1)
	if alone != 1 || time.Duration(s.rowTime.Load()) != time.Second {
		t.Errorf("%d runs had all threads, and then a row takes %v", alone, time.Duration(s.rowTime.Load()))
	}
	answer(t, s, m, Limits{}, 1, 2) // in two tasks
	if alone != 1 {
		t.Error("one of two tasks had all threads")
	}
	s.rowTime.Store(int64(time.Second))
	release := busy(t, s, m)
	if alone != 2 {
		t.Fatal("the run that is alone has not all threads")
	}
	answer(t, s, m, Limits{}, 1)
	release()
	if alone != 2 {
		t.Error("two runs at once had all threads")
	}
}
