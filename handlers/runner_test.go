// Tests of a runner's service on a real socket, with an engine in plain Go.

package handlers

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"flightsvc/internal/batch"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/offheap"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensor"
)

// doubler is the model of fakeEngine: n is the first element of each row of x, y is x with that element doubled.
var doubler = &savedmodel.Model{Signatures: map[string]savedmodel.Signature{savedmodel.DefaultSignature: {
	Inputs: []savedmodel.Spec{{Name: "x", Tensor: "x:0", DType: savedmodel.Float32, Shape: []int64{-1, -1}}},
	Outputs: []savedmodel.Spec{
		{Name: "n", Tensor: "n:0", DType: savedmodel.Float32, Shape: []int64{-1}},
		{Name: "y", Tensor: "y:0", DType: savedmodel.Float32, Shape: []int64{-1, -1}},
	},
}}}

// fakeEngine computes in plain Go and stands for TensorFlow in this package only.
type fakeEngine struct {
	before func(call int) error // called by each run, if set
	calls  atomic.Int64
	open   atomic.Int64 // outputs that were not closed
}

func (e *fakeEngine) Model() *savedmodel.Model { return doubler }

func (e *fakeEngine) Pictures(map[string]protocol.Preprocess) (tensor.Pictures, error) {
	return nil, nil
}

func (e *fakeEngine) Run(feeds []tensor.Feed, fetches []string, _ time.Duration) (batch.Outputs, error) {
	defer tensor.ReleaseFeeds(feeds)
	call := int(e.calls.Add(1)) - 1
	if e.before != nil {
		if err := e.before(call); err != nil {
			return nil, err
		}
	}
	x := feeds[0].Value
	rows, width := x.Shape[0], x.Shape[1]
	y := tensor.Value{DType: x.DType, Shape: x.Shape, Data: bytes.Clone(x.Data)}
	n := tensor.Value{DType: x.DType, Shape: x.Shape[:1]}
	for row := range rows {
		first := x.Data[4*row*width:][:4]
		n.Data = append(n.Data, first...)
		v := math.Float32frombits(binary.LittleEndian.Uint32(first))
		binary.LittleEndian.PutUint32(y.Data[4*row*width:], math.Float32bits(2*v))
	}
	outputs := &fakeOutputs{engine: e}
	for _, name := range fetches {
		outputs.values = append(outputs.values, map[string]tensor.Value{"y:0": y, "n:0": n}[name])
	}
	e.open.Add(1)
	return outputs, nil
}

type fakeOutputs struct {
	engine *fakeEngine
	values []tensor.Value
}

func (o *fakeOutputs) Values() []tensor.Value { return o.values }
func (o *fakeOutputs) Close()                 { o.engine.open.Add(-1) }

// events counts streams.
type events struct {
	mu             sync.Mutex
	opened, closed []string
	told           []string // that a stream rests or stirs, that one opened or closed, and the first answer
}

func (e *events) tell(what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.told = append(e.told, what)
}

func (e *events) StreamResting(string)  { e.tell("resting") }
func (e *events) StreamStirring(string) { e.tell("stirring") }
func (e *events) Answered()             { e.tell("answered") }

func (e *events) heard() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.told, " ")
}

func (e *events) StreamOpened(lease string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.opened = append(e.opened, lease)
}

func (e *events) StreamClosed(lease string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = append(e.closed, lease)
}

func (e *events) counts() (opened, closed int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.opened), len(e.closed)
}

// service is a runner's service on a Unix socket, with a client. At the end of its test nothing of it may be left: no
// goroutine, no byte, no output, no socket.
type service struct {
	engine *fakeEngine
	events *events
	key    []byte
	mem    *offheap.Allocator // of the server
	logs   *observer.ObservedLogs
	runner *Runner
	client flight.FlightServiceClient
}

const (
	numBatchThreads = 2
	streamRest      = 50 * time.Millisecond
)

