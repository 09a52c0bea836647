// Tests of tickets and their leases.

package handlers

import (
	"crypto/rand"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/protocol"
)

// granted is a descriptor of the model m with more fields, as a ticket.
func granted(t testing.TB, key []byte, now time.Time, fields string) *protocol.Descriptor {
	t.Helper()
	d, err := protocol.ParseDescriptor([]byte(`{"v":1,"model":"m"` + fields + `}`))
	if err == nil {
		err = d.Grant(key, now)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// commandOf writes a descriptor as it is.
func commandOf(t testing.TB, d *protocol.Descriptor) *flight.FlightDescriptor {
	t.Helper()
	text, err := d.Command()
	if err != nil {
		t.Fatal(err)
	}
	return command(string(text))
}

func TestLease(t *testing.T) {
	key, now := []byte("key"), time.UnixMilli(time.Now().UnixMilli()) // as precise as a lease
	book := leases{key: key, used: map[string]time.Time{}}
	ticket := granted(t, key, now, "")
	if other := granted(t, key, now, ""); other.Lease.ID == ticket.Lease.ID {
		t.Error("two leases have one id")
	}
	if got := time.UnixMilli(ticket.Lease.Expires).Sub(now).Round(time.Second); got != protocol.LeaseTime {
		t.Errorf("a lease holds for %s", got)
	}
	if err := book.spend(ticket, now.Add(protocol.LeaseTime-time.Second)); err != nil {
		t.Error(err)
	}
	expect.Fault(t, book.spend(ticket, now), fault.Unavailable, "opened a stream already", "ask the front")

	late := granted(t, key, now, "")
	expect.Fault(t, book.spend(late, now.Add(protocol.LeaseTime+time.Second)), fault.Unavailable, "expired 1s ago",
		"ask the front")
	for name, change := range map[string]func(*protocol.Descriptor){
		"another key":   func(d *protocol.Descriptor) { *d = *granted(t, []byte("other"), now, "") },
		"no mac":        func(d *protocol.Descriptor) { d.Lease.MAC = "" },
		"a longer life": func(d *protocol.Descriptor) { d.Lease.Expires += 1000 },
		"another id":    func(d *protocol.Descriptor) { d.Lease.ID += "x" },
		"another's mac": func(d *protocol.Descriptor) {
			d.Lease.MAC = granted(t, key, now.Add(time.Minute),
				"").Lease.MAC
		},
		"a cut-off mac":     func(d *protocol.Descriptor) { d.Lease.MAC = d.Lease.MAC[:len(d.Lease.MAC)-1] },
		"a doubled mac":     func(d *protocol.Descriptor) { d.Lease.MAC += d.Lease.MAC },
		"an empty lease":    func(d *protocol.Descriptor) { *d.Lease = protocol.Lease{} },
		"no lease":          func(d *protocol.Descriptor) { d.Lease = nil },
		"another model":     func(d *protocol.Descriptor) { d.Model = "other" },
		"another version":   func(d *protocol.Descriptor) { d.Version = "2" },
		"another signature": func(d *protocol.Descriptor) { d.Signature = "other" },
		"another mapping":   func(d *protocol.Descriptor) { d.Inputs = protocol.Inputs{{Tensor: "x", Column: "c"}} },
		"another request":   func(d *protocol.Descriptor) { d.RequestID = "other" },
	} {
		t.Run(name, func(t *testing.T) {
			forged := granted(t, key, now, "")
			change(forged)
			expect.Fault(t, book.spend(forged, now), fault.Unavailable, "unchanged ticket of GetFlightInfo")
		})
	}
	if len(book.used) != 1 {
		t.Errorf("%d leases are remembered, want the good one alone", len(book.used))
	}
	later := now.Add(time.Hour)
	if err := book.spend(granted(t, key, later, ""), later); err != nil || len(book.used) != 1 {
		t.Errorf("%d leases are remembered after all others expired, %v", len(book.used), err)
	}
}

// TestTicketsMeanTheSameWhenRead grants descriptors, writes them as tickets and reads them again, as a runner does.
func TestTicketsMeanTheSameWhenRead(t *testing.T) {
	key := []byte("key")
	for _, fields := range []string{
		``, `,"version":3`, `,"inputs":{"z":{"column":"c","pad":1e9},"a":"<&>"}`, `,"request_id":"\ud800"`,
		`,"batching":"off","redirect":false,"run_timeout_ms":0,"plane":"flight"`,
		`,"preprocess":{"p":{"size":[2,3],"scale":0.0078125,"offset":[-1,0,1e-9]}}`,
	} {
		text := commandOf(t, granted(t, key, time.Now(), fields)).GetCmd()
		d, err := protocol.ParseDescriptor(text)
		if err != nil || !d.Genuine(key) {
			t.Errorf("%s: %v, genuine: %t", text, err, err == nil && d.Genuine(key))
		}
	}
}

func TestLeaseOpensOneStreamOfMany(t *testing.T) {
	key, now := []byte("key"), time.UnixMilli(time.Now().UnixMilli()) // as precise as a lease
	book := leases{key: key, used: map[string]time.Time{}}
	ticket := granted(t, key, now, "")
	var opened atomic.Int32
	var working sync.WaitGroup
	for range 50 {
		working.Go(func() {
			if book.spend(ticket, now) == nil {
				opened.Add(1)
			}
		})
	}
	working.Wait()
	if opened.Load() != 1 {
		t.Errorf("one lease opened %d streams", opened.Load())
	}
}

// FuzzLease feeds leases: only one that the front has granted opens a stream, and once. Each process that fuzzes has
// a key of its own, since seeds that another one has granted are genuine under the same key.
func FuzzLease(f *testing.F) {
	key, now := []byte(rand.Text()), time.UnixMilli(1e12)
	ticket := granted(f, key, now, "")
	good := *ticket.Lease
	f.Add(good.ID, good.Expires, good.MAC)
	f.Add(good.ID, good.Expires+1, good.MAC)
	f.Add(good.ID+" 1", good.Expires, good.MAC)
	f.Add("", int64(-1<<63), "")
	f.Fuzz(func(t *testing.T, id string, expires int64, mac string) {
		fuzztest.Bounded(t, fuzzJSONBytes, func() {
			l := leases{key: key, used: map[string]time.Time{}}
			lease := protocol.Lease{ID: id, Expires: expires, MAC: mac}
			d := *ticket
			d.Lease = &lease
			if err := l.spend(&d, now); err != nil {
				expect.Fault(t, err, fault.Unavailable)
				if lease == good {
					t.Error("a good lease is refused")
				}
				return
			}
			if lease != good {
				t.Errorf("%+v is taken", lease)
			}
			expect.Fault(t, l.spend(&d, now), fault.Unavailable, "already")
		})
	})
}
