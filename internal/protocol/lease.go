package protocol

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"time"
)

// LeaseTime is how long a ticket can open a stream.
const LeaseTime = 30 * time.Second

// Lease is the right to open one stream at a runner with the descriptor that holds it, until it expires. The front
// grants it; the runner, which got the same key at its start, checks it.
type Lease struct {
	ID      string `json:"id"`
	Expires int64  `json:"expires"` // Unix milliseconds
	MAC     string `json:"mac"`     // HMAC-SHA256 of id, expiry and the rest of the descriptor, base64
}

// UnmarshalJSON is part of json.Unmarshaler.
func (l *Lease) UnmarshalJSON(data []byte) error {
	type plain Lease
	return Decode(data, (*plain)(l))
}

// Grant turns the descriptor into a ticket, with a new lease that expires LeaseTime after now. Any later change of the
// descriptor makes the lease invalid.
func (d *Descriptor) Grant(key []byte, now time.Time) error {
	lease := &Lease{ID: rand.Text(), Expires: now.Add(LeaseTime).UnixMilli()}
	mac, err := d.sign(key, lease)
	if err != nil {
		return err
	}
	lease.MAC, d.Lease = mac, lease
	return nil
}

// Genuine reports whether the descriptor has a lease that was granted with key for exactly this descriptor. It does not
// check whether the lease has expired.
func (d *Descriptor) Genuine(key []byte) bool {
	if d.Lease == nil {
		return false
	}
	mac, err := d.sign(key, d.Lease)
	return err == nil && hmac.Equal([]byte(d.Lease.MAC), []byte(mac))
}

// sign returns the MAC of a lease in the descriptor.
func (d *Descriptor) sign(key []byte, lease *Lease) (string, error) {
	unleased := *d
	unleased.Lease = nil
	command, err := unleased.Command()
	if err != nil {
		return "", err
	}
	mac := hmac.New(sha256.New, key)
	_, _ = fmt.Fprintf(mac, "%s %d %s", lease.ID, lease.Expires, command)
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)), nil
}