func newService(t *testing.T, before func(call int) error) *service {
	t.Helper()
	s := &service{engine: &fakeEngine{before: before}, events: &events{}, key: []byte("key"), mem: &offheap.Allocator{}}
	core, logs := observer.New(zapcore.InfoLevel)
	s.logs = logs
	log := zap.New(core)
	socket := filepath.Join(socketDir(t), "r.sock")
	listener, err := Listen(socket, log)
	if err != nil {
		t.Fatal(err)
	}
	batches := batch.New(batch.Options{
		MaxBatchSize: 1024, MaxBatchBytes: 64 << 20, BatchTimeout: time.Second, MaxEnqueuedBatches: 100,
		NumBatchThreads: numBatchThreads,
		Run:             s.engine.Run, Memory: s.mem, Log: log,
	})
	runner := NewRunner(RunnerOptions{Engine: s.engine, Batches: batches, Events: s.events, Key: s.key,
		Server: "host:1", Memory: s.mem, StreamRest: streamRest, Log: log})
	s.runner = runner
	server := NewServer(runner, log)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	const window = 1 << 20 // fixed: by default it grows on a busy machine, up to whole answers that nobody has read
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)))
	if err != nil {
		t.Fatal(err)
	}
	s.client = flight.NewFlightServiceClient(conn)
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Errorf("the server ended with %v", err)
		}
		runner.Close()
		batches.Close()
		if n := s.mem.Live(); n != 0 {
			t.Errorf("%d bytes were not freed", n)
		}
		if n := s.engine.open.Load(); n != 0 {
			t.Errorf("%d outputs were not closed", n)
		}
		if opened, closed := s.events.counts(); opened != closed {
			t.Errorf("%d streams were opened, %d closed", opened, closed)
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("the socket is still there: %v", err)
		}
		goleak.VerifyNone(t)
	})
	return s
}

// socketDir is a folder with a short path, as sockets need.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "fs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// ticket is a descriptor with a good lease and more fields.
func (s *service) ticket(t *testing.T, fields string) *flight.FlightDescriptor {
	t.Helper()
	return commandOf(t, granted(t, s.key, time.Now(), fields))
}

var listSchema = arrow.NewSchema([]arrow.Field{{Name: "c", Type: arrow.ListOf(arrow.PrimitiveTypes.Float32),
	Nullable: true}}, nil)

// rowsOf has a row of width elements for each number, which is its first element; NaN makes it null.
func rowsOf(width int, rows ...float64) arrow.Record {
	b := array.NewRecordBuilder(memory.DefaultAllocator, listSchema)
	defer b.Release()
	lists := b.Field(0).(*array.ListBuilder)
	for _, row := range rows {
		lists.Append(!math.IsNaN(row))
		if !math.IsNaN(row) {
			values := make([]float32, width)
			values[0] = float32(row)
			lists.ValueBuilder().(*array.Float32Builder).AppendValues(values, nil)
		}
	}
	return b.NewRecord()
}

// encode returns the messages of a stream: the schema with the descriptor, then the record batches.
func encode(t *testing.T, fd *flight.FlightDescriptor, schema *arrow.Schema,
	batches ...arrow.Record) []*flight.FlightData {
	t.Helper()
	var sink captured
	w := flight.NewRecordWriter(&sink, ipc.WithSchema(schema))
	w.SetFlightDescriptor(fd)
	for _, rec := range batches {
		if err := w.Write(rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return sink
}

type captured []*flight.FlightData

func (c *captured) Send(data *flight.FlightData) error {
	*c = append(*c, &flight.FlightData{FlightDescriptor: data.FlightDescriptor,
		DataHeader: bytes.Clone(data.DataHeader), DataBody: bytes.Clone(data.DataBody)})
	return nil
}

type answer struct {
	rec  arrow.Record
	meta protocol.AnswerMetadata
}

// exchange sends messages, half-closes, and reads all answers. The sending side stops at the first error, which
// comes out of the reading side.
func (s *service) exchange(t *testing.T, messages []*flight.FlightData) ([]answer, *arrow.Schema, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream := s.begin(ctx, t)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for _, m := range messages {
			if stream.Send(m) != nil {
				return
			}
		}
		_ = stream.CloseSend()
	}()
	defer func() { <-sent }()
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return nil, nil, err
	}
	defer reader.Release()
	var answers []answer
	for reader.Next() {
		a := answer{rec: reader.Record()}
		a.rec.Retain()
		t.Cleanup(a.rec.Release)
		if err := json.Unmarshal(reader.LatestAppMetadata(), &a.meta); err != nil {
			t.Fatal(err)
		}
		answers = append(answers, a)
	}
	return answers, reader.Schema(), reader.Err()
}

