// Tests of streams that rest and stir.

package handlers

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/expect"
)

// TestStreamRests lets a stream rest before its first record batch, and behind it, but not while a run is under way for
// longer than that.
func TestStreamRests(t *testing.T) {
	hold := make(chan struct{})
	s := newService(t, func(int) error {
		<-hold
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := s.client.DoExchange(ctx)
	if err != nil {
		t.Fatal(err)
	}
	messages := encode(t, s.ticket(t, ""), listSchema, rowsOf(2, 1, 2), rowsOf(2, 3))
	heard := func(want string) {
		t.Helper()
		expect.Eventually(t, "the events are "+want, func() bool { return s.events.heard() == want })
	}
	send := func(i int) {
		t.Helper()
		if err := stream.Send(messages[i]); err != nil {
			t.Fatal(err)
		}
	}
	send(0)
	heard("resting")
	send(1)
	heard("resting stirring")
	time.Sleep(5 * streamRest) // the run is under way
	heard("resting stirring")
	close(hold)
	heard("resting stirring answered resting")
	send(2)
	heard("resting stirring answered resting stirring resting")
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Release()
	answers := 0
	for reader.Next() {
		answers++
	}
	if reader.Err() != nil || answers != 2 {
		t.Errorf("%d answers, %v", answers, reader.Err())
	}
}

// TestStreamRestsWhileItsAnswerIsNotTaken has a client that does not read. gRPC takes one message of any size beyond
// what the client's window holds; the answer to the second record batch has to wait.
func TestStreamRestsWhileItsAnswerIsNotTaken(t *testing.T) {
	s := newService(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := s.client.DoExchange(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const width = 2 << 20 // 8 MiB a row
	for _, m := range encode(t, s.ticket(t, ""), listSchema, rowsOf(width, 1), rowsOf(width, 2)) {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	expect.Eventually(t, "both have run and the stream rests", func() bool {
		return s.engine.calls.Load() == 2 && strings.HasSuffix(s.events.heard(), "resting")
	})
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Release()
	answers := 0
	for reader.Next() {
		answers++
	}
	if reader.Err() != nil || answers != 2 {
		t.Errorf("%d answers, %v", answers, reader.Err())
	}
	expect.Eventually(t, "the stream stirs", func() bool {
		return strings.HasSuffix(s.events.heard(), "resting stirring")
	})
}

// ordered fails its test if a stream is told to rest twice in a row, or to stir when it does not rest.
type ordered struct {
	events
	t       *testing.T
	resting bool
}

func (o *ordered) StreamResting(string) {
	if o.resting {
		o.t.Error("it rests twice")
	}
	o.resting = true
}

func (o *ordered) StreamStirring(string) {
	if !o.resting {
		o.t.Error("it stirs and did not rest")
	}
	o.resting = false
}

// TestPulse moves a stream from several goroutines, about as often as it comes to rest.
func TestPulse(t *testing.T) {
	const rest = time.Millisecond
	told := &ordered{t: t}
	p := newPulse(rest)
	p.start("lease", told)
	var moving sync.WaitGroup
	for i := range uint64(3) {
		moving.Go(func() {
			r := rand.New(rand.NewPCG(i, 1))
			for range 200 {
				time.Sleep(time.Duration(r.Int64N(int64(3 * rest))))
				p.move()
			}
		})
	}
	moving.Wait()
	p.work(true)
	p.mu.Lock()
	if told.resting {
		t.Error("it rests at work")
	}
	p.mu.Unlock()
	p.work(false)
	expect.Eventually(t, "it rests", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return told.resting
	})
	p.stop()
	p.move()
	if !told.resting {
		t.Error("it told of a stir after its end")
	}
}
