package handlers

import (
	"sync"
	"time"

	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
)

// leases checks leases, and remembers used ones until they expire, so that each opens only one stream.
type leases struct {
	key []byte

	mu   sync.Mutex           // guards used
	used map[string]time.Time // expiry by id
}

// spend checks the lease of a descriptor and uses it up. Its fault is Unavailable: the caller asks the front for
// another ticket.
func (l *leases) spend(d *protocol.Descriptor, now time.Time) error {
	if !d.Genuine(l.key) {
		return fault.New(fault.Unavailable,
			"a runner opens streams with an unchanged ticket of GetFlightInfo only; ask the front for one")
	}
	expires := time.UnixMilli(d.Lease.Expires)
	if now.After(expires) {
		return fault.New(fault.Unavailable, "the ticket's lease expired %s ago; ask the front for another",
			now.Sub(expires).Round(time.Millisecond))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, expiry := range l.used {
		if now.After(expiry) {
			delete(l.used, id)
		}
	}
	if _, spent := l.used[d.Lease.ID]; spent {
		return fault.New(fault.Unavailable, "the ticket's lease has opened a stream already; ask the front for another")
	}
	l.used[d.Lease.ID] = expires
	return nil
}