// begin opens a stream and sends messages.
func (s *service) begin(ctx context.Context, t *testing.T,
	messages ...*flight.FlightData) flight.FlightService_DoExchangeClient {
	t.Helper()
	stream, err := s.client.DoExchange(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	return stream
}

// works fails the test unless another stream is answered.
func (s *service) works(t *testing.T) {
	t.Helper()
	answers, _, err := s.exchange(t, encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 5)))
	if err != nil || len(answers) != 1 {
		t.Errorf("the next stream: %d answers, %v", len(answers), err)
	}
}

// wantStatus checks the code and the sentence of a gRPC error, also below another.
func wantStatus(t *testing.T, err error, code codes.Code, parts ...string) {
	t.Helper()
	got, ok := status.FromError(err)
	if !ok || got.Code() != code {
		t.Errorf("got %v, want %s", err, code)
		return
	}
	for _, part := range parts {
		if !strings.Contains(got.Message(), part) {
			t.Errorf("%q does not say %q", got.Message(), part)
		}
	}
}

func TestRowContract(t *testing.T) {
	s := newService(t, nil)
	var batches []arrow.Record
	var want [][]float64
	next := 1.0
	for i := range 200 {
		rows := make([]float64, i%7)
		for j := range rows {
			if rows[j] = next; i%3 == 0 && j%2 == 1 {
				rows[j] = math.NaN()
			}
			next++
		}
		want = append(want, rows)
		batches = append(batches, rowsOf(3, rows...))
	}
	const batches5 = 2 // rows less
	batches[5] = batches[5].NewSlice(1, 4)
	want[5] = want[5][1:4]
	answers, schema, err := s.exchange(t, encode(t, s.ticket(t,
		`,"outputs":{"y":"twice","n":"sum"},"on_error":"column"`), listSchema, batches...))
	if err != nil || len(answers) != len(batches) {
		t.Fatalf("%d answers to %d batches: %v", len(answers), len(batches), err)
	}
	if got := fmt.Sprint(schema.Field(0).Name, schema.Field(1).Name, schema.Field(2).Name,
		schema.NumFields()); got != "twicesumerror3" {
		t.Errorf("the columns are %s", got)
	}
	for i, a := range answers {
		server := ""
		if i == 0 {
			server = "host:1"
		}
		kept := 0
		lists, sums := a.rec.Column(0).(*array.List), a.rec.Column(1).(*array.Float32)
		if a.rec.NumRows() != int64(len(want[i])) {
			t.Fatalf("batch %d: %d rows, want %d", i, a.rec.NumRows(), len(want[i]))
		}
		for row, x := range want[i] {
			if !a.rec.Column(2).IsNull(row) {
				t.Errorf("batch %d, row %d has an error", i, row)
			}
			if math.IsNaN(x) {
				if lists.IsValid(row) || sums.IsValid(row) {
					t.Errorf("batch %d, row %d is not null", i, row)
				}
				continue
			}
			kept++
			lo, hi := lists.ValueOffsets(row)
			first := lists.ListValues().(*array.Float32).Value(int(lo))
			if float64(first) != 2*x || hi-lo != 3 || float64(sums.Value(row)) != x {
				t.Errorf("batch %d, row %d: %v, %v for %v", i, row, first, sums.Value(row), x)
			}
		}
		if m := a.meta; m.Batch != int64(i) || !m.Last || m.Server != server || m.TFRows != kept ||
			m.TotalUS < m.RunUS {
			t.Errorf("batch %d has metadata %+v with %d rows run", i, m, kept)
		}
	}
	if c := s.runner.Counts(); c.Rows != int64(next)-1-batches5 || c.Errors != 0 || c.Runs == 0 || c.RunSeconds <= 0 ||
		c.Queued != 0 {
		t.Errorf("of %v rows, one stream, the counts are %+v", next-1-batches5, c)
	}
}

