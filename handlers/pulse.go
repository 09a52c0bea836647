package handlers

import (
	"sync"
	"sync/atomic"
	"time"
)

// pulse tells when nothing has moved on a stream for a while, and when it moves again. Moving is a message that
// comes in, an answer that is sent, and work in between; an answer that the client does not take is not. It costs a stream
// two atomic operations a message, and a timer.
type pulse struct {
	rest    time.Duration
	started time.Time
	last    atomic.Int64 // when something moved, since started
	working atomic.Bool  // the server does something for the stream
	resting atomic.Bool

	mu     sync.Mutex // held while something is told, so that it is told in the order in which it happened
	lease  string
	events StreamEvents
	timer  *time.Timer // nil before start
	over   bool
}

func newPulse(rest time.Duration) *pulse { return &pulse{rest: rest, started: time.Now()} }

// start begins to tell, of the stream that a lease has opened.
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
	if p.resting.Load() { // after the store: one of this and look sees the other
		p.stir()
	}
}

// work notes that the server begins to do something for the stream, or has done it.
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

// look tells that the stream rests, or looks again when it may.
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

// stop ends it; nothing is told afterwards.
func (p *pulse) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	p.timer.Stop()
}
