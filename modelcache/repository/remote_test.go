// Tests of stores, against an S3 server of this machine.

package repository

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob"
	_ "gocloud.dev/blob/gcsblob"
	_ "gocloud.dev/blob/s3blob"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
)

// s3 is a real S3-compatible server with a proxy before it, which counts and cuts.
type s3 struct {
	t     *testing.T
	uri   func(path string) string // of the bucket "models", through the proxy
	data  string                   // folder of the bucket
	reads atomic.Int64             // objects that were got
	lists atomic.Int64
	cut   atomic.Int64  // how many bodies still end early
	gate  chan struct{} // where set, bodies wait for it
	down  atomic.Bool
}

// newS3 starts versitygw, which `make test` builds, on a folder of its own.
func newS3(t *testing.T) *s3 {
	t.Helper()
	binary, err := filepath.Abs("../../build/s3/versitygw")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Skip("skipped: needs build/s3/versitygw; run make build/s3/versitygw")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	_ = listener.Close()
	root, aside := t.TempDir(), t.TempDir()
	// nolint:gosec // see above
	server := exec.Command(binary, "--access", "test", "--secret", "testtest", "--port", address, "--quiet", "posix",
		"--sidecar", aside, root)
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	s := &s3{t: t, data: filepath.Join(root, "models")}
	target := &url.URL{Scheme: "http", Host: address}
	proxy := httputil.NewSingleHostReverseProxy(target) // keeps the host, which is part of the signature
	proxy.ErrorLog, _ = zap.NewStdLogAt(zap.NewNop(), zap.InfoLevel)
	proxy.ModifyResponse = s.answer
	// nolint:gosec // of a test
	front := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, r)
	})}
	listener, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = front.Serve(listener) }()
	t.Cleanup(func() { _ = front.Close(); <-served })
	s.uri = func(path string) string {
		return fmt.Sprintf("s3://models/%s?endpoint=http://%s&use_path_style=true&region=us-east-1",
			path, listener.Addr())
	}
	expect.Eventually(t, "the S3 server answers", func() bool {
		connection, err := net.Dial("tcp", address)
		if err == nil {
			_ = connection.Close()
		}
		return err == nil
	})
	if err := os.Mkdir(s.data, 0o700); err != nil { // a bucket is a folder
		t.Fatal(err)
	}
	return s
}