// TestStreamWithoutBatches gets the schema before anything else is sent, and no answer.
func TestStreamWithoutBatches(t *testing.T) {
	s := newService(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream := s.begin(ctx, t, encode(t, s.ticket(t, ""), listSchema)[0])
	reader, err := flight.NewRecordReader(stream) // waits for the schema
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Release()
	if schema := reader.Schema(); schema.NumFields() != 2 || schema.Field(0).Name != "n" {
		t.Errorf("the schema is %v", schema)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if reader.Next() || reader.Err() != nil || s.engine.calls.Load() != 0 {
		t.Errorf("the stream ended with %v after %d runs", reader.Err(), s.engine.calls.Load())
	}
}

// TestLargeAnswer has an answer of two outputs in several parts.
func TestLargeAnswer(t *testing.T) {
	s := newService(t, nil)
	const width = 10 << 20 // of 40 MiB a row
	answers, _, err := s.exchange(t, encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 1), rowsOf(width, 2, 3), rowsOf(1,
		4)))
	if err != nil || len(answers) != 4 {
		t.Fatalf("%d answers: %v", len(answers), err)
	}
	for i, want := range []protocol.AnswerMetadata{{Batch: 0, Last: true}, {Batch: 1}, {Batch: 1, Last: true},
		{Batch: 2, Last: true}} {
		got := answers[i]
		if got.meta.Batch != want.Batch || got.meta.Last != want.Last ||
			got.rec.Column(0).(*array.Float32).Value(0) != float32(i+1) {
			t.Errorf("part %d: %+v", i, got.meta)
		}
	}
}

func TestRefusedStreams(t *testing.T) {
	s := newService(t, nil)
	expired := granted(t, s.key, time.Now().Add(-time.Hour), "")
	other := granted(t, s.key, time.Now(), "")
	other.Model = "other"
	used := s.ticket(t, "")
	if _, _, err := s.exchange(t, encode(t, used, listSchema)); err != nil {
		t.Fatal(err)
	}
	ints := arrow.NewSchema([]arrow.Field{{Name: "c", Type: arrow.PrimitiveTypes.Int64}}, nil)
	for name, c := range map[string]struct {
		messages []*flight.FlightData
		code     codes.Code
		parts    []string
	}{
		"no descriptor": {encode(t, nil, listSchema), codes.InvalidArgument, []string{"CMD descriptor"}},
		"no JSON":       {encode(t, command("{"), listSchema), codes.InvalidArgument, []string{"descriptor: "}},
		"no lease": {encode(t, command(`{"v":1,"model":"m"}`), listSchema), codes.Unavailable,
			[]string{"ticket of GetFlightInfo"}},
		"expired lease": {encode(t, commandOf(t, expired), listSchema), codes.Unavailable, []string{"expired"}},
		"another's ticket": {encode(t, commandOf(t, other), listSchema), codes.Unavailable,
			[]string{"unchanged ticket of GetFlightInfo"}},
		"used lease": {encode(t, used, listSchema), codes.Unavailable, []string{"opened a stream already"}},
		"unknown signature": {encode(t, s.ticket(t, `,"signature":"nope"`), listSchema), codes.NotFound,
			[]string{`no signature "nope"`}},
		"wrong column": {encode(t, s.ticket(t, ""), ints), codes.InvalidArgument,
			[]string{"model m, signature serving_default", `column "c" of int64`, "wants elements of float32",
				`"x" float32 [?,?]`}},
		"missing column": {encode(t, s.ticket(t, `,"inputs":{"x":"d"}`), listSchema), codes.InvalidArgument,
			[]string{`input "x" wants column "d"`, "its columns are"}},
		"null refused": {encode(t, s.ticket(t, `,"nulls":"fail"`), listSchema, rowsOf(1, 1), rowsOf(1, 1,
			math.NaN())), codes.InvalidArgument, []string{"row 1 of record batch 1", `column "c" is null`, "on_error"}},
		"nothing at all": {nil, codes.InvalidArgument, []string{"must begin with a descriptor and a schema"}},
		"no schema": {[]*flight.FlightData{{FlightDescriptor: s.ticket(t, "")}}, codes.InvalidArgument,
			[]string{"must begin with a descriptor and a schema"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := s.exchange(t, c.messages)
			wantStatus(t, err, c.code, c.parts...)
		})
	}
	_, err := s.client.GetSchema(t.Context(), command("{}")) // the front's affair, as the next one
	wantStatus(t, err, codes.Unimplemented)
	_, err = s.client.GetFlightInfo(t.Context(), command("{}"))
	wantStatus(t, err, codes.Unimplemented)
	for _, policy := range []string{"null", "column"} {
		answers, _, err := s.exchange(t, encode(t, s.ticket(t, `,"nulls":"fail","on_error":"`+policy+`"`), listSchema,
			rowsOf(1, 1, math.NaN())))
		if err != nil || answers[0].rec.Column(0).NullN() != 1 {
			t.Fatalf("on_error %s: %v", policy, err)
		}
		if policy == "column" {
			if got := answers[0].rec.Column(2).(*array.String); !got.IsNull(0) || got.Value(1) != `column "c" is null` {
				t.Errorf("the error column is %v", got)
			}
		}
	}
	if c := s.runner.Counts(); c.Errors != 8+2 { // streams, four of which may come again, and rows
		t.Errorf("the counts are %+v", c)
	}
}

