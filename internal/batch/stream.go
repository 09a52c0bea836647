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
	TFRows  int           // rows of all runs that served this record batch, those of other streams included
	Queue   time.Duration // the longest that a part waited
	Run     time.Duration // of all runs

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
// Errors are faults of the run, of Call.Check, or those of ctx, whose end drops what waits.
func (st *Stream) Run(ctx context.Context, feeds []tensor.Feed, rows int, first bool) (*Answer, error) {
	defer tensor.ReleaseFeeds(feeds)
	ctx, drop := context.WithCancel(ctx)
	defer drop()
	a := &Answer{}
	var parts []part
	var failed error
	halvings := maxRuns - 1
	pieces := st.cut(feeds, rows)
	var submitted []*task // as many at once as can run, and one that waits for its turn
	for i, p := range pieces {
		for len(submitted) < len(pieces) && len(submitted) <= i+st.scheduler.options.NumBatchThreads {
			next := pieces[len(submitted)]
			submitted = append(submitted, st.submit(slice(feeds, next.lo, next.hi), next.hi-next.lo, false))
		}
		var found []part
		found, failed = st.settle(ctx, a, feeds, p.lo, p.hi, submitted[i].wait(ctx), &halvings, first)
		parts = append(parts, found...)
		if failed != nil || first && len(a.Refused) > 0 {
			drop() // nobody needs the later pieces
			for _, t := range submitted[i+1:] {
				r := t.wait(ctx)
				r.close()
			}
			break
		}
	}
	if failed == nil && !a.gather(parts, st) {
		failed = st.again(ctx, a, feeds, rows)
	}
	if failed != nil {
		a.Close()
		return nil, failed
	}
	return a, nil
}

// part is a range of rows that ran, with its result's place in the answer.
type part struct{ lo, result int }

// cut divides the rows into pieces of about one size, none above the limits.
func (st *Stream) cut(feeds []tensor.Feed, rows int) []piece {
	count := 1
	if !st.call.Limits.Off {
		bytes := int64(0)
		for i := range feeds {
			bytes += feeds[i].Value.ByteSize()
		}
		limit := st.call.Limits.MaxBatchSize
		if perRow := bytes / int64(rows); perRow > 0 {
			limit = min(limit, int(max(st.scheduler.options.MaxBatchBytes/perRow, 1)))
		}
		count = (rows + limit - 1) / limit
	}
	pieces := make([]piece, count)
	for i := range pieces {
		pieces[i] = piece{lo: i * rows / count, hi: (i + 1) * rows / count}
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

// settle notes the result of the rows [lo, hi). If TensorFlow refused them it halves them, the
// earlier half first, and each half runs alone.
func (st *Stream) settle(ctx context.Context, a *Answer, feeds []tensor.Feed, lo, hi int, r result, halvings *int, first bool) ([]part, error) {
	a.TFRows += r.ran
	a.Run += r.run
	a.Queue = max(a.Queue, r.queue)
	if r.err == nil {
		a.results = append(a.results, r)
		return []part{{lo: lo, result: len(a.results) - 1}}, nil
	}
	if kind, ok := fault.KindOf(r.err); !ok || kind != fault.BadRequest || r.checked {
		return nil, r.err
	}
	if hi-lo == 1 {
		a.refuse(lo, r.err.Error())
		return nil, nil
	}
	if *halvings < 2 {
		for row := lo; row < hi; row++ {
			a.refuse(row, fmt.Sprintf("one of %d rows that were refused together, after %d runs to find those to blame: %v", hi-lo, maxRuns, r.err))
		}
		return nil, nil
	}
	*halvings -= 2
	middle := lo + (hi-lo)/2
	var parts []part
	for _, half := range [][2]int{{lo, middle}, {middle, hi}} {
		if first && len(a.Refused) > 0 {
			break
		}
		t := st.submit(slice(feeds, half[0], half[1]), half[1]-half[0], true)
		found, err := st.settle(ctx, a, feeds, half[0], half[1], t.wait(ctx), halvings, first)
		parts = append(parts, found...)
		if err != nil {
			return parts, err
		}
	}
	return parts, nil
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
func (st *Stream) again(ctx context.Context, a *Answer, feeds []tensor.Feed, rows int) error {
	kept := make([]int, 0, rows)
	for row := range rows {
		if _, refused := a.Refused[row]; !refused {
			kept = append(kept, row)
		}
	}
	left := make([]tensor.Feed, len(feeds))
	for i := range feeds {
		left[i] = tensor.Feed{Tensor: feeds[i].Tensor, Value: feeds[i].Value.Take(kept, st.scheduler.options.Memory)}
	}
	r := st.submit(left, len(kept), true).wait(ctx)
	if r.err != nil {
		return r.err
	}
	a.TFRows, a.Run, a.Queue = a.TFRows+r.ran, a.Run+r.run, max(a.Queue, r.queue)
	a.results = append(a.results, r)
	a.Values = r.values
	return nil
}
