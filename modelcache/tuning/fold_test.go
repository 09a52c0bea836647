// Tests of folding in the background, against a pool and a Python that do as they are told.

package tuning

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
)

// newFolded returns a tuner whose pool has one model that may be folded.
func newFolded(t *testing.T, says string) (*Tuner, *fakePool, Sampled) {
	t.Helper()
	c, model := newTuned(t, "", says)
	pool := c.options.Pool.(*fakePool)
	one := Sampled{Model: model, Digest: mustDigest(t, c, model)}
	pool.sampled = []Sampled{one}
	return c, pool, one
}

func TestFold(t *testing.T) {
	t.Parallel()
	c, pool, model := newFolded(t, "")
	c.fold(t.Context(), model)
	if len(pool.replaced) != 1 || c.options.Profiles.Read(model.Digest).Folded != pool.replaced[0] ||
		!c.options.Repository.Known(pool.replaced[0]) {
		t.Errorf("%q serve, the profile has %q", pool.replaced, c.options.Profiles.Read(model.Digest).Folded)
	}
}

// TestFoldKeepsTheSavedForm for ever where the model is the reason, and for this process where this host is.
func TestFoldKeepsTheSavedForm(t *testing.T) {
	t.Parallel()
	frozen := `mkdir "$5" && cp "$4/saved_model.pb" "$5" && echo `
	for name, test := range map[string]struct {
		says     string
		memory   int64
		disagree error
		want     string
		known    bool
	}{
		"a table": {says: `echo '{"frozen":false,"reason":"it has a table"}'; exit 3`, want: "it has a table",
			known: true},
		"random numbers": {says: frozen + `'{"frozen":true,"not_folded":"RandomUniform"}'`,
			want: "it has an operation with a state (RandomUniform)", known: true},
		"other answers": {disagree: Agree([]control.Tensor{floats("y", 1.1)}, []control.Tensor{floats("y", 1)}),
			want:  "its folded form's answers to the same rows differ by 909 times what docs/numerics.md allows",
			known: true},
		"it cannot be loaded": {disagree: fault.New(fault.BadRequest, "no such operation"),
			want: "no such operation", known: true},
		"other types": {disagree: Agree([]control.Tensor{floats("z", 1)}, []control.Tensor{floats("y", 1)}),
			want: "its folded form answered the same rows with other values", known: true},
		"memory": {says: "sleep 20", memory: 1 << 40, want: "freezing it needs more than 300 MiB of memory",
			known: true},
		"Python": {says: "echo no >&2; exit 1", want: "freezing failed (exit status 1): no"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, pool, model := newFolded(t, test.says)
			pool.disagree = test.disagree
			c.options.OwnMemory = func(int) (int64, error) { return test.memory, nil }
			c.fold(t.Context(), model)
			if len(pool.kept) != 1 || !strings.HasPrefix(pool.kept[0], test.want) {
				t.Errorf("kept because %q", pool.kept)
			}
			about := c.options.Profiles.Read(model.Digest)
			if about.Folded != "" || (about.NotFrozen != "") != test.known {
				t.Errorf("the profile has %+v", about)
			}
		})
	}
}

// TestFoldTriesAgain what fails for a while: the folded form is made once.
func TestFoldTriesAgain(t *testing.T) {
	t.Parallel()
	c, pool, model := newFolded(t, "")
	now := time.Now()
	pool.noRoom = true
	c.fold(t.Context(), model)
	if c.folds.form(model.Digest) != "" || c.folds.due(model.Digest, now) || !c.folds.due(model.Digest,
		now.Add(2*foldRest)) {
		t.Error("without memory it does not rest")
	}
	pool.noRoom, pool.disagree = false, fault.New(fault.Unavailable, "the runner has ended")
	c.fold(t.Context(), model)
	made := c.folds.form(model.Digest)
	pool.noRoom, pool.disagree = true, nil
	c.fold(t.Context(), model)
	if made == "" || len(pool.replaced) != 1 || pool.replaced[0] != made || len(pool.kept) > 0 {
		t.Errorf("made %q, replaced by %q, kept because %q", made, pool.replaced, pool.kept)
	}
}

// TestFoldGivesUp on a model for which Python is killed again and again.
func TestFoldGivesUp(t *testing.T) {
	t.Parallel()
	c, pool, model := newFolded(t, "kill -9 $$")
	for try := range mostTries {
		if len(pool.kept) > 0 {
			t.Fatalf("given up after %d tries", try)
		}
		c.fold(t.Context(), model)
	}
	want := "Python was ended while it froze the model (signal: killed)"
	if len(pool.kept) != 1 || pool.kept[0] != want {
		t.Errorf("kept because %q", pool.kept)
	}
	if about := c.options.Profiles.Read(model.Digest); about.NotFrozen != "" {
		t.Errorf("the profile has %+v", about)
	}
	c, pool, model = newFolded(t, "")
	pool.disagree = fault.New(fault.Internal, "its runner ended while loading")
	for range mostTries - 1 {
		c.fold(t.Context(), model)
	}
	pool.disagree = nil
	c.fold(t.Context(), model)
	if len(pool.replaced) != 1 || len(pool.kept) > 0 {
		t.Errorf("replaced by %q, kept because %q", pool.replaced, pool.kept)
	}
}

// TestFoldOnceForAHost leaves the work to the front that has begun, and takes what it has found out.
func TestFoldOnceForAHost(t *testing.T) {
	t.Parallel()
	c, pool, model := newFolded(t, "exit 1")
	unlock, ok := NewProfiles(filepath.Dir(c.options.Profiles.dir)).lock()
	if !ok {
		t.Fatal("it is locked")
	}
	c.fold(t.Context(), model)
	if len(pool.replaced)+len(pool.kept) > 0 {
		t.Error("two at once")
	}
	unlock()
	form, err := c.options.Repository.Add(t.Context(), "m", func(folder string) error {
		return os.CopyFS(folder, os.DirFS(model.Model.Dir))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.options.Profiles.Change(model.Digest, func(p *Profile) { p.Folded = form }); err != nil {
		t.Fatal(err)
	}
	c.fold(t.Context(), model)
	if len(pool.replaced) != 1 || pool.replaced[0] != form {
		t.Errorf("replaced by %q, kept because %q", pool.replaced, pool.kept)
	}
}

// TestInBackground folds a model some time after its first answer, not while anything is loaded.
func TestInBackground(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, pool, _ := newFolded(t, "")
		pool.busy.Store(true)
		pool.loading.Store(true)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			c.InBackground(ctx, false)
		}()
		folded := func() int {
			synctest.Wait()
			pool.mu.Lock()
			defer pool.mu.Unlock()
			return len(pool.replaced) + len(pool.kept)
		}
		time.Sleep(time.Minute)
		if folded() > 0 {
			t.Error("folded while another model is loaded")
		}
		pool.loading.Store(false)
		time.Sleep(usedTime - lookTick)
		if folded() > 0 {
			t.Error("folded at once")
		}
		time.Sleep(3 * lookTick)
		if folded() != 1 {
			t.Error("not folded")
		}
		cancel()
		<-ended
	})
}
