// Tests of references, versions in folders and allowed libraries.

package repository

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
)

func TestMain(m *testing.M) {
	if ask := os.Getenv(fetchVariable); ask != "" {
		fetchAlone(ask)
		os.Exit(0)
	}
	_ = flag.Set("test.parallel", "8") // they wait more than they work
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_PROFILE": "", "AWS_REGION": "us-east-1",
	} {
		_ = os.Setenv(name, value)
	}
	goleak.VerifyTestMain(m, // connections to stores stay open for a while
		goleak.IgnoreTopFunction("net/http.(*persistConn).readLoop"),
		goleak.IgnoreTopFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreTopFunction("internal/poll.runtime_pollWait"),
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

func TestFind(t *testing.T) {
	root := t.TempDir()
	at := func(parts ...string) string { return filepath.Join(append([]string{root}, parts...)...) }
	expect.Write(t, filepath.Join(at("plain"), savedmodel.File), expect.SavedModel())
	for _, version := range []string{"2", "10", "9"} {
		expect.Write(t, filepath.Join(at("many", version), savedmodel.File), expect.SavedModel())
	}
	expect.Write(t, filepath.Join(at("many", "draft"), savedmodel.File), expect.SavedModel())
	expect.Write(t, at("many", "11", "notes.txt"), "no SavedModel yet")
	expect.Write(t, at("empty", "notes.txt"), "")
	expect.Write(t, at("broken", savedmodel.File), "this is no protocol buffer")
	expect.Write(t, at("file"), "")
	expect.Write(t, filepath.Join(at("with space"), savedmodel.File), expect.SavedModel())
	cache := New(Options{ModelRoot: root, Quiet: 1, CacheDir: t.TempDir(), Log: zap.NewNop()})
	rootless := New(Options{CacheDir: t.TempDir(), Log: zap.NewNop()})
	t.Cleanup(cache.Close)
	t.Cleanup(rootless.Close)

	for name, c := range map[string]struct{ ref, version, dir, number string }{
		"a name":             {"plain", Latest, at("plain"), "1"},
		"a name, version 1":  {"plain", "1", at("plain"), "1"},
		"a path":             {at("plain"), Latest, at("plain"), "1"},
		"an untidy path":     {at("plain") + "/../plain//", Latest, at("plain"), "1"},
		"a URI":              {"file://" + at("plain"), Latest, at("plain"), "1"},
		"a URI with escapes": {"file://" + at("with%20space"), Latest, at("with space"), "1"},
		"the highest":        {"many", Latest, at("many", "10"), "10"},
		"one of many":        {"many", "9", at("many", "9"), "9"},
		"many by path":       {at("many"), Latest, at("many", "10"), "10"},
		"a version by path":  {at("many", "2"), Latest, at("many", "2"), "1"},
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 { // read, and remembered
				got, err := cache.Find(t.Context(), c.ref, c.version)
				if err != nil || got.Dir != c.dir || got.Version != c.number || got.Ref != c.ref ||
					len(got.Saved.Signatures) != 1 {
					t.Errorf("resolved to %+v, %v", got, err)
				}
			}
		})
	}
	for name, c := range map[string]struct {
		from         *Repository
		ref, version string
		kind         fault.Kind
		parts        []string
	}{
		"unknown name": {cache, "nope", Latest, fault.NotFound,
			[]string{"model nope", at("nope"), "no folder"}},
		"unknown path":        {cache, "/nope/m", Latest, fault.NotFound, []string{"/nope/m", "on this host"}},
		"a file":              {cache, "file", Latest, fault.NotFound, []string{"no folder"}},
		"not a SavedModel":    {cache, "empty", Latest, fault.NotFound, []string{"holds no saved_model.pb"}},
		"broken":              {cache, "broken", Latest, fault.BadRequest, []string{at("broken", savedmodel.File)}},
		"unknown version":     {cache, "many", "7", fault.NotFound, []string{"model many", "version 7"}},
		"version without one": {cache, "many", "11", fault.NotFound, []string{"version 11"}},
		"label":               {cache, "many", "draft", fault.NotFound, []string{"version draft"}},
		"traversing version":  {cache, "many", "../plain", fault.NotFound, []string{"version ../plain"}},
		"version of a plain":  {cache, "plain", "2", fault.NotFound, []string{"no version 2", "without versions"}},
		"no root":             {rootless, "plain", Latest, fault.NotFound, []string{"no model-root", "--model-root"}},
		"traversal": {cache, "../" + filepath.Base(root) + "/plain", Latest, fault.BadRequest,
			[]string{"one folder below the model-root"}},
		"dots": {cache, "..", Latest, fault.BadRequest, []string{"one folder below the model-root"}},
		"nested": {cache, "many/9", Latest, fault.BadRequest,
			[]string{"one folder below the model-root"}},
		"other scheme": {cache, "ftp://host/m", Latest, fault.BadRequest,
			[]string{"ftp://host/m", "no source \"ftp\"", "file:, s3:, gs: and azblob:"}},
		"no scheme": {cache, "m:2", Latest, fault.BadRequest,
			[]string{"m:2", "file:, s3:, gs: and azblob:", "sha256:"}},
		"URI of another host":  {cache, "file://host/m", Latest, fault.BadRequest, []string{"file:///absolute/path"}},
		"URI of relative path": {cache, "file:m", Latest, fault.BadRequest, []string{"file:///absolute/path"}},
		"URI with bad escape":  {cache, "file:///%zz", Latest, fault.BadRequest, []string{"file:///absolute/path"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.from.Find(t.Context(), c.ref, c.version)
			expect.Fault(t, err, c.kind, c.parts...)
		})
	}

	// A model that changes is read again.
	expect.Write(t, at("broken", savedmodel.File), "")
	expect.Write(t, filepath.Join(at("broken"), savedmodel.File), expect.SavedModel())
	if _, err := cache.Find(t.Context(), "broken", Latest); err != nil {
		t.Error(err)
	}
	expect.Write(t, at("plain", savedmodel.File), "broken now")
	if _, err := cache.Find(t.Context(), "plain", Latest); err == nil {
		t.Error("a model that was broken since is served from memory")
	}
}

