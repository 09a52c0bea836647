// Arrivals: how a stream is read ahead of the record batch that is being answered, and how much all streams may hold.

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

// Bounds on record batches that were read and not answered. A stream that holds none may always read one. Otherwise it
// holds readAhead record batches and streamBytes at most, and reads on only while all streams of the runner together
// hold less than runnerBytes.
const (
	readAhead   = 5
	streamBytes = 64 << 20
	runnerBytes = 1 << 30
)

// arrival is a record batch, its size in memory, and the time at which it was completely read.
type arrival struct {
	rec   arrow.Record
	bytes int64
	at    time.Time
}

// arrivals is the bounded queue between the goroutine that reads a stream and the one that answers.
type arrivals struct {
	list   chan arrival
	err    error // why reading ended, nil at the end of the stream; valid once list is closed
	cancel context.CancelFunc
	ahead  *ahead
	pulse  *pulse // of the stream

	// Of record batches that were read and not answered; guarded by ahead.mu.
	held  int
	bytes int64
}

// ahead counts the bytes of record batches that all streams of a runner hold.
type ahead struct {
	mu    sync.Mutex // guards the fields below, and those of arrivals
	bytes int64
	less  chan struct{} // closed, and replaced, when a stream releases a record batch
}

func newAhead() *ahead { return &ahead{less: make(chan struct{})} }

// room waits until the stream may read another record batch; it returns false if ctx ends before.
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

// hold counts a record batch that was read, or with sign -1 one that is released.
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

// readAll starts a goroutine that reads the stream into the result. The goroutine takes over reader; when the stream is
// over it releases reader and all memory, and calls ended last. The caller must call leave.
func readAll(
	ctx context.Context, reader *flight.Reader, mem *ReadMemory, bound *ahead, p *pulse, log *zap.Logger, ended func(),
) *arrivals {
	ctx, cancel := context.WithCancel(ctx)
	// list has room for all record batches that a.room admits, so sending to it never blocks
	a := &arrivals{pulse: p, list: make(chan arrival, readAhead), ahead: bound, cancel: cancel}
	go func() {
		defer ended()
		defer mem.Discard() // after the reader, which releases its dictionaries
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

// done releases one arrival.
func (a *arrivals) done(arrived arrival) {
	arrived.rec.Release()
	a.hold(-1, arrived.bytes)
}

// leave releases what was read and will not be answered. The goroutine of readAll ends when gRPC ends Recv, after the
// handler has returned.
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
