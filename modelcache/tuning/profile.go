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

	"flightsvc/internal/protocol"
	"flightsvc/internal/regular"
	"flightsvc/modelcache/repository"
)

// Profile is what this host has learned of a model, by its digest. It lies in <cache-dir>/profiles and
// outlives the front.
type Profile struct {
	// the most that a runner's process had for itself
	HostBytes   int64            `json:"host_bytes,omitempty"`
	DeviceBytes map[string]int64 `json:"device_bytes,omitempty"` // the same of a device, by the device's name
	// the most rows of a run that fit, by the device's name; only where larger ones did not
	DeviceBatch map[string]int             `json:"device_batch,omitempty"`
	Tuned       map[string]protocol.Choice `json:"tuned,omitempty"` // by Machine
	// why its variables cannot be made constants; "" where they can, or nobody tried
	NotFrozen string `json:"not_frozen,omitempty"`
}

// Machine names what a measurement depends on besides the model: the processor, its number of cores here and
// what it can do. Two hosts of one kind have the same.
var Machine = sync.OnceValue(func() string {
	about := ""
	text, _ := os.ReadFile("/proc/cpuinfo") // without it all machines of one size are the same
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

// Profiles keeps them. Its methods are safe for concurrent use; fronts that share a cache-dir may
// overwrite each other's last word, which is as good.
type Profiles struct {
	dir string
	mu  sync.Mutex // held while one is changed
}

// NewProfiles returns those in a cache-dir; the folder is made with the first.
func NewProfiles(cacheDir string) *Profiles {
	return &Profiles{dir: filepath.Join(cacheDir, "profiles")}
}

// maxProfile is the most bytes of a profile's file.
const maxProfile = 1 << 20

func (p *Profiles) path(digest string) string {
	return filepath.Join(p.dir, strings.TrimPrefix(digest, "sha256:")+".json")
}

// Read returns what is known, nothing where there is no digest, or the file is not there or broken.
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

// Change reads a profile, lets f change it, and puts it back in one step.
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
