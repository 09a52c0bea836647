package handlers

import (
	"context"
	"sync"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/util"
	"go.uber.org/zap"
)

// What streams hold, from the moment at which a record batch was read until it is answered. A
// stream that holds nothing may always read one; beyond that it holds readAhead record batches
// and streamBytes at most, and reads on only while all streams together hold less than runnerBytes.
const (
	readAhead   = 5
	streamBytes = 64 << 20
	runnerBytes = 1 << 30
)

// arrival is a record batch that was read, with the time at which it was whole.
type arrival struct {
	rec   arrow.Record
	bytes int64
	at    time.Time
}

// arrivals is the bounded way from the goroutine that reads a stream to the one that answers.
type arrivals struct {
	list   chan arrival
	err    error // why reading ended, nil at the end of the stream; valid once list is closed
	cancel context.CancelFunc
	ahead  *ahead
	pulse  *pulse // of the stream

	// Guarded by ahead.mu; what is in work included.
	held  int
	bytes int64
}

// ahead bounds what all streams of a runner hold together.
type ahead struct {
	mu    sync.Mutex // guards the fields below, and those of arrivals
	bytes int64
	less  chan struct{} // closed, and made anew, when a stream gives something back
}

func newAhead() *ahead { return &ahead{less: make(chan struct{})} }

// room waits until the stream may read a further record batch, and reports whether it may before
// ctx ends.
func (a *arrivals) room(ctx context.Context) bool {
	for {
		a.ahead.mu.Lock()
		ok := a.held == 0 || a.held < readAhead && a.bytes < streamBytes && a.ahead.bytes < runnerBytes
		less := a.ahead.less
		a.ahead.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-less:
		case <-ctx.Done():
			return false
		}
	}
}

// hold counts a record batch that was read, or with -1 one that is given back.
func (a *arrivals) hold(sign int, bytes int64) {
	a.ahead.mu.Lock()
	defer a.ahead.mu.Unlock()
	a.held += sign
	a.bytes += int64(sign) * bytes
	a.ahead.bytes += int64(sign) * bytes
	if sign < 0 {
		close(a.ahead.less)
		a.ahead.less = make(chan struct{})
	}
}

// readAll starts reading the stream into the result. It takes over reader and gives back
// everything when the stream is over; ended is called last. The caller must call leave.
func readAll(ctx context.Context, reader *flight.Reader, mem *ReadMemory, bound *ahead, p *pulse, log *zap.Logger, ended func()) *arrivals {
	ctx, cancel := context.WithCancel(ctx)
	a := &arrivals{pulse: p, list: make(chan arrival, readAhead), ahead: bound, cancel: cancel} // room for all that it may hold
	go func() {
		defer ended()
		defer mem.Discard() // after the reader, whose dictionaries may still be fresh
		defer reader.Release()
		a.read(ctx, reader, mem, log)
		close(a.list)
		if ctx.Err() != nil {
			a.drain()
		}
	}()
	return a
}

func (a *arrivals) read(ctx context.Context, reader *flight.Reader, mem *ReadMemory, log *zap.Logger) {
	defer guard(log, "read", &a.err)
	for {
		if !a.room(ctx) {
			a.err = ctx.Err()
			return
		}
		if !reader.Next() {
			a.err = reader.Err()
			return
		}
		a.pulse.move()
		mem.Commit()
		next := arrival{rec: reader.Record(), at: time.Now()}
		next.bytes = util.TotalRecordSize(next.rec)
		next.rec.Retain()
		a.hold(1, next.bytes)
		a.list <- next
	}
}

// done gives back one arrival.
func (a *arrivals) done(arrived arrival) {
	arrived.rec.Release()
	a.hold(-1, arrived.bytes)
}

// leave gives back what was read and will not be answered. Reading itself ends when gRPC
// ends Recv, which it does once the handler has returned.
func (a *arrivals) leave() {
	a.cancel()
	a.drain()
}

func (a *arrivals) drain() {
	for {
		select {
		case arrived, ok := <-a.list:
			if !ok {
				return
			}
			a.done(arrived)
		default:
			return
		}
	}
}