func TestAllowedLibraries(t *testing.T) {
	folder := t.TempDir()
	expect.Write(t, filepath.Join(folder, "ops", "good.so"), "")
	expect.Write(t, filepath.Join(folder, "other.so"), "")
	if err := os.Symlink(filepath.Join(folder, "other.so"), filepath.Join(folder, "ops", "link.so")); err != nil {
		t.Fatal(err)
	}
	models := New(Options{OpLibraries: []string{filepath.Join(folder, "ops"), filepath.Join(folder, "nope")},
		Log: zap.NewNop()})
	t.Cleanup(models.Close)
	ask := func(path string) ([]string, error) {
		return models.AllowedLibraries(Model{Ref: "m", Settings: Settings{OpLibraries: []string{path}}})
	}
	if list, err := ask(filepath.Join(folder, "ops", "good.so")); err != nil || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	for _, path := range []string{"other.so", "ops/link.so", "ops/../other.so"} {
		_, err := ask(filepath.Join(folder, path))
		expect.Fault(t, err, fault.Precondition, "model m", "other.so, which this server does not allow",
			"op-libraries")
	}
	_, err := ask(filepath.Join(folder, "gone.so"))
	expect.Fault(t, err, fault.Precondition, "gone.so")
}

// TestAMemoIsBounded remembers more than there is room for.
func TestAMemoIsBounded(t *testing.T) {
	var m memo[int]
	for i := range 2 * remembered {
		m.put(fmt.Sprint(i), i)
		if got, ok := m.get(fmt.Sprint(i)); !ok || got != i {
			t.Fatalf("just remembered %d, found %d, %t", i, got, ok)
		}
	}
	if len(m.known) != remembered {
		t.Errorf("%d are remembered", len(m.known))
	}
	m.drop(fmt.Sprint(2*remembered - 1))
	if _, ok := m.get(fmt.Sprint(2*remembered - 1)); ok {
		t.Error("one that was dropped is known")
	}
}
