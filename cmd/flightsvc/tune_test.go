// Tests of what the command tune shows.

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"flightsvc/internal/protocol"
	"flightsvc/modelcache/tuning"
)

// TestTune tunes a real model; no Python here freezes it.
func TestTune(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t, "--cores", "2", "--cache-dir", p.home+"/cache")
	tune := func(args ...string) (stdout, stderr string, err error) {
		cmd := p.command(append([]string{"tune", "--endpoint", f.Endpoint}, args...)...)
		var out, told bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &told
		err = cmd.Run()
		return out.String(), told.String(), err
	}
	out, told, err := tune(modelOf("mlp"))
	if err != nil {
		t.Fatalf("%v: %s", err, told)
	}
	for _, part := range []string{"model file://" + modelOf("mlp"), "to default", "chosen: ",
		"freezing: the graph is served as it is: ", "CPU: ", tuning.Machine()} {
		if !strings.Contains(out, part) {
			t.Errorf("no %q in\n%s", part, out)
		}
	}
	if lines := strings.Count(told, "rows/s"); lines < 6 {
		t.Errorf("%d candidates were told: %s", lines, told)
	}
	_, file, _ := strings.Cut(out, ") in ")
	file, _, _ = strings.Cut(file, ";")
	var profile tuning.Profile
	if text, err := os.ReadFile(file); err != nil || json.Unmarshal(text, &profile) != nil ||
		profile.Tuned[tuning.Machine()].BatchSize == 0 || profile.NotFrozen != "" {
		t.Errorf("the profile %s holds %+v, %v", file, profile, err)
	}
	for model, part := range map[string]string{"strings": "takes strings", "counter": "it assigns variables",
		"nowhere": "there is no folder"} {
		_, told, err := tune(modelOf(model))
		if err == nil || !strings.Contains(told, part) {
			t.Errorf("%s: %s", model, told)
		}
	}
}

func TestTableOfCandidates(t *testing.T) {
	frozen := protocol.Candidate{Choice: protocol.Choice{Frozen: "sha256:f", OneDNN: true, Cores: 2, BatchThreads: 1,
		BatchSize: 64}, RowsPerSecond: 123.4, Relative: 1.5, Agrees: true}
	standard := protocol.Candidate{Choice: protocol.Choice{Cores: 2, BatchThreads: 2, BatchSize: 16},
		RowsPerSecond: 82.3, Relative: 1, Agrees: true}
	wrong := protocol.Candidate{Choice: protocol.Choice{Cores: 1, BatchThreads: 2, BatchSize: 16}, RowsPerSecond: 1,
		Relative: 0.01, Difference: 3}
	var out bytes.Buffer
	err := show(&out, &protocol.Tuning{
		Model: "m", Version: "3", Signature: "serving_default", Machine: "amd64-2-0",
		Candidates: []protocol.Candidate{frozen, standard, wrong},
		Default:    standard, Chosen: frozen, NotFrozen: "it has a table", Stored: "/p.json", Busy: 0.5,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `
model m, version 3, signature serving_default

          graph  oneDNN  threads  at once  batch  rows/s  to default                        agrees
  * 1    frozen      on        2        1     64     123        1.50                           yes
    2  as it is     off        2        2     16    82.3        1.00                           yes
    3  as it is     off        1        2     16     1.0        0.01  no (3.0 times the tolerance)

freezing: the graph is served as it is: it has a table
other programs used 50 % of this machine's processors, so the speeds may be wrong; tune again when it is idle
`
	if got := out.String(); !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s", got)
	}
	if !strings.Contains(out.String(), "chosen: frozen, oneDNN on, 2 threads, 1 at once, batches of 64: 1.50 times "+
		"the default\n") {
		t.Errorf("got\n%s", out.String())
	}
}

// TestFreezingPython finds the interpreter of the environment that libtensorflow belongs to.
func TestFreezingPython(t *testing.T) {
	env := t.TempDir()
	for _, dir := range []string{"bin", "lib/python3.11/site-packages/tensorflow"} {
		if err := os.MkdirAll(env+"/"+dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", t.TempDir())
	t.Setenv("VIRTUAL_ENV", "")
	library := env + "/lib/python3.11/site-packages/tensorflow"
	if _, err := freezer("")(t.Context(), library); err == nil || !strings.Contains(err.Error(),
		"both TensorFlow and flightsvc") {
		t.Errorf("without one: %v", err)
	}
	if err := os.WriteFile(env+"/bin/python", []byte("#!/bin/sh\n"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	found, err := freezer("")(t.Context(), library)
	if err != nil || found != env+"/bin/python" {
		t.Errorf("found %s, %v", found, err)
	}
}
