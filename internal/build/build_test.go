// Build identity, and the walls between packages.

package build

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

func TestID(t *testing.T) {
	before, commit := ID(), Commit
	if again := ID(); again != before || !strings.HasPrefix(before, Commit+"-") {
		t.Errorf("the build is %s, then %s", before, again)
	}
	defer func() { Commit = commit }()
	if Commit = "other"; ID() == before {
		t.Error("two commits are one build")
	}
}

// pkg is what `go list` says of a package.
type pkg struct {
	ImportPath, Doc string
	Standard        bool
	Imports, Deps   []string
}

func packages(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Doc,Standard,Imports,Deps"}, args...)...)
	cmd.Dir = "../.."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var list []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

const (
	front      = "flightsvc/cmd/flightsvc"
	runner     = "flightsvc/cmd/flightsvc-runner"
	tensorflow = "flightsvc/internal/tensorflow"
	preprocess = "flightsvc/internal/preprocess"
	pictures   = "flightsvc/benchmarks/pictures" // times preprocess
	session    = "flightsvc/benchmarks/session"  // what a runner is measured beside
	binding    = "github.com/galeone/tensorflow/tensorflow/go"
	tfgo       = "github.com/galeone/tfgo"
	arrow      = "github.com/apache/arrow/go/v15/arrow"
)

// walls are what a package must not link, directly or through others.
var walls = map[string][]string{
	runner: {
		"flightsvc/modelcache", "flightsvc/handlers/front", "flightsvc/gpu", "github.com/NVIDIA",
		"gocloud.dev", "github.com/aws", "github.com/Azure", "cloud.google.com",
	},
	"flightsvc/handlers":        {"flightsvc/modelcache", "flightsvc/gpu", "flightsvc/handlers/front"},
	"flightsvc/internal/client": {"flightsvc/handlers", "flightsvc/modelcache", "flightsvc/gpu"},
	"flightsvc/internal/protocol": {
		"flightsvc/handlers", "flightsvc/modelcache", "flightsvc/gpu", "github.com/apache/arrow",
		"google.golang.org/grpc",
	},
	"flightsvc/modelcache":            {"flightsvc/handlers"},
	"flightsvc/modelcache/repository": {"flightsvc/handlers", "flightsvc/gpu", "flightsvc/modelcache/tuning"},
	"flightsvc/modelcache/tuning":     {"flightsvc/handlers", "flightsvc/gpu"},
}

// arrowUsers are the packages that read and make record batches; others name an allocator or a Flight client at most.
var arrowUsers = []string{"flightsvc/handlers", "flightsvc/handlers/front", "flightsvc/internal/tensor",
	"flightsvc/internal/offheap"}

// within reports whether a package is one of those below path.
func within(dep, path string) bool { return dep == path || strings.HasPrefix(dep, path+"/") }

// TestDependencies holds the walls of ARCHITECTURE.md.
func TestDependencies(t *testing.T) {
	for _, p := range packages(t, "./...") {
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		native := func(dep string) bool {
			return dep == tensorflow || dep == preprocess || dep == binding || strings.HasPrefix(dep, binding+"/op") ||
				strings.HasPrefix(dep, tfgo)
		}
		linked := slices.DeleteFunc(slices.Clone(p.Deps), func(dep string) bool { return !native(dep) })
		switch p.ImportPath {
		case runner, tensorflow, preprocess, pictures, session:
		case front:
			if len(linked) > 0 {
				t.Errorf("%s links %v, but the front must start without libtensorflow, to say that it is missing",
					p.ImportPath, linked)
			}
		default:
			if len(linked) > 0 {
				t.Errorf("%s links %v; TensorFlow's only users are the runner and preprocess", p.ImportPath, linked)
			}
		}
		if slices.Contains(p.Imports, tensorflow) && p.ImportPath != runner && p.ImportPath != preprocess &&
			p.ImportPath != session {
			t.Errorf("%s imports %s", p.ImportPath, tensorflow)
		}
		for _, wall := range walls[p.ImportPath] {
			if i := slices.IndexFunc(p.Deps, func(dep string) bool { return within(dep, wall) }); i >= 0 {
				t.Errorf("%s links %s; nothing of %s belongs there", p.ImportPath, p.Deps[i], wall)
			}
		}
		for _, used := range p.Imports {
			plain := used == arrow+"/memory" || used == arrow+"/flight"
			if within(used, arrow) && !plain && !slices.Contains(arrowUsers, p.ImportPath) {
				t.Errorf("%s imports %s; record batches are for %q", p.ImportPath, used, arrowUsers)
			}
		}
	}
}
