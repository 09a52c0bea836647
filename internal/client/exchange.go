package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"flightsvc/internal/protocol"
)

// WindowBytes and windowBatches bound what is on its way at once: at least one record batch. They are the shim's.
const (
	WindowBytes   = 64 << 20
	windowBatches = 4
)

// The delays between two attempts to open a stream, before jitter; a server that is full says for how long it
// would rather not be asked, in the trailer of its refusal.
const (
	firstDelay, lastDelay = 50 * time.Millisecond, 5 * time.Second
	retryAfter            = "retry-after-ms"
)

// Request is what is asked of a model, and how record batches become what it is asked with.
type Request struct {
	Descriptor protocol.Descriptor
	// Sent makes, of a record batch that was read, the one that goes over the wire: with the same rows, and the
	// columns that the descriptor names. Both are released by Exchange.
	Sent func(arrow.Record) (arrow.Record, error)
	// Patience is for how long an unavailable server is asked again before the stream is open.
	Patience time.Duration
}

// LostError says at which record batch a stream ended.
type LostError struct {
	Batch int64 // from 0
	First int64 // its first row among all rows, from 0
	Rows  int64
	Err   error
}

func (e *LostError) Error() string {
	return fmt.Sprintf("record batch %d, which begins with row %d: %v", e.Batch, e.First, e.Err)
}

// Unwrap returns what the server said.
func (e *LostError) Unwrap() error { return e.Err }

// Exchange reads record batches with next until that returns io.EOF, sends them through a model, and gives take
// the answers, in the same order: rows that were read, and as many of outputs. Where a large answer comes in parts, take
// gets the rows in parts as well. Both are valid until take returns. Nothing is opened before the first record
// batch is there.
//
// A helper goroutine calls next and writes; the caller's reads answers and calls take. Both have ended when Exchange
// returns, so next must not wait for ever.
//
// Errors: that of next, Sent or take as it is; *Error where the stream could not be opened, *LostError where it ended
// later. Nothing is sent twice over an open stream.
func (c *Client) Exchange(ctx context.Context, request Request, next func() (arrow.Record, error), take func(rows, outputs arrow.Record) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	x := &exchange{request: request, next: next, window: semaphore.NewWeighted(WindowBytes), pending: make(chan piece, windowBatches)}
	first, err := x.pull(ctx)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.open(ctx, x, first); err != nil {
		first.release()
		return err
	}
	defer x.close()
	x.pending <- first
	go func() { // closes pending when it ends
		if err := x.write(ctx); err != nil {
			cancel(err) // the reader must not wait for answers that nobody asks for
		}
	}()
	err = x.read(take)
	cancel(err)
	for rest := range x.pending {
		rest.release()
	}
	if err != nil {
		return context.Cause(ctx) // whoever failed first
	}
	return nil
}

// exchange is one stream.
type exchange struct {
	request Request
	next    func() (arrow.Record, error)
	window  *semaphore.Weighted
	pending chan piece // sent and not answered, in order; closed by write

	stream flight.FlightService_DoExchangeClient
	writer *flight.Writer
	reader *flight.Reader
	say    func(error) error
	end    func()
}

// piece is a record batch on its way.
type piece struct {
	rows, sent arrow.Record
	weight     int64
}

func (p piece) release() {
	p.rows.Release()
	p.sent.Release()
}

// pull reads the next record batch once there is room for it.
func (x *exchange) pull(ctx context.Context) (piece, error) {
	rows, err := x.next()
	if err != nil {
		return piece{}, err
	}
	sent, err := x.request.Sent(rows)
	if err != nil {
		rows.Release()
		return piece{}, err
	}
	p := piece{rows: rows, sent: sent, weight: min(max(sizeOf(sent), WindowBytes/windowBatches), WindowBytes)}
	if err := x.window.Acquire(ctx, p.weight); err != nil {
		p.release()
		return piece{}, err
	}
	return p, nil
}

