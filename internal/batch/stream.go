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

// maxRuns is how many runs a record batch that TensorFlow refuses may take, the first included, until the
// rows to blame are found. 21 are enough for one row among 1,024.
const maxRuns = 64

// Answer is what became of one record batch.
type Answer struct {
	// Values are the outputs of the rows that were not refused, in the order of Call.Fetches; nil if
	// none is left. They view memory of the runs until Close.
	Values []tensor.Value
	// Refused holds TensorFlow's reason by row. Under Run's first it has one row at most.
	Refused map[int]string
	// rows of all runs that served this record batch: those of other streams included, padding not
	TFRows int
	Queue  time.Duration // the longest that a part waited
	Run    time.Duration // of all runs

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

// piece is a range of a record batch's rows.
type piece struct{ lo, hi int }

// Run runs the rows of one record batch, in several runs where it is too large for one, and
// together with other streams' where those wait. It takes over the feeds, each of which has
// the given number of rows, at least one. Rows that TensorFlow refuses are found by halving; with
// first it stops at the first of them. The caller closes the answer.
//
// Errors are faults of the run, of Call.Check, Exhausted where a device has no memory even for the fewest rows, or
// those of ctx, whose end drops what waits.
func (st *Stream) Run(ctx context.Context, feeds []tensor.Feed, rows int, first bool) (*Answer, error) {
	defer tensor.ReleaseFeeds(feeds)
	a := &Answer{}
	w := &work{st: st, ctx: ctx, feeds: feeds, answer: a, halvings: maxRuns - 1, first: first}
	for i := range feeds {
		w.rowBytes += feeds[i].Value.ByteSize()
	}
	w.rowBytes /= int64(rows)
	parts, failed := w.each(st.cut(piece{0, rows}, w.rowBytes), false)
	if failed == nil && !a.gather(parts, st) {
		failed = w.again(rows)
	}
	if failed != nil {
		a.Close()
		return nil, failed
	}
	return a, nil
}

// part is a range of rows that ran, with its result's place in the answer.
type part struct{ lo, result int }

// cut divides a range of rows into pieces, none above the limits. They are of about one size, but as large as can be
// where batch sizes are prescribed, so that little is padded.
func (st *Stream) cut(all piece, rowBytes int64) []piece {
	rows, most := all.hi-all.lo, st.most()
	s := st.scheduler
	switch padded := s.padded(rows); {
	case !st.call.Limits.Off && rowBytes > 0:
		most = s.allowed(min(most, int(max(s.options.MaxBatchBytes/rowBytes, 1))))
	case padded > rows && int64(padded)*rowBytes > s.options.MaxBatchBytes:
		most = min(most, s.allowed(rows))
	}
	count := (rows-1)/most + 1
	pieces := make([]piece, count)
	for i := range pieces {
		pieces[i] = piece{lo: all.lo + i*rows/count, hi: all.lo + (i+1)*rows/count}
		if len(s.options.AllowedBatchSizes) > 0 {
			pieces[i] = piece{lo: all.lo + i*most, hi: min(all.lo+(i+1)*most, all.hi)}
		}
	}
	return pieces
}

// slice views a range of rows of all feeds.
func slice(feeds []tensor.Feed, lo, hi int) []tensor.Feed {
	out := make([]tensor.Feed, len(feeds))
	for i := range feeds {
		out[i] = tensor.Feed{Tensor: feeds[i].Tensor, Value: feeds[i].Value.Slice(lo, hi)}
	}
	return out
}

// work is one record batch under way.
type work struct {
	st       *Stream
	ctx      context.Context
	feeds    []tensor.Feed
	rowBytes int64 // of all feeds
	answer   *Answer
	halvings int  // runs that may still be spent on rows to blame
	first    bool // stop at the first refused row
}

// each runs pieces, as many at once as can be and one that waits for its turn, and settles them in their order.
// It stops where the first refused row is enough.
func (w *work) each(pieces []piece, alone bool) ([]part, error) {
	ctx, drop := context.WithCancel(w.ctx)
	defer drop()
	var parts []part
	var submitted []*task
	for i, p := range pieces {
		for len(submitted) < len(pieces) && len(submitted) <= i+w.st.scheduler.options.NumBatchThreads {
			submitted = append(submitted, w.submit(pieces[len(submitted)], alone))
		}
		found, err := w.settle(p, submitted[i].wait(ctx))
		parts = append(parts, found...)
		if err != nil || w.enough() {
			drop()
			for _, t := range submitted[i+1:] {
				r := t.wait(ctx)
				r.close()
			}
			return parts, err
		}
	}
	return parts, nil
}

func (w *work) enough() bool { return w.first && len(w.answer.Refused) > 0 }

func (w *work) submit(p piece, alone bool) *task {
	return w.st.submit(slice(w.feeds, p.lo, p.hi), p.hi-p.lo, alone)
}

// settle notes the result of a piece. If it had too many rows for the device it is cut again; if TensorFlow refused
// it, it is halved, the earlier half first, and each half runs alone.
func (w *work) settle(p piece, r result) ([]part, error) {
	a := w.answer
	a.TFRows += r.ran
	a.Run += r.run
	a.Queue = max(a.Queue, r.queue)
	kind, _ := fault.KindOf(r.err)
	switch {
	case r.err == nil:
		a.results = append(a.results, r)
		return []part{{lo: p.lo, result: len(a.results) - 1}}, nil
	case r.checked:
		return nil, r.err
	case w.st.scheduler.tooLarge(r.err):
		if p.hi-p.lo > w.st.most() {
			return w.each(w.st.cut(p, w.rowBytes), true)
		}
		return w.retry(p, r.err)
	case kind != fault.BadRequest:
		return nil, r.err
	case p.hi-p.lo == 1:
		a.refuse(p.lo, r.err.Error())
		return nil, nil
	case w.halvings < 2:
		for row := p.lo; row < p.hi; row++ {
			a.refuse(row,
				fmt.Sprintf("one of %d rows that were refused together, after %d runs to find those to blame: %v",
					p.hi-p.lo, maxRuns, r.err))
		}
		return nil, nil
	}
	w.halvings -= 2
	middle := p.lo + (p.hi-p.lo)/2
	var parts []part
	for _, half := range []piece{{p.lo, middle}, {middle, p.hi}} {
		if w.enough() {
			break
		}
		found, err := w.settle(half, w.submit(half, true).wait(w.ctx))
		parts = append(parts, found...)
		if err != nil {
			return parts, err
		}
	}
	return parts, nil
}

// retry runs a piece that cannot have fewer rows once more, when others have had time to give memory back.
func (w *work) retry(p piece, why error) ([]part, error) {
	shrink := w.st.scheduler.options.Shrink
	shrink.Pressed()
	select {
	case <-time.After(shrink.Wait):
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	}
	r := w.submit(p, true).wait(w.ctx)
	if r.err != nil && w.st.scheduler.tooLarge(r.err) {
		return nil, fault.New(fault.Exhausted, "a run of %d rows, the fewest there can be, failed twice: %w",
			w.st.scheduler.padded(p.hi-p.lo), why)
	}
	return w.settle(p, r)
}

func (a *Answer) refuse(row int, reason string) {
	if a.Refused == nil {
		a.Refused = map[int]string{}
	}
	a.Refused[row] = reason
}

// gather puts the values of the parts together, in the order of their rows. It reports false if
// they do not agree in the dimensions after the first.
func (a *Answer) gather(parts []part, st *Stream) bool {
	slices.SortFunc(parts, func(x, y part) int { return cmp.Compare(x.lo, y.lo) })
	if len(parts) == 1 {
		a.Values = a.results[parts[0].result].values
	}
	if len(parts) < 2 {
		return true
	}
	for i := range st.call.Fetches {
		values := make([]tensor.Value, len(parts))
		for j, p := range parts {
			values[j] = a.results[p.result].values[i]
			if !slices.Equal(values[j].Shape[1:], values[0].Shape[1:]) {
				return false
			}
		}
		a.joined = append(a.joined, tensor.Concat(values, st.scheduler.options.Memory))
	}
	a.Values = a.joined
	return true
}

// again runs the rows that were not refused once more, in one run. The size of an output may depend on
// all rows of a run, and parts of a record batch then have several.
func (w *work) again(rows int) error {
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
	r := w.st.submit(left, len(kept), true).wait(w.ctx)
	if r.err != nil {
		return r.err
	}
	a.TFRows, a.Run, a.Queue = a.TFRows+r.ran, a.Run+r.run, max(a.Queue, r.queue)
	a.results = append(a.results, r)
	a.Values = r.values
	return nil
}