// answer counts an answer of the server, and cuts it.
func (s *s3) answer(r *http.Response) error {
	switch {
	case r.Request.Method != http.MethodGet:
		return nil
	case r.Request.URL.Query().Has("list-type"):
		s.lists.Add(1)
		return nil
	case r.StatusCode/100 != 2:
		return nil
	}
	s.reads.Add(1)
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-r.Request.Context().Done():
		}
	}
	if r.ContentLength > 1000 && s.cut.Add(-1) >= 0 {
		r.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(io.LimitReader(r.Body, r.ContentLength/2), brokenReader{}), r.Body}
	}
	return nil
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// put uploads files by the S3 protocol.
func (s *s3) put(path string, files map[string]string) {
	s.t.Helper()
	bucket, err := blob.OpenBucket(s.t.Context(), s.uri(""))
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = bucket.Close() }()
	for name, text := range files {
		if err := bucket.WriteAll(s.t.Context(), path+"/"+name, []byte(text), nil); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *s3) remove(path string) {
	s.t.Helper()
	bucket, err := blob.OpenBucket(s.t.Context(), s.uri(""))
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = bucket.Close() }()
	for object, err := range listAll(s.t.Context(), bucket, path+"/") {
		if err == nil {
			err = bucket.Delete(s.t.Context(), object)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

func listAll(ctx context.Context, bucket *blob.Bucket, prefix string) func(func(string, error) bool) {
	return func(yield func(string, error) bool) {
		var keys []string
		objects := bucket.List(&blob.ListOptions{Prefix: prefix})
		for {
			object, err := objects.Next(ctx)
			if err == io.EOF {
				break
			}
			if err != nil {
				yield("", err)
				return
			}
			keys = append(keys, object.Key)
		}
		for _, key := range keys {
			if !yield(key, nil) {
				return
			}
		}
	}
}

// largeModel is a model whose weights take several reads.
func largeModel(t testing.TB, number int) map[string]string {
	files := modelFiles(t, number)
	files["variables/variables.data-00000-of-00002"] = strings.Repeat(fmt.Sprintf("weights of %d.", number), 40_000)
	return files
}

func remoteCache(t *testing.T, cacheDir, root string) *Repository {
	t.Helper()
	c := New(Options{ModelRoot: root, CacheDir: cacheDir, PollInterval: 200 * time.Millisecond, Log: zap.NewNop()})
	t.Cleanup(c.Close)
	return c
}

// TestS3 is the life of a model in a store: put, listed, fetched, a new version, a version deleted, the store away.
func TestS3(t *testing.T) {
	t.Parallel()
	store := newS3(t)
	c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), store.uri("repository"))
	store.put("repository/m/1", largeModel(t, 1))
	store.put("repository/m", map[string]string{control.SettingsFile: `{"warm_up":"off"}`})

	entries, err := c.Index(t.Context())
	if err != nil || len(entries) != 2 || entries[1].Ref != "m" || store.reads.Load() != 0 {
		t.Errorf("the index is %+v, %v after %d reads", entries, err, store.reads.Load())
	}
	model, err := c.Find(t.Context(), "m", "")
	if err != nil {
		t.Fatal(err)
	}
	if model.Version != "1" || model.Saved == nil || model.Settings.WarmUp != WarmUpOff ||
		model.Base != canonical(t, store.uri("repository/m")) || CheckDigest(model.Digest) != nil || model.Stamp == "" {
		t.Errorf("found %+v", model)
	}
	if err := wholeOf(t, model.Dir, largeModel(t, 1)); err != nil {
		t.Error(err)
	}
	if got := tree(t, c.models()); strings.Count(got, "saved_model.pb") != 1 || strings.Contains(got, ".fetch") {
		t.Errorf("the cache holds %s", got)
	}
	local := filepath.Join(t.TempDir(), "m")
	for name, text := range largeModel(t, 1) {
		expect.Write(t, filepath.Join(local, name), text)
	}
	same, err := c.Find(t.Context(), local, "")
	if err != nil {
		t.Fatal(err)
	}
	if digest, err := c.Digest(t.Context(), same); digest != model.Digest || err != nil {
		t.Errorf("fetched as %s, in a folder it is %s, %v", model.Digest, digest, err)
	}
	reads := store.reads.Load()
	other := remoteCache(t, c.options.CacheDir, "")
	if again, err := other.Find(t.Context(), store.uri("repository/m/1"), ""); err != nil || again.Dir != model.Dir ||
		again.Version != "1" {
		t.Errorf("another front finds %+v, %v", again, err)
	}
	if n := store.reads.Load() - reads; n != 0 {
		t.Errorf("another front read %d objects", n)
	}
	entries, err = c.Index(t.Context())
	if err != nil || len(entries) != 3 || entries[1].Ref != "m" || entries[1].Saved == nil ||
		entries[2].Ref != model.Digest {
		t.Errorf("the index is %+v, %v", entries, err)
	}

	// A new version, and its end.
	store.put("repository/m/2", largeModel(t, 2))
	expect.Eventually(t, "version 2 is seen", func() bool {
		numbers, err := c.Settled(t.Context(), "m")
		return err == nil && slices.Equal(numbers, []string{"1", "2"})
	})
	if model, err = c.Find(t.Context(), "m", ""); err != nil || model.Version != "2" {
		t.Fatalf("the latest is %+v, %v", model, err)
	}
	if first, err := c.Find(t.Context(), "m", "1"); err != nil || first.Version != "1" {
		t.Errorf("pinned: %+v, %v", first, err)
	}
	store.remove("repository/m/2")
	expect.Eventually(t, "version 2 is gone", func() bool {
		numbers, err := c.Settled(t.Context(), "m")
		return err == nil && slices.Equal(numbers, []string{"1"})
	})
	_, err = c.Find(t.Context(), "m", "2")
	expect.Fault(t, err, fault.NotFound, "model m", "version 2")

	// One that changes where it lies is fetched again.
	before, err := c.Find(t.Context(), "m", "1")
	if err != nil {
		t.Fatal(err)
	}
	store.put("repository/m/1", map[string]string{"assets/words.txt": "other words, more of them"})
	expect.Eventually(t, "the change is seen", func() bool {
		model, err = c.Find(t.Context(), "m", "1")
		return err == nil && model.Digest != before.Digest && model.Stamp != before.Stamp
	})

	store.down.Store(true)
	time.Sleep(c.options.PollInterval)
	if again, err := c.Find(t.Context(), "m", "1"); err != nil || again.Digest != model.Digest {
		t.Errorf("with the store away: %+v, %v", again, err)
	}
}