func TestEngineFails(t *testing.T) {
	for name, c := range map[string]struct {
		fail  func() error
		code  codes.Code
		parts []string
	}{
		"bad request": {func() error { return fault.New(fault.BadRequest, "TensorFlow refused it: shapes") },
			codes.InvalidArgument, []string{"model m, signature serving_default: row 0 of record batch 2: TensorFlow " +
				"refused it: shapes"}},
		"deadline": {func() error { return fault.New(fault.Deadline, "too slow") }, codes.DeadlineExceeded,
			[]string{"model m", "record batch 2: too slow"}},
		"memory": {func() error { return fault.New(fault.Exhausted, "no memory") }, codes.ResourceExhausted,
			[]string{"no memory"}},
		"plain error": {func() error { return errors.New("broken") }, codes.Internal, []string{"model m", "broken"}},
		"panic":       {func() error { panic("secret detail") }, codes.Internal, []string{"its log has the details"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, func(call int) error {
				if call == 2 {
					return c.fail()
				}
				return nil
			})
			answers, _, err := s.exchange(t, encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 0), rowsOf(1, 1),
				rowsOf(1, 2), rowsOf(1, 3), rowsOf(1, 4)))
			wantStatus(t, err, c.code, c.parts...)
			if len(answers) != 2 {
				t.Errorf("%d batches were answered before the error, want 2", len(answers))
			}
			if strings.Contains(err.Error(), "secret detail") {
				t.Errorf("the caller learns of a panic: %v", err)
			}
			if name == "panic" && s.logs.FilterMessage("panic").Len() != 1 {
				t.Error("the log says nothing of the panic")
			}
			s.works(t)
		})
	}
}

// TestClientLeaves cancels streams at many points: while the engine runs, and with batches read ahead.
func TestClientLeaves(t *testing.T) {
	running, leave := make(chan struct{}, 64), make(chan struct{})
	s := newService(t, func(int) error {
		running <- struct{}{}
		<-leave
		return nil
	})
	var working sync.WaitGroup
	cancels := make(chan context.CancelFunc, 8)
	for range 8 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		cancels <- cancel
		stream := s.begin(ctx, t)
		messages := encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 1), rowsOf(1, 2), rowsOf(1, 3), rowsOf(1, 4),
			rowsOf(1, 5), rowsOf(1, 6), rowsOf(1, 7))
		working.Go(func() {
			for _, m := range messages {
				if stream.Send(m) != nil {
					return
				}
			}
		})
		working.Go(func() {
			for {
				if _, err := stream.Recv(); err != nil {
					if code := status.Code(err); code != codes.Canceled {
						t.Errorf("a client that left got %v", err)
					}
					return
				}
			}
		})
	}
	for range numBatchThreads { // the others' wait in the queue
		<-running
	}
	expect.Eventually(t, "all streams are open", func() bool { opened, _ := s.events.counts(); return opened == 8 })
	for range 8 {
		(<-cancels)()
	}
	working.Wait()
	close(leave)
	expect.Eventually(t, "all streams are closed", func() bool {
		opened, closed := s.events.counts()
		return opened == 8 && closed == 8
	})
	s.works(t)
}

