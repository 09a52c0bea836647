// Tests of versions that are copied while they are asked for.

package repository

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
)

// modelFiles are those of a SavedModel with two data files; their texts tell of the version.
func modelFiles(t testing.TB, number int) map[string]string {
	files := map[string]string{savedmodel.File: expect.SavedModel()}
	for _, name := range []string{"fingerprint.pb", "variables/variables.index",
		"variables/variables.data-00000-of-00002", "variables/variables.data-00001-of-00002", "assets/words.txt"} {
		files[name] = fmt.Sprintf("%s of %d", name, number)
	}
	return files
}

func wholeOf(t testing.TB, dir string, files map[string]string) error {
	t.Helper()
	for name, text := range files {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if string(got) != text {
			return fmt.Errorf("%s holds %d bytes of %d", name, len(got), len(text))
		}
	}
	return nil
}

// TestNeverHalfAVersion copies versions in the ways in which people do, file by file with pauses, while readers ask for
// the latest: whatever they are given must be whole.
func TestNeverHalfAVersion(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	c := New(Options{ModelRoot: root, CacheDir: t.TempDir(), Log: zap.NewNop()})
	t.Cleanup(c.Close)
	const versions = 6
	random := rand.New(rand.NewPCG(6, 1)) //nolint:gosec // seeded, to be run again
	base := filepath.Join(root, "m")
	files := map[string]map[string]string{}
	for v := 1; v <= versions; v++ {
		files[fmt.Sprint(v)] = modelFiles(t, v)
	}
	var copied atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer stop()
		for v := 1; v <= versions; v++ {
			number := fmt.Sprint(v)
			names := make([]string, 0, 6)
			for name := range files[number] { // in any order
				names = append(names, name)
			}
			random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
			for _, name := range names {
				text, path := files[number][name], filepath.Join(base, number, name)
				if v%3 == 0 { // as rsync: under another name first, and with an old time
					expect.Write(t, path+".tmp", text)
					old := time.Now().Add(-24 * time.Hour)
					if err := os.Chtimes(path+".tmp", old, old); err != nil {
						t.Error(err)
					}
					if err := os.Rename(path+".tmp", path); err != nil {
						t.Error(err)
					}
				} else { // as cp, in two writes
					half := len(text) / 2
					expect.Write(t, path, text[:half])
					time.Sleep(time.Duration(random.IntN(120)) * time.Millisecond)
					expect.Write(t, path, text)
				}
				time.Sleep(time.Duration(random.IntN(250)) * time.Millisecond)
			}
			copied.Store(int64(v))
		}
		time.Sleep(quiet + 300*time.Millisecond)
	}()
	seen, last, asked := map[string]bool{}, "0", 0
	for ctx.Err() == nil {
		before := copied.Load()
		model, err := c.Find(ctx, "m", "")
		if err != nil {
			if kind, _ := fault.KindOf(err); ctx.Err() == nil && before > 0 && kind != fault.NotFound {
				t.Fatalf("after %d versions: %v", before, err)
			}
			continue
		}
		asked++
		if err := wholeOf(t, model.Dir, files[model.Version]); err != nil {
			t.Fatalf("version %s is not whole: %v", model.Version, err)
		}
		if model.Version < last {
			t.Errorf("after version %s came %s", last, model.Version)
		}
		seen[model.Version], last = true, model.Version
		time.Sleep(2 * time.Millisecond)
	}
	<-done
	if model, err := c.Find(t.Context(), "m", ""); err != nil || model.Version != fmt.Sprint(versions) {
		t.Errorf("at the end the latest is %s, %v", model.Version, err)
	}
	t.Logf("%d answers, all whole, of versions %v", asked, seen)
}

