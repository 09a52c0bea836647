// Tests of the build: its identity, and which package may depend on which.

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
)

// walls are dependencies that must not be, direct or not.
var walls = []struct{ from, to, why string }{
	{runner, "flightsvc/modelcache", "a runner knows one model, and links no model stores"},
	{runner, "flightsvc/gpu", "a runner is told its device, and links no NVML"},
	{runner, "gocloud.dev", "only the front reads stores"},
	{runner, "github.com/NVIDIA", "only the front asks NVML"},
	{"flightsvc/internal/client", "flightsvc/handlers", "a client needs the protocol alone"},
	{"flightsvc/internal/protocol", "github.com/apache/arrow", "the protocol's JSON needs neither Arrow nor gRPC"},
	{"flightsvc/internal/protocol", "google.golang.org/grpc", "the protocol's JSON needs neither Arrow nor gRPC"},
}

// within reports whether a package is another or below it.
func within(path, parent string) bool { return path == parent || strings.HasPrefix(path, parent+"/") }

// TestDependencies holds the walls of ARCHITECTURE.md.
func TestDependencies(t *testing.T) {
	for _, p := range packages(t, "./...") {
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		native := func(dep string) bool {
			return dep == tensorflow || dep == preprocess || dep == binding || strings.HasPrefix(dep, binding+"/op") || strings.HasPrefix(dep, tfgo)
		}
		linked := slices.DeleteFunc(slices.Clone(p.Deps), func(dep string) bool { return !native(dep) })
		switch p.ImportPath {
		case runner, tensorflow, preprocess, pictures, session:
		case front:
			if len(linked) > 0 {
				t.Errorf("%s links %v, but the front must start without libtensorflow, to say that it is missing", p.ImportPath, linked)
			}
		default:
			if len(linked) > 0 {
				t.Errorf("%s links %v; TensorFlow's only users are the runner and preprocess", p.ImportPath, linked)
			}
		}
		for _, wall := range walls {
			if within(p.ImportPath, wall.from) && slices.ContainsFunc(p.Deps, func(dep string) bool { return within(dep, wall.to) }) {
				t.Errorf("%s depends on %s: %s", p.ImportPath, wall.to, wall.why)
			}
		}
		if slices.Contains(p.Imports, tensorflow) && p.ImportPath != runner && p.ImportPath != preprocess && p.ImportPath != session {
			t.Errorf("%s imports %s", p.ImportPath, tensorflow)
		}
	}
}
