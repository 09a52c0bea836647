package handlers

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

func TestLease(t *testing.T) {
	key, now := []byte("key"), time.UnixMilli(time.Now().UnixMilli()) // as precise as a lease
	book := leases{key: key, used: map[string]time.Time{}}
	lease := Grant(key, now)
	if other := Grant(key, now); other.ID == lease.ID {
		t.Error("two leases have one id")
	}
	if got := time.UnixMilli(lease.Expires).Sub(now).Round(time.Second); got != LeaseTime {
		t.Errorf("a lease holds for %s", got)
	}
	if err := book.spend(&lease, now.Add(LeaseTime-time.Second)); err != nil {
		t.Error(err)
	}
	expect.Fault(t, book.spend(&lease, now), fault.Unavailable, "opened a stream already", "ask the front")

	late := Grant(key, now)
	expect.Fault(t, book.spend(&late, now.Add(LeaseTime+time.Second)), fault.Unavailable, "expired 1s ago", "ask the front")
	for name, change := range map[string]func(*Lease){
		"another key":    func(l *Lease) { *l = Grant([]byte("other"), now) },
		"no mac":         func(l *Lease) { l.MAC = "" },
		"a longer life":  func(l *Lease) { l.Expires += 1000 },
		"another id":     func(l *Lease) { l.ID += "x" },
		"another's mac":  func(l *Lease) { other := Grant(key, now.Add(time.Minute)); l.MAC = other.MAC },
		"a cut-off mac":  func(l *Lease) { l.MAC = l.MAC[:len(l.MAC)-1] },
		"a doubled mac":  func(l *Lease) { l.MAC += l.MAC },
		"an empty lease": func(l *Lease) { *l = Lease{} },
	} {
		t.Run(name, func(t *testing.T) {
			forged := Grant(key, now)
			change(&forged)
			expect.Fault(t, book.spend(&forged, now), fault.Unavailable, "ticket of GetFlightInfo")
		})
	}
	expect.Fault(t, book.spend(nil, now), fault.Unavailable, "ticket of GetFlightInfo")
	if len(book.used) != 1 {
		t.Errorf("%d leases are remembered, want the good one alone", len(book.used))
	}
	later := now.Add(time.Hour)
	fresh := Grant(key, later)
	if err := book.spend(&fresh, later); err != nil || len(book.used) != 1 {
		t.Errorf("%d leases are remembered after all others expired, %v", len(book.used), err)
	}
}

func TestLeaseOpensOneStreamOfMany(t *testing.T) {
	key, now := []byte("key"), time.UnixMilli(time.Now().UnixMilli()) // as precise as a lease
	book := leases{key: key, used: map[string]time.Time{}}
	lease := Grant(key, now)
	var opened atomic.Int32
	var working sync.WaitGroup
	for range 50 {
		working.Go(func() {
			if book.spend(&lease, now) == nil {
				opened.Add(1)
			}
		})
	}
	working.Wait()
	if opened.Load() != 1 {
		t.Errorf("one lease opened %d streams", opened.Load())
	}
}