func TestVersions(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	c := New(Options{ModelRoot: root, CacheDir: t.TempDir(), Log: zap.NewNop()})
	t.Cleanup(c.Close)
	put := func(number string, leave ...string) {
		t.Helper()
		for name, text := range modelFiles(t, 1) {
			if !strings.Contains(strings.Join(leave, " "), name) {
				expect.Write(t, filepath.Join(root, "m", number, name), text)
			}
		}
	}
	put("1")
	put("3", "variables/variables.data-00001-of-00002")
	put("4", savedmodel.File)
	expect.Write(t, filepath.Join(root, "plain", savedmodel.File), expect.SavedModel())

	if numbers, err := c.Settled(t.Context(), "m"); err != nil || len(numbers) != 0 {
		t.Errorf("settled at once: %v, %v", numbers, err)
	}
	started := time.Now()
	model, err := c.Find(t.Context(), "m", Latest)
	if err != nil || model.Version != "1" || time.Since(started) < quiet/2 || model.Stamp == "" ||
		model.Base != filepath.Join(root, "m") {
		t.Errorf("the first is %+v, %v after %s", model, err, time.Since(started))
	}
	for _, number := range []string{"3", "4", "9", "label"} {
		_, err = c.Find(t.Context(), "m", number)
		expect.Fault(t, err, fault.NotFound, "model m", "version "+number)
	}
	if numbers, err := c.Settled(t.Context(), "m"); err != nil || strings.Join(numbers, " ") != "1" {
		t.Errorf("settled: %v, %v", numbers, err)
	}
	if numbers, err := c.Settled(t.Context(), "plain"); err != nil || numbers != nil {
		t.Errorf("a SavedModel without versions has %v, %v", numbers, err)
	}

	// One that serves is waited for when something in it changes, rather than a lower one taken.
	put("2")
	if model, err = c.Find(t.Context(), "m", Latest); err != nil || model.Version != "1" {
		t.Errorf("while 2 settles: %s, %v", model.Version, err)
	}
	model, err = c.Find(t.Context(), "m", "2")
	if err != nil || model.Version != "2" {
		t.Fatalf("2 is %+v, %v", model, err)
	}
	expect.Write(t, filepath.Join(model.Dir, "assets/words.txt"), "others")
	if numbers, err := c.Settled(t.Context(), "m"); err != nil || strings.Join(numbers, " ") != "1 2" {
		t.Errorf("settled: %v, %v", numbers, err)
	}
	again, err := c.Find(t.Context(), "m", Latest)
	if err != nil || again.Version != "2" || again.Stamp == model.Stamp {
		t.Errorf("after a change %s with stamp %s, %v", again.Version, again.Stamp, err)
	}
	if err := os.Remove(filepath.Join(again.Dir, savedmodel.File)); err != nil {
		t.Fatal(err)
	}
	if model, err = c.Find(t.Context(), "m", Latest); err != nil || model.Version != "1" {
		t.Errorf("when 2 is gone: %s, %v", model.Version, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	put("7")
	if _, err := c.Find(short, "m", "7"); err == nil || short.Err() == nil {
		t.Errorf("the caller's deadline did not end the wait: %v", err)
	}
}

// TestWhole takes no file on its way for the one that it becomes: S3's and Google's tools copy to a longer name first.
func TestWhole(t *testing.T) {
	const data = "variables/variables.data-0000"
	for names, want := range map[string]bool{
		"":                          true,
		"variables/variables.index": false,
		"variables/variables.index " + data + "0-of-00001":                             true,
		"variables/variables.index " + data + "0-of-00001.6eF2a1B0":                    false,
		"variables/variables.index " + data + "0-of-00001_.gstmp":                      false,
		"variables/variables.index " + data + "0-of-00002 " + data + "0-of-00002.part": false,
		"variables/variables.index " + data + "0-of-00002 " + data + "1-of-00002":      true,
	} {
		s := snapshot{files: []file{{path: savedmodel.File}}}
		for name := range strings.FieldsSeq(names) {
			s.files = append(s.files, file{path: name})
		}
		s.seal()
		if got := s.whole(); got != want {
			t.Errorf("%q: %t", names, got)
		}
	}
}

func TestDigestOfFolders(t *testing.T) {
	root, store := t.TempDir(), newStore(t)
	entries := []entry{}
	for name, text := range modelFiles(t, 1) {
		expect.Write(t, filepath.Join(root, "m", name), text)
		entries = append(entries, entry{name: name, text: text})
	}
	want, _, err := store.Push(t.Context(), strings.NewReader(string(archived(t, entries...))), "")
	if err != nil {
		t.Fatal(err)
	}
	digestOf := func(ref string) (string, error) {
		model, err := store.Find(t.Context(), ref, "")
		if err != nil {
			t.Fatal(err)
		}
		return store.Digest(t.Context(), model)
	}
	dir := filepath.Join(root, "m")
	for _, ref := range []string{dir, dir, want} {
		if got, err := digestOf(ref); got != want || err != nil {
			t.Errorf("%s has the digest %s, %v; pushed it is %s", ref, got, err, want)
		}
	}
	if got, err := digestOf(protocol.Image); got != "" || err != nil {
		t.Errorf("the built-in model has %q, %v", got, err)
	}
	expect.Write(t, filepath.Join(dir, "assets/words.txt"), "new")
	if got, err := digestOf(dir); got == want || err != nil {
		t.Errorf("after a change it is %s, %v", got, err)
	}
	expect.Write(t, filepath.Join(dir, "assets/words.txt"), "not new")
	stale, err := store.Find(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	expect.Write(t, filepath.Join(dir, "assets/words.txt"), "newer")
	_, err = store.Digest(t.Context(), stale)
	expect.Fault(t, err, fault.Unavailable, "just changed")
	if err := os.Symlink("words.txt", filepath.Join(dir, "assets", "link")); err != nil {
		t.Fatal(err)
	}
	if got, err := digestOf(dir); got != "" || err != nil {
		t.Errorf("with a link it has %q, %v", got, err)
	}
}

// BenchmarkFind is what a front does for each stream.
func BenchmarkFind(b *testing.B) {
	root := b.TempDir()
	c := New(Options{ModelRoot: root, CacheDir: b.TempDir(), Log: zap.NewNop()})
	b.Cleanup(c.Close)
	for v := 1; v <= 3; v++ {
		for name, text := range modelFiles(b, v) {
			expect.Write(b, filepath.Join(root, "m", fmt.Sprint(v), name), text)
		}
	}
	time.Sleep(quiet)
	for b.Loop() {
		if _, err := c.Find(b.Context(), "m", ""); err != nil {
			b.Fatal(err)
		}
	}
}
