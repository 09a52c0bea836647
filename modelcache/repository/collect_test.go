// Tests of collection, with several repositories on one cache-dir.

package repository

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

// pushSome pushes a model of some bytes that was used last so long ago.
func pushSome(t *testing.T, c *Repository, name string, size int, ago time.Duration) Model {
	t.Helper()
	digest, _, err := c.Push(t.Context(), bytes.NewReader(archived(t,
		entry{name: "saved_model.pb", text: expect.SavedModel()},
		entry{name: "assets/" + name, text: strings.Repeat("x", size)})), "")
	if err != nil {
		t.Fatal(err)
	}
	model, err := c.Find(t.Context(), digest, "")
	if err != nil {
		t.Fatal(err)
	}
	age(t, model, ago)
	return model
}

func age(t *testing.T, model Model, ago time.Duration) {
	t.Helper()
	then := time.Now().Add(-ago)
	if err := os.Chtimes(model.Dir, then, then); err != nil {
		t.Error(err)
	}
}

func TestCollect(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	open := func(bytes int64) *Repository {
		c := New(Options{CacheDir: dir, CacheBytes: bytes, Log: zap.NewNop()})
		t.Cleanup(c.Close)
		return c
	}
	collect := func(c *Repository) { // beside those of its own
		c.collected.Lock()
		defer c.collected.Unlock()
		c.collect(time.Now())
	}
	c := open(250_000)
	c.collected.Lock() // none of its own until all are there
	oldest := pushSome(t, c, "a", 100_000, 5*time.Hour)
	held := pushSome(t, c, "b", 100_000, 4*time.Hour)
	old := pushSome(t, c, "c", 100_000, 3*time.Hour)
	recent := pushSome(t, c, "d", 100_000, 2*time.Hour)
	fresh := pushSome(t, c, "e", 100_000, 0)
	release, err := open(0).Hold(t.Context(), held) // by another front
	if err != nil {
		t.Fatal(err)
	}
	age(t, held, 4*time.Hour)
	c.collected.Unlock()
	collect(c)
	is := func(when string, want ...bool) {
		t.Helper()
		for i, model := range []Model{oldest, held, old, recent, fresh} {
			if c.known(model.Digest) != want[i] {
				t.Errorf("%s, model %d is there: %t", when, i, !want[i])
			}
		}
	}
	is("after a collection", false, true, false, false, true)
	if got := tree(t, c.models()); strings.Contains(got, ".gone") {
		t.Errorf("left behind: %s", got)
	}
	_, err = c.Hold(t.Context(), old)
	expect.Fault(t, err, fault.Unavailable, old.Ref, "ask again")
	_, err = c.Find(t.Context(), old.Ref, "")
	expect.Fault(t, err, fault.NotFound, "has not been pushed to this host")
	release()
	age(t, fresh, 2*justUsed)
	collect(open(1))
	is("when nothing is held", false, false, false, false, false)
	if release, err = c.Hold(t.Context(), Model{Dir: t.TempDir()}); err != nil {
		t.Errorf("a folder of somebody's own: %v", err)
	}
	release()
}

// TestNothingHeldGoes has fronts hold and read models while others push, age and collect them.
func TestNothingHeldGoes(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "cache")
	var fronts []*Repository
	for range 4 {
		c := New(Options{CacheDir: dir, CacheBytes: 60_000, Log: zap.NewNop()})
		t.Cleanup(c.Close)
		fronts = append(fronts, c)
	}
	archives := map[string][]byte{}
	for i := range 12 {
		archive := archived(t, entry{name: "saved_model.pb", text: expect.SavedModel()},
			entry{name: "assets/x", text: strings.Repeat(fmt.Sprint(i%10), 20_000+i)})
		digest, _, err := fronts[0].Push(t.Context(), bytes.NewReader(archive), "")
		if err != nil {
			t.Fatal(err)
		}
		archives[digest] = archive
	}
	var digests []string
	for digest := range archives {
		digests = append(digests, digest)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	holds, gone := 0, 0
	deadline := time.Now().Add(2 * time.Second)
	for i := range 8 {
		random := rand.New(rand.NewPCG(6, uint64(i))) //nolint:gosec // seeded
		work.Go(func() {
			c := fronts[i%len(fronts)]
			for time.Now().Before(deadline) {
				digest := digests[random.IntN(len(digests))]
				model, err := c.Find(t.Context(), digest, "")
				if err != nil {
					if _, _, err := c.Push(t.Context(), bytes.NewReader(archives[digest]), digest); err != nil {
						t.Error(err)
						return
					}
					continue
				}
				release, err := c.Hold(t.Context(), model)
				if err != nil {
					mu.Lock()
					gone++
					mu.Unlock()
					continue
				}
				age(t, model, time.Hour) // as if held for long
				for range 5 {
					if info, err := os.Stat(filepath.Join(model.Dir, "assets/x")); err != nil || info.Size() < 20_000 {
						t.Errorf("a model that is held: %v", err)
					}
					time.Sleep(time.Duration(random.IntN(1000)) * time.Microsecond)
				}
				release()
				mu.Lock()
				holds++
				mu.Unlock()
			}
		})
	}
	work.Go(func() {
		for time.Now().Before(deadline) {
			fronts[0].collect(time.Now())
			fronts[1].collect(time.Now())
		}
	})
	work.Wait()
	for _, c := range fronts {
		c.collect(time.Now().Add(2 * justUsed))
	}
	left := strings.Count(tree(t, filepath.Join(dir, "models")), "saved_model.pb")
	if left > 2 || holds == 0 {
		t.Errorf("%d models of 20,000 bytes are left in 60,000 bytes; there were %d holds", left, holds)
	}
	t.Logf("%d holds, %d times a model had gone between find and hold, %d models left", holds, gone, left)
}