// TestSettingsOfOneSecond are read again when they change within the second that S3 dates them with.
func TestSettingsOfOneSecond(t *testing.T) {
	t.Parallel()
	store := newS3(t)
	c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
	at, err := parseLocation(store.uri("m"))
	if err != nil {
		t.Fatal(err)
	}
	for cores := 1; cores < 4; cores++ {
		store.put("m", map[string]string{control.SettingsFile: fmt.Sprintf(`{"cores":%d}`, cores)})
		found, err := c.list(t.Context(), at)
		if err != nil {
			t.Fatal(err)
		}
		if settings, err := c.storedSettings(t.Context(), "m", at, *found.settings); err != nil ||
			settings.Cores != cores {
			t.Errorf("the settings are %+v, %v; want %d cores", settings, err, cores)
		}
	}
}

func canonical(t *testing.T, uri string) string {
	t.Helper()
	at, err := parseLocation(uri)
	if err != nil {
		t.Fatal(err)
	}
	return at.uri
}

// TestOneFetch has many callers of many fronts ask for one model: its objects are read once.
func TestOneFetch(t *testing.T) {
	t.Parallel()
	store, dir := newS3(t), filepath.Join(t.TempDir(), "cache")
	files := largeModel(t, 1)
	store.put("m/1", files)
	const fronts, callers = 8, 25
	var asked sync.WaitGroup
	for range fronts {
		c := remoteCache(t, dir, "")
		for range callers {
			asked.Go(func() {
				if model, err := c.Find(t.Context(), store.uri("m"), ""); err != nil ||
					wholeOf(t, model.Dir, files) != nil {
					t.Errorf("found %+v, %v", model, err)
				}
			})
		}
	}
	asked.Wait()
	if n := store.reads.Load(); n != int64(len(files)) {
		t.Errorf("%d callers of %d fronts read %d objects of %d", fronts*callers, fronts, n, len(files))
	}
}

// TestFetchWithoutItsCaller goes on for others, and stops for none.
func TestFetchWithoutItsCaller(t *testing.T) {
	t.Parallel()
	store := newS3(t)
	store.gate = make(chan struct{})
	c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
	store.put("m/1", largeModel(t, 1))
	ask := func() (func(), chan error) {
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, err := c.Find(ctx, store.uri("m"), "")
			left <- err
		}()
		return leave, left
	}
	under := func() bool { return strings.Contains(tree(t, c.models()), ".fetch") && store.reads.Load() > 0 }
	leave, left := ask()
	expect.Eventually(t, "it is being fetched", under)
	leave()
	if err := <-left; err == nil {
		t.Error("found")
	}
	expect.Eventually(t, "nothing is left", func() bool { return tree(t, c.models()) == "" })

	leave, left = ask()
	expect.Eventually(t, "it is being fetched", under)
	leaveToo, other := ask()
	defer leaveToo()
	expect.Eventually(t, "both wait", func() bool {
		c.fetches.mu.Lock()
		defer c.fetches.mu.Unlock()
		for _, one := range c.fetches.calls {
			return one.waiting == 2
		}
		return false
	})
	leave()
	<-left
	close(store.gate)
	if err := <-other; err != nil {
		t.Error(err)
	}
}