// TestLogsDoNotQuote lets TensorFlow quote a row in its error.
func TestLogsDoNotQuote(t *testing.T) {
	s := newService(t, func(int) error {
		return fault.New(fault.BadRequest, TensorFlowSays+"SECRET-4111 is no number")
	})
	_, _, err := s.exchange(t, encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 1)))
	wantStatus(t, err, codes.InvalidArgument, "SECRET-4111")
	expect.Eventually(t, "the end of the call is logged",
		func() bool { return s.logs.FilterMessage("call ended").Len() == 1 })
	for _, line := range s.logs.All() {
		for _, field := range line.Context {
			if strings.Contains(field.String, "SECRET") {
				t.Errorf("the log line %q quotes the row: %s", line.Message, field.String)
			}
		}
	}
}

// TestBackPressure lets a client send to an engine that stands still: batches so small that their number
// is what stops the reading, and batches so large that their bytes do.
func TestBackPressure(t *testing.T) {
	for _, c := range []struct{ size, total, held int }{
		{size: 8 << 20, total: 24, held: readAhead},
		{size: 40 << 20, total: 5, held: 2},
	} {
		t.Run(fmt.Sprintf("%d MiB", c.size>>20), func(t *testing.T) {
			release := make(chan struct{})
			s := newService(t, func(int) error {
				<-release
				return nil
			})
			messages := encode(t, s.ticket(t, `,"outputs":{"n":"n"}`), listSchema, rowsOf(c.size/4, 1))
			for range c.total - 1 {
				messages = append(messages, messages[1])
			}
			answered := make(chan int, 1)
			go func() {
				answers, _, err := s.exchange(t, messages)
				if err != nil {
					t.Error(err)
				}
				answered <- len(answers)
			}()
			full := int64(c.size * c.held)
			expect.Eventually(t, "the server has read all that it may", func() bool { return s.mem.Live() >= full })
			most := int64(0)
			deadline := time.Now().Add(300 * time.Millisecond)
			for ; time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				most = max(most, s.mem.Live())
			}
			if most >= full+int64(c.size) {
				t.Errorf("%d MiB are held, at most %d MiB should be", most>>20, full>>20)
			}
			close(release)
			if n := <-answered; n != c.total {
				t.Errorf("%d of %d batches were answered", n, c.total)
			}
		})
	}
}

