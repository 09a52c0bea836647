// A stream's record batch on its way: cut into tasks, run, halved where TensorFlow refuses it, and put together again.

package batch

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"flightsvc/internal/fault"
	"flightsvc/internal/tensor"
)

// maxRuns bounds the runs that the search for the rows to blame in one record batch may take, one that was refused
// included. 21 find one row among 1,024.
const maxRuns = 64

// Answer is the outcome of one record batch.
type Answer struct {
	// Values are the outputs of the rows that were not refused, in the order of Call.Fetches; nil if
	// none is left. They view memory of the runs until Close.
	Values []tensor.Value
	// Refused holds TensorFlow's reason by row; with Run's first one row at most.
	Refused map[int]string
	// TFRows counts the rows of all runs that served this record batch, with those of other streams, without padding.
	TFRows int
	Queue  time.Duration // the longest wait of a task
	Run    time.Duration // sum over all runs

	results []result
	joined  []tensor.Value
}

// Close frees the values.
func (a *Answer) Close() {
	for i := range a.joined {
		a.joined[i].Release()
	}
	for i := range a.results {
		a.results[i].close()
	}
}

// slice is a range of a record batch's rows, [lo, hi).
type slice struct{ lo, hi int }

// Run runs the rows of one record batch: in several runs if it is too large for one, and joined with waiting rows of
// other streams. It takes over the feeds, each of which has the given number of rows, at least one. Rows that
// TensorFlow refuses are found by halving; with first it stops at the first of them. The caller closes the answer.
//
// Errors are faults of a run or of Call.Check, Exhausted if a device has no memory even for the fewest rows, or those
// of ctx, whose end drops waiting tasks.
func (st *Stream) Run(ctx context.Context, feeds []tensor.Feed, rows int, first bool) (*Answer, error) {
	defer tensor.ReleaseFeeds(feeds)
	a := &Answer{}
	w := &work{st: st, ctx: ctx, feeds: feeds, all: slice{0, rows}, answer: a, halvings: maxRuns - 1, first: first}
	for i := range feeds {
		w.rowBytes += feeds[i].Value.ByteSize()
	}
	w.rowBytes /= int64(rows)
	ran, failed := w.each(st.cut(w.all, w.rowBytes), false)
	if failed == nil && !a.concat(ran, st) {
		failed = w.inOneRun(rows)
	}
	if failed != nil {
		a.Close()
		return nil, failed
	}
	return a, nil
}

// ranSlice is a slice that ran: its first row, and the index of its result in the answer.
type ranSlice struct{ lo, result int }

// cut divides a slice into slices within the limits, and for all threads if the scheduler spreads them: of about equal
// size or, with allowed batch sizes, as large as possible, so that only the last needs padding.
func (st *Stream) cut(all slice, rowBytes int64) []slice {
	rows, limit := all.hi-all.lo, st.rowLimit()
	s := st.scheduler
	switch padded := s.padded(rows); {
	case !st.call.Limits.Off && rowBytes > 0:
		limit = s.allowed(min(limit, int(max(s.options.MaxBatchBytes/rowBytes, 1))))
	case padded > rows && int64(padded)*rowBytes > s.options.MaxBatchBytes:
		limit = min(limit, s.allowed(rows))
	}
	if !st.call.Limits.Off && !st.call.Limits.Alone && len(s.options.AllowedBatchSizes) == 0 {
		limit = min(limit, s.taskRows(rows))
	}
	count := (rows-1)/limit + 1
	cuts := make([]slice, count)
	for i := range cuts {
		cuts[i] = slice{lo: all.lo + i*rows/count, hi: all.lo + (i+1)*rows/count}
		if len(s.options.AllowedBatchSizes) > 0 {
			cuts[i] = slice{lo: all.lo + i*limit, hi: min(all.lo+(i+1)*limit, all.hi)}
		}
	}
	return cuts
}

// work is the state of one record batch while its tasks run.
type work struct {
	st       *Stream
	ctx      context.Context
	feeds    []tensor.Feed
	all      slice // all rows
	rowBytes int64 // of all feeds
	answer   *Answer
	halvings int  // runs that the search for rows to blame may still take
	first    bool // stop at the first refused row
}

// each runs slices and resolves their results in order. It keeps one task more queued than there are threads, and stops
// after the first refused row if that is enough.
func (w *work) each(all []slice, alone bool) ([]ranSlice, error) {
	ctx, drop := context.WithCancel(w.ctx)
	defer drop()
	var ran []ranSlice
	var submitted []*task
	for i, rows := range all {
		for len(submitted) < len(all) && len(submitted) <= i+w.st.scheduler.options.NumBatchThreads {
			submitted = append(submitted, w.submit(all[len(submitted)], alone))
		}
		found, err := w.resolve(rows, submitted[i].wait(ctx))
		ran = append(ran, found...)
		if err != nil || w.enough() {
			drop()
			for _, t := range submitted[i+1:] {
				r := t.wait(ctx)
				r.close()
			}
			return ran, err
		}
	}
	return ran, nil
}