// write sends what there is. It returns nil, too, where the server has ended the stream: read knows why.
func (x *exchange) write(ctx context.Context) error {
	defer close(x.pending)
	for {
		p, err := x.pull(ctx)
		if errors.Is(err, io.EOF) {
			return x.stream.CloseSend()
		}
		if err != nil {
			return err
		}
		select {
		case x.pending <- p: // there is room: as many as the window lets through
		case <-ctx.Done():
			p.release()
			return ctx.Err()
		}
		if err := x.writer.Write(p.sent); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// read hands on all answers. It returns nil when all is answered and the stream has ended well.
func (x *exchange) read(take func(rows, outputs arrow.Record) error) error {
	var (
		due             piece
		batch, answered int64 // the one that is due, and how many of its rows are answered
		before          int64 // rows of all before it
	)
	lost := func(err error) error {
		about := &LostError{Batch: batch, First: before, Err: err}
		if due.rows != nil {
			about.Rows = due.rows.NumRows()
		}
		return about
	}
	defer func() {
		if due.rows != nil {
			due.release()
		}
	}()
	for {
		outputs, err := x.reader.Read()
		if errors.Is(err, io.EOF) {
			if due.rows == nil && len(x.pending) == 0 {
				return nil
			}
			return lost(errors.New("the server ended the stream before it had answered all"))
		}
		if err != nil {
			return lost(x.say(err))
		}
		if due.rows == nil {
			select {
			case due = <-x.pending:
			default:
			}
			if due.rows == nil {
				return lost(errors.New("the server answered what was not asked"))
			}
		}
		var about protocol.AnswerMetadata
		if err := json.Unmarshal(x.reader.LatestAppMetadata(), &about); err != nil {
			return lost(fmt.Errorf("the answer's metadata cannot be read: %w", err))
		}
		rows := outputs.NumRows()
		if about.Batch != batch || answered+rows > due.rows.NumRows() || about.Last != (answered+rows == due.rows.NumRows()) {
			return lost(fmt.Errorf("the server answered rows %d to %d of record batch %d, which has %d", answered, answered+rows, about.Batch, due.rows.NumRows()))
		}
		asked := due.rows.NewSlice(answered, answered+rows)
		err = take(asked, outputs)
		asked.Release()
		if err != nil {
			return err
		}
		if answered += rows; about.Last {
			x.window.Release(due.weight)
			due.release()
			due, batch, before, answered = piece{}, batch+1, before+answered, 0
		}
	}
}

// close ends the stream, whose context has ended.
func (x *exchange) close() {
	x.reader.Release()
	x.end()
}

// open opens a stream with its first record batch, again and again while the server is unavailable. A runner that cannot be
// reached where it is may still be reached through the front.
func (c *Client) open(ctx context.Context, x *exchange, first piece) error {
	patience := time.After(x.request.Patience)
	redirect := true
	for delay := firstDelay; ; delay = min(2*delay, lastDelay) {
		after, err := c.attempt(ctx, x, first, redirect)
		if !unavailable(err) {
			return err
		}
		redirect = !redirect || after > 0
		select {
		case <-time.After(after + time.Duration(float64(delay)*(0.5+rand.Float64()))):
		case <-patience:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// attempt opens a stream once. after is for how long a full server asks to be left alone.
func (c *Client) attempt(ctx context.Context, x *exchange, first piece, redirect bool) (after time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var runner *grpc.ClientConn
	x.end = func() {
		cancel()
		if runner != nil {
			_ = runner.Close()
		}
	}
	defer func() {
		if err != nil {
			x.end()
		}
	}()
	d := x.request.Descriptor
	if !redirect {
		d.Redirect = &redirect
	}
	command, err := d.Command()
	if err != nil {
		return 0, err
	}
	var trailer metadata.MD
	info, err := c.front.GetFlightInfo(ctx, &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: command}, grpc.Trailer(&trailer))
	if err != nil {
		return afterOf(trailer), c.say(err)
	}
	if len(info.GetEndpoint()) != 1 {
		return 0, fmt.Errorf("the front at %s named %d endpoints; want one", c.endpoint, len(info.GetEndpoint()))
	}
	endpoint := info.GetEndpoint()[0]
	service := c.front
	if places := endpoint.GetLocation(); len(places) > 0 {
		path, err := protocol.SocketPath(places[0].GetUri())
		if err != nil {
			return 0, err
		}
		if runner, err = connect(filepath.Clean(path)); err != nil {
			return 0, err
		}
		service = flight.NewFlightServiceClient(runner)
	}
	x.say = c.say
	if x.stream, err = service.DoExchange(ctx); err != nil {
		return 0, c.say(err)
	}
	x.writer = flight.NewRecordWriter(x.stream, ipc.WithSchema(first.sent.Schema()))
	x.writer.SetFlightDescriptor(&flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: endpoint.GetTicket().GetTicket()})
	if err := x.writer.Write(first.sent); err != nil && !errors.Is(err, io.EOF) { // EOF: the server has refused, and says why
		return 0, err
	}
	if x.reader, err = flight.NewRecordReader(x.stream); err != nil {
		return afterOf(x.stream.Trailer()), c.say(err)
	}
	return 0, nil
}

func afterOf(trailer metadata.MD) time.Duration {
	ms, err := strconv.ParseInt(strings.Join(trailer.Get(retryAfter), ""), 10, 32)
	if err != nil || ms < 0 {
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}