// TestBrokenFetches leave nothing behind, and work when they are tried again.
func TestBrokenFetches(t *testing.T) {
	t.Parallel()
	store := newS3(t)
	files := largeModel(t, 1)
	store.put("m/1", files)
	t.Run("cut once", func(t *testing.T) {
		c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
		store.cut.Store(2)
		model, err := c.Find(t.Context(), store.uri("m"), "")
		if err != nil || wholeOf(t, model.Dir, files) != nil {
			t.Errorf("found %+v, %v", model, err)
		}
	})
	t.Run("cut always", func(t *testing.T) {
		c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
		store.cut.Store(1000)
		_, err := c.Find(t.Context(), store.uri("m"), "")
		expect.Fault(t, err, fault.Unavailable, "model "+store.uri("m"), "version 1", "broke off after", "ask again")
		if got := tree(t, c.models()); got != "" {
			t.Errorf("left behind: %s", got)
		}
		store.cut.Store(0)
		if _, err := c.Find(t.Context(), store.uri("m"), ""); err != nil {
			t.Errorf("tried again: %v", err)
		}
	})
	t.Run("disk full", func(t *testing.T) {
		dir := small(t, 1<<20)
		filler := filepath.Join(dir, "filler")
		expect.Write(t, filler, strings.Repeat("x", 700_000))
		c := remoteCache(t, dir, "")
		_, err := c.Find(t.Context(), store.uri("m"), "")
		expect.Fault(t, err, fault.Exhausted, "model "+store.uri("m"), "version 1", "no space left", "cache-dir")
		if got := tree(t, c.models()); got != "" {
			t.Errorf("left behind: %s", got)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Find(t.Context(), store.uri("m"), ""); err != nil {
			t.Errorf("tried again: %v", err)
		}
		c.Close()
	})
	t.Run("no SavedModel", func(t *testing.T) {
		c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
		store.put("broken/1", map[string]string{"saved_model.pb": "this is no protocol buffer"})
		_, err := c.Find(t.Context(), store.uri("broken"), "")
		expect.Fault(t, err, fault.BadRequest, "saved_model.pb of version 1", "cannot be read")
		if got := tree(t, c.models()); got != "" {
			t.Errorf("left behind: %s", got)
		}
	})
}

// small returns a folder on a disk of its own with so many bytes.
func small(t *testing.T, bytes int) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("mode=0700,size=%d", bytes)); err != nil {
		t.Skipf("skipped: needs the right to mount (%v)", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fetchVariable makes this test's own binary fetch a model and end.
const fetchVariable = "FLIGHTSVC_TEST_FETCH"

func fetchAlone(arguments string) {
	var ask [2]string
	if err := json.Unmarshal([]byte(arguments), &ask); err != nil {
		panic(err)
	}
	c := New(Options{CacheDir: ask[0], PollInterval: time.Second, Log: zap.NewNop()})
	model, err := c.Find(context.Background(), ask[1], "")
	c.Close()
	fmt.Println(model.Dir, err)
}

// TestKilledFetch leaves a folder that the next front clears, and a lock that nobody has to.
func TestKilledFetch(t *testing.T) {
	t.Parallel()
	store, dir := newS3(t), filepath.Join(t.TempDir(), "cache")
	files := largeModel(t, 1)
	store.put("m/1", files)
	store.gate = make(chan struct{})
	ask, _ := json.Marshal([2]string{dir, store.uri("m")})
	fetcher := exec.Command(os.Args[0]) //nolint:gosec // this test itself
	fetcher.Env = append(os.Environ(), fetchVariable+"="+string(ask))
	if err := fetcher.Start(); err != nil {
		t.Fatal(err)
	}
	under := func() bool {
		return strings.Contains(tree(t, filepath.Join(dir, "models")), ".fetch") && store.reads.Load() > 0
	}
	expect.Eventually(t, "another process fetches", under)
	c := remoteCache(t, dir, "")
	found := make(chan error, 1)
	go func() {
		model, err := c.Find(t.Context(), store.uri("m"), "")
		if err == nil {
			err = wholeOf(t, model.Dir, files)
		}
		found <- err
	}()
	expect.Eventually(t, "ours waits for it", func() bool {
		c.fetches.mu.Lock()
		defer c.fetches.mu.Unlock()
		return len(c.fetches.calls) == 1
	})
	if got := tree(t, c.models()); strings.Count(got, ".fetch") != strings.Count(got,
		".fetch-"+fmt.Sprint(fetcher.Process.Pid)) {
		t.Errorf("two fetch at once: %s", got)
	}
	if err := fetcher.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = fetcher.Wait()
	close(store.gate)
	if err := <-found; err != nil {
		t.Error(err)
	}
	remoteCache(t, dir, "")
	if got := tree(t, c.models()); strings.Contains(got, ".fetch") || strings.Count(got, "saved_model.pb") != 1 {
		t.Errorf("after the next start there is %s", got)
	}
}

// TestFetchByProcesses is TestOneFetch with processes.
func TestFetchByProcesses(t *testing.T) {
	t.Parallel()
	store, dir := newS3(t), filepath.Join(t.TempDir(), "cache")
	files := largeModel(t, 1)
	store.put("m/1", files)
	ask, _ := json.Marshal([2]string{dir, store.uri("m")})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			fetcher := exec.Command(os.Args[0]) //nolint:gosec // this test itself
			fetcher.Env = append(os.Environ(), fetchVariable+"="+string(ask))
			out, err := fetcher.Output()
			if err != nil || !strings.HasSuffix(string(out), " <nil>\n") {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
	all.Wait()
	if n := store.reads.Load(); n != int64(len(files)) {
		t.Errorf("8 processes read %d objects of %d", n, len(files))
	}
}

// TestStoreFaults says what is wrong with a URI, a bucket, or credentials.
func TestStoreFaults(t *testing.T) {
	store := newS3(t)
	c := remoteCache(t, filepath.Join(t.TempDir(), "cache"), "")
	elsewhere := strings.Replace(store.uri("m"), "//models/", "//nope/", 1)
	store.put("odd/1", map[string]string{"saved_model.pb": expect.SavedModel(), "assets/a\nb": "x"})
	for name, one := range map[string]struct {
		ref   string
		kind  fault.Kind
		parts []string
	}{
		"empty": {store.uri("m"), fault.NotFound, []string{"no saved_model.pb at s3://models/m",
			"credentials may list"}},
		"odd name": {store.uri("odd"), fault.Precondition, []string{"object that cannot be a model's file",
			"control characters"}},
		"no bucket":       {elsewhere, fault.NotFound, []string{"there is no bucket s3://nope", "?endpoint="}},
		"no bucket named": {"s3:///m", fault.BadRequest, []string{"names no bucket", "s3://bucket/path"}},
		"unknown scheme": {"hdfs://name/m", fault.BadRequest,
			[]string{`no source "hdfs"`, "file:, s3:, gs: and azblob:"}},
		"unknown parameter": {"s3://models/m?colour=red", fault.BadRequest, []string{"colour", "docs/models.md"}},
		"parent":            {"s3://models/a/../b", fault.BadRequest, []string{"must not contain"}},
		"password": {"s3://me:hidden@models/m", fault.BadRequest,
			[]string{"do not belong in a URI", "AWS_ACCESS_KEY_ID"}},
		"nobody there": {"s3://models/m?endpoint=http://127.0.0.1:1&use_path_style=true&region=us-east-1",
			fault.Unavailable, []string{"cannot be read", "refused", "?endpoint="}},
		"gs parameter": {"gs://models/m?anonymous=true&colour=red", fault.BadRequest,
			[]string{"gs://models", "colour"}},
		"gs key file": {"gs://models/m?private_key_path=/etc/passwd", fault.BadRequest,
			[]string{"private_key_path is not supported", "GOOGLE_APPLICATION_CREDENTIALS"}},
		"azblob parameter": {"azblob://models/m?colour=red&storage_account=a", fault.BadRequest,
			[]string{"azblob://models", "colour"}},
		"azblob, no account": {"azblob://models/m", fault.Precondition,
			[]string{"no credentials for azblob://models", "AZURE_STORAGE_ACCOUNT"}},
		"gs, no credentials": {"gs://models/m", fault.Precondition,
			[]string{"no credentials for gs://models", "GOOGLE_APPLICATION_CREDENTIALS"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Find(t.Context(), one.ref, "")
			expect.Fault(t, err, one.kind, append(one.parts, "model ")...)
			if err != nil && (len(err.Error()) > 500 || strings.Contains(err.Error(), "hidden")) {
				t.Errorf("%d characters: %s", len(err.Error()), err)
			}
			t.Log(err)
		})
	}
	t.Run("wrong key", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
		_, err := remoteCache(t, t.TempDir(), "").Find(t.Context(), store.uri("m"), "")
		expect.Fault(t, err, fault.Precondition, "rejects the server's credentials", "AWS_ACCESS_KEY_ID")
		t.Log(err)
	})
	t.Run("no credentials", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "")
		t.Setenv("AWS_ACCESS_KEY_ID", "")
		t.Setenv("HOME", t.TempDir())
		_, err := remoteCache(t, t.TempDir(), "").Find(t.Context(), store.uri("m"), "")
		expect.Fault(t, err, fault.Precondition, "no credentials for s3://models", "AWS_ACCESS_KEY_ID")
		t.Log(err)
	})
}
