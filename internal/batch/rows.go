// Rows: how many a task should have, from how long a row takes.

package batch

import (
	"math"
	"time"
)

// A record batch is cut into at least as many tasks as there are threads, if each then takes leastWork, since a run
// costs some 50 µs by itself. A task takes mostWork at most, unless that were fewer than fewRows. Networks of pictures
// were fastest with 4 to 16 rows a run.
const (
	leastWork = 500 * time.Microsecond
	mostWork  = 30 * time.Millisecond
	fewRows   = 4
)

// aloneWork is how long a run takes for which more threads pay.
const aloneWork = 2 * time.Millisecond

// learnt is the share of a new measurement in the time of a row.
const learnt = 8

// learn keeps how long a row takes. A faster run counts at once: what slows a run down, such as the first of its kind,
// passes.
func (s *Scheduler) learn(took time.Duration, rows int) {
	now := max(int64(took)/int64(rows), 1)
	known := s.rowTime.Load()
	if known > 0 && now > known {
		now = known + (now-known)/learnt
	}
	s.rowTime.Store(now)
}

// mostRows returns how many rows a run should have at most.
func (s *Scheduler) mostRows() int {
	row := s.rowTime.Load()
	if !s.options.Spread || row == 0 {
		return math.MaxInt
	}
	return max(int(int64(mostWork)/row), fewRows)
}

// taskRows returns how many rows a task should have of a record batch with so many.
func (s *Scheduler) taskRows(rows int) int {
	if !s.options.Spread {
		return rows
	}
	even := (rows-1)/s.options.NumBatchThreads + 1
	row := s.rowTime.Load()
	if row == 0 { // not known yet
		return max(even, fewRows)
	}
	return min(max(even, int(int64(leastWork)/row)), s.mostRows())
}

// isAlone reports whether a batch is one record batch, which nothing else waits beside, and takes so long that more
// threads would shorten it.
func (s *Scheduler) isAlone(tasks []*task) bool {
	if len(tasks) > 1 || !tasks[0].whole || time.Duration(s.rowTime.Load())*time.Duration(tasks[0].rows) < aloneWork {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting == 0
}
