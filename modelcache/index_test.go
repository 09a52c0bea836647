package modelcache

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
)

func TestIndex(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "good", nil)
		root := rootOf(t, cache)
		expect.Write(t, filepath.Join(filepath.Join(root, "many", "2"), savedmodel.File), expect.SavedModel())
		expect.Write(t, filepath.Join(filepath.Join(root, "many", "10"), savedmodel.File), expect.SavedModel())
		expect.Write(t, filepath.Join(filepath.Join(root, ".hidden"), savedmodel.File), expect.SavedModel())
		expect.Write(t, filepath.Join(root, "empty", "notes.txt"), "")
		expect.Write(t, filepath.Join(root, "broken", savedmodel.File), "this is no protocol buffer")
		expect.Write(t, filepath.Join(root, "file"), "")
		outside := t.TempDir()
		expect.Write(t, filepath.Join(outside, savedmodel.File), expect.SavedModel())
		list := func() string {
			t.Helper()
			entries, err := cache.Index(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var words []string
			for _, e := range entries {
				words = append(words, fmt.Sprintf("%s/%s:%s:%t", e.Ref, e.Version, e.State, e.Err == nil))
			}
			return strings.Join(words, " ")
		}
		const rest = "broken/:unloaded:false empty/:unloaded:false image/1:unloaded:true m/1:%s:true " +
			"many/2:unloaded:true many/10:unloaded:true"
		list()
		time.Sleep(2 * time.Second) // the versions settle
		if got := list(); got != fmt.Sprintf(rest, "unloaded") {
			t.Errorf("the index is %s", got)
		}
		other, err := cache.Resolve(t.Context(), outside, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []repository.Model{model, other} {
			if _, err := cache.Ready(context.Background(), m, ""); err != nil {
				t.Fatal(err)
			}
		}
		if ready := cache.InMemory(); len(ready) != 2 {
			t.Errorf("%d models are in memory", len(ready))
		}
		if got := list(); got != outside+"/1:ready:true "+fmt.Sprintf(rest, "ready") {
			t.Errorf("the index is %s", got)
		}
		expect.Write(t, filepath.Join(model.Dir, savedmodel.File), "broken since")
		if got := list(); !strings.Contains(got, " m/:ready:false ") || strings.Count(got, "m/") != 1 {
			t.Errorf("the index is %s", got)
		}
		nowhere := New(Options{Repository: repository.New(repository.Options{ModelRoot: filepath.Join(root, "nope"),
			Log: zap.NewNop()}), Log: zap.NewNop()})
		defer nowhere.Close()
		_, err = nowhere.Index(t.Context())
		expect.Fault(t, err, fault.Precondition, "model-root: ", "nope")
	})
}