func (w *work) enough() bool { return w.first && len(w.answer.Refused) > 0 }

func (w *work) submit(rows slice, alone bool) *task {
	feeds := make([]tensor.Feed, len(w.feeds))
	for i := range w.feeds {
		feeds[i] = tensor.Feed{Tensor: w.feeds[i].Tensor, Value: w.feeds[i].Value.Slice(rows.lo, rows.hi)}
	}
	return w.st.submit(feeds, rows.hi-rows.lo, rows == w.all, alone)
}

// resolve handles the result of a slice. If it has too many rows for the device it is cut again; if TensorFlow refused
// it, it is halved, and first the earlier half, then the later one runs alone.
func (w *work) resolve(rows slice, r result) ([]ranSlice, error) {
	a := w.answer
	a.TFRows += r.ran
	a.Run += r.run
	a.Queue = max(a.Queue, r.queue)
	kind, _ := fault.KindOf(r.err)
	switch {
	case r.err == nil:
		a.results = append(a.results, r)
		return []ranSlice{{lo: rows.lo, result: len(a.results) - 1}}, nil
	case r.checked:
		return nil, r.err
	case w.st.scheduler.tooLarge(r.err):
		if rows.hi-rows.lo > w.st.rowLimit() {
			return w.each(w.st.cut(rows, w.rowBytes), true)
		}
		return w.retry(rows, r.err)
	case kind != fault.BadRequest:
		return nil, r.err
	case rows.hi-rows.lo == 1:
		a.refuse(rows.lo, r.err.Error())
		return nil, nil
	case w.halvings < 2:
		reason := fmt.Sprintf("one of %d rows that were refused together, after %d runs to find those to blame: %v",
			rows.hi-rows.lo, maxRuns, r.err)
		for row := rows.lo; row < rows.hi; row++ {
			a.refuse(row, reason)
		}
		return nil, nil
	}
	w.halvings -= 2
	middle := rows.lo + (rows.hi-rows.lo)/2
	var ran []ranSlice
	for _, half := range []slice{{rows.lo, middle}, {middle, rows.hi}} {
		if w.enough() {
			break
		}
		found, err := w.resolve(half, w.submit(half, true).wait(w.ctx))
		ran = append(ran, found...)
		if err != nil {
			return ran, err
		}
	}
	return ran, nil
}

// retry runs a slice that cannot have fewer rows once more, after others have had time to free memory.
func (w *work) retry(rows slice, why error) ([]ranSlice, error) {
	shrink := w.st.scheduler.options.Shrink
	shrink.Pressed()
	select {
	case <-time.After(shrink.Wait):
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	}
	r := w.submit(rows, true).wait(w.ctx)
	if r.err != nil && w.st.scheduler.tooLarge(r.err) {
		return nil, fault.New(fault.Exhausted, "a run of %d rows, the smallest possible, failed twice: %w",
			w.st.scheduler.padded(rows.hi-rows.lo), why)
	}
	return w.resolve(rows, r)
}

func (a *Answer) refuse(row int, reason string) {
	if a.Refused == nil {
		a.Refused = map[int]string{}
	}
	a.Refused[row] = reason
}

// concat joins the values of all slices in the order of their rows. It returns false if they differ in a dimension
// after the first.
func (a *Answer) concat(ran []ranSlice, st *Stream) bool {
	slices.SortFunc(ran, func(x, y ranSlice) int { return cmp.Compare(x.lo, y.lo) })
	if len(ran) == 1 {
		a.Values = a.results[ran[0].result].values
	}
	if len(ran) < 2 {
		return true
	}
	for i := range st.call.Fetches {
		values := make([]tensor.Value, len(ran))
		for j, rows := range ran {
			values[j] = a.results[rows.result].values[i]
			if !slices.Equal(values[j].Shape[1:], values[0].Shape[1:]) {
				return false
			}
		}
		a.joined = append(a.joined, tensor.Concat(values, st.scheduler.options.Memory))
	}
	a.Values = a.joined
	return true
}

// inOneRun runs the rows that were not refused once more, together: the size of an output may depend on all rows of a
// run, and then slices of one record batch differ.
func (w *work) inOneRun(rows int) error {
	a := w.answer
	kept := make([]int, 0, rows)
	for row := range rows {
		if _, refused := a.Refused[row]; !refused {
			kept = append(kept, row)
		}
	}
	left := make([]tensor.Feed, len(w.feeds))
	for i := range w.feeds {
		left[i] = tensor.Feed{Tensor: w.feeds[i].Tensor,
			Value: w.feeds[i].Value.Take(kept, w.st.scheduler.options.Memory)}
	}
	r := w.st.submit(left, len(kept), true, true).wait(w.ctx)
	if r.err != nil {
		return r.err
	}
	a.TFRows, a.Run, a.Queue = a.TFRows+r.ran, a.Run+r.run, max(a.Queue, r.queue)
	a.results = append(a.results, r)
	a.Values = r.values
	return nil
}
