// Profiles: what this host has learned of models, in files by their digests.

package tuning

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"flightsvc/internal/protocol"
	"flightsvc/internal/regular"
	"flightsvc/modelcache/repository"
)

// Profile is what this host has learned of the model with a digest. It lies in <cache-dir>/profiles and outlives the
// front.
type Profile struct {
	// most bytes of the host that a runner was seen to use
	HostBytes   int64            `json:"host_bytes,omitempty"`
	DeviceBytes map[string]int64 `json:"device_bytes,omitempty"` // the same of a device, by the device's name
	// most rows of a run that fit into a device's memory, by the device's name; only there if a larger run did not
	DeviceBatch map[string]int             `json:"device_batch,omitempty"`
	Tuned       map[string]protocol.Choice `json:"tuned,omitempty"` // by Machine
	// digest of the model frozen and folded, once its answers agree with the model's; "" before
	Folded string `json:"folded,omitempty"`
	// why it cannot be frozen, or is not served so; "" if it can, or if that was not tried
	NotFrozen string `json:"not_frozen,omitempty"`
}

// Machine names the kind of machine for which a measurement holds: the processor's architecture, model and features,
// and how many of its cores this process may use. Equal hosts have the same name.
var Machine = sync.OnceValue(func() string {
	about := ""
	text, _ := os.ReadFile("/proc/cpuinfo") // without it only architecture and cores count
	for _, line := range strings.Split(string(text), "\n") {
		if name, value, ok := strings.Cut(line, ":"); ok {
			switch strings.TrimSpace(name) {
			case "model name", "flags":
				about += value
			}
		} else if about != "" {
			break // the first processor is enough
		}
	}
	sum := sha256.Sum256([]byte(about))
	return fmt.Sprintf("%s-%d-%s", runtime.GOARCH, runtime.GOMAXPROCS(0), hex.EncodeToString(sum[:4]))
})

// Profiles keeps profiles. Its methods are safe for concurrent use. Fronts that share a cache-dir may overwrite each
// other's changes, which is harmless: each change is as good a measurement.
type Profiles struct {
	dir string
	mu  sync.Mutex // held while one is changed
}

// NewProfiles returns the profiles in a cache-dir; their folder is made with the first.
func NewProfiles(cacheDir string) *Profiles {
	return &Profiles{dir: filepath.Join(cacheDir, "profiles")}
}

// maxProfile is the most bytes of a profile's file.
const maxProfile = 1 << 20

func (p *Profiles) path(digest string) string {
	return filepath.Join(p.dir, strings.TrimPrefix(digest, "sha256:")+".json")
}

// Read returns the profile of a digest. It is empty if the digest is "", or its file is missing or broken.
func (p *Profiles) Read(digest string) Profile {
	var known Profile
	if digest == "" {
		return known
	}
	text, err := regular.Read(context.Background(), p.path(digest), maxProfile)
	if err != nil || json.Unmarshal(text, &known) != nil {
		return Profile{}
	}
	return known
}

// lock locks the folder for all fronts of this host that share it; false if another one has it. The caller calls
// unlock.
func (p *Profiles) lock() (unlock func(), ok bool) {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return nil, false
	}
	folder, err := os.Open(p.dir)
	if err != nil {
		return nil, false
	}
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = folder.Close()
		return nil, false
	}
	return func() { _ = folder.Close() }, true
}

// Change reads a profile, lets f change it, and replaces its file in one step.
func (p *Profiles) Change(digest string, f func(*Profile)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.Read(digest)
	f(&known)
	text, err := json.Marshal(known)
	if err != nil {
		return err
	}
	return repository.ReplaceFile(p.path(digest), ".profile-", append(text, '\n'))
}
