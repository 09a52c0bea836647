package handlers

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"sync"
	"time"

	"flightsvc/internal/fault"
)

// LeaseTime is how long a ticket can open a stream.
const LeaseTime = 30 * time.Second

// Lease is the right to open one stream at a runner, until it expires. The front grants it
// and the runner, which got the same key at its start, checks it.
type Lease struct {
	ID      string `json:"id"`
	Expires int64  `json:"expires"` // Unix milliseconds
	MAC     string `json:"mac"`     // HMAC-SHA256 of id and expires, base64
}

// UnmarshalJSON is part of json.Unmarshaler.
func (l *Lease) UnmarshalJSON(data []byte) error {
	type plain Lease
	return decodeStrictly(data, (*plain)(l))
}

// Grant returns a new lease that expires LeaseTime after now.
func Grant(key []byte, now time.Time) Lease {
	lease := Lease{ID: rand.Text(), Expires: now.Add(LeaseTime).UnixMilli()}
	lease.MAC = lease.sign(key)
	return lease
}

func (l *Lease) sign(key []byte) string {
	mac := hmac.New(sha256.New, key)
	_, _ = fmt.Fprintf(mac, "%s %d", l.ID, l.Expires)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// leases remembers the used ones until they expire, so that each opens one stream.
type leases struct {
	key []byte

	mu   sync.Mutex           // guards used
	used map[string]time.Time // expiry by id
}

// spend checks a lease and uses it up. Its fault is Unavailable: the caller asks the front
// for another.
func (l *leases) spend(lease *Lease, now time.Time) error {
	if lease == nil || !hmac.Equal([]byte(lease.MAC), []byte(lease.sign(l.key))) {
		return fault.New(fault.Unavailable, "a runner opens streams with the ticket of GetFlightInfo only; ask the front for one")
	}
	expires := time.UnixMilli(lease.Expires)
	if now.After(expires) {
		return fault.New(fault.Unavailable, "the ticket's lease expired %s ago; ask the front for another", now.Sub(expires).Round(time.Millisecond))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, expiry := range l.used {
		if now.After(expiry) {
			delete(l.used, id)
		}
	}
	if _, spent := l.used[lease.ID]; spent {
		return fault.New(fault.Unavailable, "the ticket's lease has opened a stream already; ask the front for another")
	}
	l.used[lease.ID] = expires
	return nil
}
