// Pulse: whether anything moves on a stream, because a resting stream does not keep its runner in memory.

package handlers

import (
	"sync"
	"sync/atomic"
	"time"
)

// pulse reports when nothing has moved on a stream for a while, and when it moves again. A stream moves when a message
// arrives, when the server works for it, and when an answer is sent; it does not while the client leaves an answer
// unread. It costs a stream a timer, and two atomic operations a message.
type pulse struct {
	rest    time.Duration
	started time.Time
	last    atomic.Int64 // when something moved, since started
	working atomic.Bool  // the server works for the stream
	resting atomic.Bool

	mu     sync.Mutex // guards the fields below; held while events are called, which keeps their order
	lease  string
	events StreamEvents
	timer  *time.Timer // nil before start
	over   bool
}

func newPulse(rest time.Duration) *pulse { return &pulse{rest: rest, started: time.Now()} }

// start begins to report about the stream that lease has opened.
func (p *pulse) start(lease string, events StreamEvents) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lease, p.events = lease, events
	p.move()
	p.timer = time.AfterFunc(p.rest, p.look)
}

// move notes that something moved.
func (p *pulse) move() {
	p.last.Store(int64(time.Since(p.started)))
	if p.resting.Load() { // move and look store, then load: at least one of them sees the other's write
		p.stir()
	}
}

// work notes that the server begins to work for the stream, or has finished.
func (p *pulse) work(begins bool) {
	p.working.Store(begins)
	p.move()
}

func (p *pulse) stir() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resting.Load() && !p.over {
		p.resting.Store(false)
		p.events.StreamStirring(p.lease)
		p.timer.Reset(p.rest)
	}
}

// look reports that the stream rests, or sets the timer for when it may.
func (p *pulse) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	p.resting.Store(true)
	left := p.rest - (time.Since(p.started) - time.Duration(p.last.Load()))
	if p.working.Load() {
		left = p.rest
	}
	if left > 0 {
		p.resting.Store(false)
		p.timer.Reset(left)
		return
	}
	p.events.StreamResting(p.lease)
}

// stop ends the reports.
func (p *pulse) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	p.timer.Stop()
}