// TestMalformedBatches damages the second record batch of a stream byte by byte where it matters.
func TestMalformedBatches(t *testing.T) {
	s := newService(t, nil)
	offsets := func(body []byte, values ...uint32) {
		for i, v := range values {
			binary.LittleEndian.PutUint32(body[4*i:], v)
		}
	}
	for name, damage := range map[string]func(*flight.FlightData){
		"no header":        func(m *flight.FlightData) { m.DataHeader = nil },
		"tiny header":      func(m *flight.FlightData) { m.DataHeader = []byte{1, 2} },
		"noise for header": func(m *flight.FlightData) { m.DataHeader = bytes.Repeat([]byte{0xa5}, len(m.DataHeader)) },
		"half a header":    func(m *flight.FlightData) { m.DataHeader = m.DataHeader[:len(m.DataHeader)/2] },
		"a second schema": func(m *flight.FlightData) {
			m.DataHeader, m.DataBody = encode(t, nil, listSchema)[0].DataHeader, nil
		},
		"no body":         func(m *flight.FlightData) { m.DataBody = nil },
		"half a body":     func(m *flight.FlightData) { m.DataBody = m.DataBody[:len(m.DataBody)/2] },
		"a shorter body":  func(m *flight.FlightData) { m.DataBody = m.DataBody[:len(m.DataBody)-8] },
		"negative offset": func(m *flight.FlightData) { offsets(m.DataBody, 1<<31, 2, 4) },
		"falling offsets": func(m *flight.FlightData) { offsets(m.DataBody, 0, 4, 2) },
		"offset beyond":   func(m *flight.FlightData) { offsets(m.DataBody, 0, 2, 1<<30) },
		"ragged lists":    func(m *flight.FlightData) { offsets(m.DataBody, 0, 1, 4) },
	} {
		t.Run(name, func(t *testing.T) {
			messages := encode(t, s.ticket(t, ""), listSchema, rowsOf(2, 1), rowsOf(2, 2, 3))
			damage(messages[2])
			answers, _, err := s.exchange(t, messages)
			wantStatus(t, err, codes.InvalidArgument)
			if text := err.Error(); !strings.Contains(text, "record batch 1 cannot be read") &&
				!strings.Contains(text, `column "c"`) {
				t.Errorf("%q does not say what is malformed", text)
			}
			if len(answers) != 1 {
				t.Errorf("%d batches were answered before the damage, want 1", len(answers))
			}
		})
	}
	// Whatever the metadata says, the stream ends with an answer or an error of the caller, never of the server.
	header := encode(t, command("{}"), listSchema, rowsOf(2, 2, 3))[1].DataHeader
	refused := func(at int, change func(header []byte)) bool {
		messages := encode(t, s.ticket(t, ""), listSchema, rowsOf(2, 2, 3))
		change(messages[1].DataHeader[at:])
		_, _, err := s.exchange(t, messages)
		if code := status.Code(err); err != nil && code != codes.InvalidArgument {
			t.Errorf("byte %d of %d: %v", at, len(header), err)
		}
		return err != nil
	}
	for at := range header {
		refused(at, func(header []byte) { header[0] ^= 0x13 })
	}
	for _, claim := range []int64{-1, 4, 1 << 20, 1 << 31, 1 << 40, 1 << 62, -1 << 63} {
		lies := 0
		for at := 0; at+8 <= len(header); at += 4 {
			if said := binary.LittleEndian.Uint64(header[at:]); said == 0 || said > 1<<10 {
				continue // neither a number of rows nor one of bytes
			}
			if refused(at, func(header []byte) { binary.LittleEndian.PutUint64(header, uint64(claim)) }) {
				lies++
			}
		}
		if lies < 4 { // of rows and buffers at least
			t.Errorf("%d numbers of a header may be %d", lies, claim)
		}
	}
	if n := s.logs.FilterMessage("panic").Len(); n != 0 {
		t.Errorf("%d panics", n)
	}
	s.works(t)
}

// TestOneStreamTooMany opens as many streams as a runner takes, and one more.
func TestOneStreamTooMany(t *testing.T) {
	s := newService(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var open []flight.FlightService_DoExchangeClient
	for range MaxStreams {
		stream := s.begin(ctx, t, encode(t, s.ticket(t, ""), listSchema)...)
		if _, err := stream.Recv(); err != nil { // the schema: it is open
			t.Fatal(err)
		}
		open = append(open, stream)
	}
	for range 2 * MaxStreams { // whoever has no ticket takes no place
		s.begin(ctx, t)
	}
	stream := s.begin(ctx, t, encode(t, s.ticket(t, ""), listSchema)...)
	_, err := stream.Recv()
	wantStatus(t, err, codes.Unavailable, "256 streams", "1000 ms")
	if got := stream.Trailer().Get("retry-after-ms"); len(got) != 1 || got[0] != "1000" {
		t.Errorf("the trailer says %q", got)
	}
	_ = open[0].CloseSend()
	if _, err := open[0].Recv(); err != io.EOF {
		t.Errorf("the first stream ended with %v", err)
	}
	expect.Eventually(t, "a place is free", func() bool {
		answers, _, err := s.exchange(t, encode(t, s.ticket(t, ""), listSchema, rowsOf(1, 5)))
		return err == nil && len(answers) == 1
	})
	cancel()
	expect.Eventually(t, "all streams have ended", func() bool {
		opened, closed := s.events.counts()
		return opened == closed
	})
}

func TestListenReplacesSocketsAlone(t *testing.T) {
	path := filepath.Join(socketDir(t), "s.sock")
	first, err := Listen(path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = first.Close() }()
	if info, err := os.Lstat(path); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket has mode %v, %v", info.Mode(), err)
	}
	second, err := Listen(path, zap.NewNop()) // over what a dead process left
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
	expect.Write(t, path, "precious")
	if _, err := Listen(path, zap.NewNop()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("listening in place of a file: %v", err)
	}
	if data, err := os.ReadFile(path); string(data) != "precious" {
		t.Errorf("the file holds %q, %v", data, err)
	}
}
