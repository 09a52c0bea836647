// Tests of pushed archives: what they may hold, and what is left of those that are refused.

package repository

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/protocol"
	"flightsvc/internal/rundir"
	"flightsvc/internal/savedmodel"
)

// entry is one of an archive; a regular file unless the header says otherwise.
type entry struct {
	name, text string
	header     tar.Header
}

func archived(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.header.Name, e.header.Mode = e.name, 0o4777 // which must not matter
		if e.header.Typeflag == 0 {
			e.header.Typeflag, e.header.Size = tar.TypeReg, int64(len(e.text))
		}
		if err := w.WriteHeader(&e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// newStore is a cache that is used for its pushed models alone.
func newStore(t testing.TB) *Repository {
	t.Helper()
	c := New(Options{CacheDir: filepath.Join(t.TempDir(), "cache"), Log: zap.NewNop()})
	t.Cleanup(c.Close)
	return c
}

// tree lists what is below a folder: folders, and files with their sizes.
func tree(t testing.TB, dir string) string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		relative, _ := filepath.Rel(dir, path)
		if want := map[bool]fs.FileMode{false: 0o600, true: 0o700 | fs.ModeDir}[d.IsDir()]; info.Mode() != want {
			t.Errorf("%s has mode %v", relative, info.Mode())
		}
		if !d.IsDir() {
			relative += fmt.Sprint(":", info.Size())
		}
		list = append(list, relative)
		return nil
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

// TestDigest fixes the digest of a small folder; pyspark-shim/tests/test_verbs.py has the same one.
func TestDigest(t *testing.T) {
	const want = "sha256:b859b76bdc3d55cfa86abd9b0b3e7861198ac925c0a9e95f14ee80cfc2f60860"
	files := []entry{{name: "variables/variables.index", text: "index"}, {name: "saved_model.pb", text: "graph"},
		{name: "a b", text: ""}, {name: "a", text: "1"}, {name: "assets/grün.txt", text: "x\n"}}
	for name, archive := range map[string][]byte{
		"files":         archived(t, files...),
		"another order": archived(t, files[4], files[3], files[2], files[1], files[0]),
		"folders as well": archived(t, append([]entry{{name: "./", header: tar.Header{Typeflag: tar.TypeDir}},
			{name: "variables/", header: tar.Header{Typeflag: tar.TypeDir}},
			{name: "empty", header: tar.Header{Typeflag: tar.TypeDir}}}, files...)...),
		"dots before": archived(t, files[0], entry{name: "./" + files[1].name, text: files[1].text}, files[2],
			files[3], files[4]),
		"zeros at the end": append(archived(t, files...), make([]byte, 10240)...),
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{bytes.NewReader(archive),
				iotest.DataErrReader(iotest.HalfReader(bytes.NewReader(archive)))} {
				if got, err := unpack(t.TempDir(), r); got != want || err != nil {
					t.Errorf("%s, %v; want %s", got, err, want)
				}
			}
		})
	}
}

func TestPush(t *testing.T) {
	c, pb := newStore(t), expect.SavedModel()
	archive := archived(t, entry{name: "saved_model.pb", text: pb}, entry{name: "variables/v", text: "weights"})
	if tree(t, c.options.CacheDir) != "" {
		t.Error("the cache-dir is there before its first use")
	}
	digest, known, err := c.Push(t.Context(), bytes.NewReader(archive), "")
	if err != nil || known || CheckDigest(digest) != nil || !c.Known(digest) {
		t.Fatalf("pushed as %s, %t, %v", digest, known, err)
	}
	hex := strings.TrimPrefix(digest, "sha256:")
	want := fmt.Sprintf("models models/%s models/%[1]s/saved_model.pb:%d models/%[1]s/variables "+
		"models/%[1]s/variables/v:7", hex, len(pb))
	if got := tree(t, c.options.CacheDir); got != want {
		t.Errorf("the cache-dir holds %s, want %s", got, want)
	}
	for _, wanted := range []string{"", digest} {
		if again, known, err := c.Push(t.Context(), bytes.NewReader(archive), wanted); again != digest || !known ||
			err != nil {
			t.Errorf("pushed again as %s, %t, %v", again, known, err)
		}
	}
	if got := tree(t, c.options.CacheDir); got != want {
		t.Errorf("after another push it holds %s", got)
	}
	model, err := c.Find(t.Context(), digest, "")
	if err != nil || model.Ref != digest || model.Version != "1" || len(model.Saved.Signatures) != 1 ||
		model.Dir != filepath.Join(c.models(), hex) {
		t.Errorf("resolved to %+v, %v", model, err)
	}
	entries, err := c.Index(t.Context())
	if err != nil || len(entries) != 2 || entries[0].Ref != protocol.Image || entries[1].Ref != digest ||
		entries[1].Err != nil {
		t.Errorf("the index is %+v, %v", entries, err)
	}
	_, err = c.Find(t.Context(), "sha256:"+strings.Repeat("0", 64), "")
	expect.Fault(t, err, fault.NotFound, "has not been pushed to this host", "DoPut")
	for _, ref := range []string{"sha256:", "sha256:" + strings.Repeat("A", 64), "sha256:../../x", digest + "0",
		digest + "\n"} {
		_, err = c.Find(t.Context(), ref, "")
		expect.Fault(t, err, fault.BadRequest, "64 lower-case hexadecimal digits")
	}
}

func TestPushesOfOneModelAtOnce(t *testing.T) {
	c, pb := newStore(t), expect.SavedModel()
	archive := archived(t, entry{name: "saved_model.pb", text: pb})
	const callers = 8
	all := make(chan struct{})
	var read, pushed sync.WaitGroup
	read.Add(callers)
	fresh := make(chan bool, callers)
	for range callers {
		pushed.Go(func() {
			// All have all but the last byte unpacked before any goes on.
			r := io.MultiReader(bytes.NewReader(archive[:len(archive)-1]), &gate{reached: read.Done, open: all},
				bytes.NewReader(archive[len(archive)-1:]))
			_, known, err := c.Push(t.Context(), r, "")
			if err != nil {
				t.Error(err)
			}
			fresh <- !known
		})
	}
	read.Wait()
	close(all)
	pushed.Wait()
	first := 0
	for range callers {
		if <-fresh {
			first++
		}
	}
	if got := tree(t, c.models()); first != 1 || strings.Count(got, "saved_model.pb") != 1 ||
		strings.Contains(got, "push") {
		t.Errorf("%d were the first; there is %s", first, got)
	}
}

// gate holds a reader up, once.
type gate struct {
	reached func()
	open    chan struct{}
}

func (g *gate) Read([]byte) (int, error) {
	g.reached()
	<-g.open
	return 0, io.EOF
}

func TestPushRefuses(t *testing.T) {
	pb := expect.SavedModel()
	model := entry{name: "saved_model.pb", text: pb}
	good := archived(t, model, entry{name: "variables/v", text: strings.Repeat("w", 2000)})
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	_, _ = w.Write(good)
	_ = w.Close()
	special := func(kind byte, to string) entry {
		return entry{name: "odd", header: tar.Header{Typeflag: kind, Linkname: to}}
	}
	for name, c := range map[string]struct {
		archive []byte
		want    string
		part    string
	}{
		"absolute":       {archived(t, model, entry{name: "/etc/passwd"}), "", `"/etc/passwd" is absolute`},
		"dots":           {archived(t, model, entry{name: "../out"}), "", `"../out" holds ".."`},
		"dots that stay": {archived(t, model, entry{name: "a/../b"}), "", `"a/../b" holds ".."`},
		"link":           {archived(t, model, special(tar.TypeSymlink, "/etc/passwd")), "", `"odd" is a link`},
		"hard link":      {archived(t, model, special(tar.TypeLink, "saved_model.pb")), "", `"odd" is a link`},
		"fifo":           {archived(t, model, special(tar.TypeFifo, "")), "", `"odd" is of type '6'`},
		"device":         {archived(t, model, special(tar.TypeChar, "")), "", `"odd" is of type '3'`},
		"block device":   {archived(t, model, special(tar.TypeBlock, "")), "", `"odd" is of type '4'`},
		"sparse":         {sparse(t), "", `is a sparse file`},
		"duplicate":      {archived(t, model, model), "", `"saved_model.pb" occurs twice`},
		"duplicate by dots": {archived(t, model, entry{name: ".//saved_model.pb", text: pb}), "",
			`"saved_model.pb" occurs twice`},
		"below a file": {archived(t, model, entry{name: "saved_model.pb/x"}), "",
			"is a folder, and it or one above it is a file"},
		"folder for file": {archived(t, model, entry{name: "saved_model.pb",
			header: tar.Header{Typeflag: tar.TypeDir}}), "", "is a folder, and it or one above it is a file"},
		"file for folder":   {archived(t, model, entry{name: "a/b"}, entry{name: "a"}), "", `"a" occurs twice`},
		"control character": {archived(t, model, entry{name: "a 1 x\nb"}), "", "holds control characters"},
		"no UTF-8": {archived(t, model, entry{name: "a\xff\xfe", header: tar.Header{Format: tar.FormatGNU}}),
			"", "is not UTF-8"},
		"long name": {archived(t, model, entry{name: strings.Repeat("a/", 3000) + "x"}), "",
			"a name has 6001 bytes, more than 4096"},
		"long part": {archived(t, model, entry{name: strings.Repeat("a", 256)}), "",
			"more than 255 bytes between two slashes"},
		"deep": {archived(t, model, entry{name: strings.Repeat("a/", 64) + "x"}), "",
			"more than 64 folders"},
		"nothing":          {nil, "", "it ends before its first entry"},
		"an empty archive": {archived(t), "", "no saved_model.pb at its top"},
		"in a folder": {archived(t, entry{name: "m/saved_model.pb", text: pb}), "",
			"no saved_model.pb at its top"},
		"broken graph": {archived(t, entry{name: "saved_model.pb", text: "this is no protocol buffer"}), "",
			"saved_model.pb cannot be read"},
		"empty graph":        {archived(t, entry{name: "saved_model.pb"}), "", `no meta graph has the tag "serve"`},
		"cut in a file":      {good[:len(good)-2048], "", "it ends early"},
		"cut before a file":  {good[:1024], "", "it ends early"},
		"cut before its end": {good[:len(good)-1024], "", "it ends early"},
		"more after its end": {append(bytes.Clone(good), "more"...), "", "data after its end"},
		"zeros after its end": {append(bytes.Clone(good), make([]byte, 2<<20)...), "",
			"more than 1048576 bytes follow its end"},
		"gzip":           {zipped.Bytes(), "", "send a plain POSIX tar, not compressed"},
		"text":           {[]byte(strings.Repeat("hello ", 1000)), "", "not a plain POSIX tar"},
		"another digest": {good, "sha256:" + strings.Repeat("0", 64), "not sha256:0000"},
	} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t)
			_, _, err := store.Push(t.Context(), bytes.NewReader(c.archive), c.want)
			expect.Fault(t, err, fault.BadRequest, "archive", c.part)
			if got := tree(t, store.options.CacheDir); got != "models" {
				t.Errorf("left behind: %s", got)
			}
			if _, _, err := store.Push(t.Context(), bytes.NewReader(good), ""); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// sparse is an archive whose second file has a terabyte, by its header, and no byte in the archive.
func sparse(t *testing.T) []byte {
	t.Helper()
	out := archived(t, entry{name: "saved_model.pb", text: "x"})
	out = out[:len(out)-1024]
	hole := archived(t, entry{name: "hole", text: "1\n1099511627776\n0\n" + strings.Repeat("\x00", 512-18),
		header: tar.Header{}})
	records := map[string]string{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole",
		"GNU.sparse.realsize": "1099511627776"}
	var body strings.Builder
	for key, value := range records {
		for n := len(key) + len(value) + 3; ; n++ {
			if record := fmt.Sprintf("%d %s=%s\n", n, key, value); len(record) == n {
				body.WriteString(record)
				break
			}
		}
	}
	pax := archived(t, entry{name: "pax", text: body.String()})[:1024]
	pax[156] = 'x' // its type, which the sum of the header covers
	sum := 0
	copy(pax[148:156], "        ")
	for _, b := range pax[:512] {
		sum += int(b)
	}
	copy(pax[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return append(append(out, pax...), hole...)
}

func TestPushEndsWithItsReader(t *testing.T) {
	c := newStore(t)
	cause := errors.New("the stream is gone")
	part := archived(t, entry{name: "saved_model.pb", text: strings.Repeat("x", 5000)})[:2000]
	_, _, err := c.Push(t.Context(), io.MultiReader(bytes.NewReader(part), iotest.ErrReader(cause)), "")
	if !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	if got := tree(t, c.options.CacheDir); got != "models" {
		t.Errorf("left behind: %s", got)
	}
	c.Close()
	_, _, err = c.Push(t.Context(), bytes.NewReader(nil), "")
	expect.Fault(t, err, fault.Unavailable, "this server is ending")
}

func TestArchiveIsBounded(t *testing.T) {
	s := &source{archive: bytes.NewReader(make([]byte, 100)), left: 99}
	_, err := io.ReadAll(s)
	expect.Fault(t, err, fault.BadRequest, "more than 68719476736 bytes")
	u := unpacking{entries: tar.NewReader(bytes.NewReader(archived(t, entry{name: "a"}))), count: maxEntries}
	expect.Fault(t, u.next(), fault.BadRequest, "more than 100000 files and folders")
	_, err = checkEntry(&tar.Header{Typeflag: tar.TypeReg, Name: "saved_model.pb", Size: maxGraphBytes + 1})
	expect.Fault(t, err, fault.BadRequest, "more than 2147483648")
}

func TestDiskFaults(t *testing.T) {
	c := newStore(t)
	full := &fs.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}
	expect.Fault(t, c.diskFault(full), fault.Exhausted, "no space left", c.options.CacheDir, "set cache-dir")
	expect.Fault(t, c.diskFault(&fs.PathError{Op: "write", Path: "/x", Err: syscall.EIO}), fault.Precondition,
		"cannot be written (input/output error)")
}

// TestCacheDirIsPrivate opens each folder of the cache in turn to other users.
func TestCacheDirIsPrivate(t *testing.T) {
	archive := archived(t, entry{name: "saved_model.pb", text: expect.SavedModel()})
	for _, below := range []string{"cache/models", "cache", "."} {
		c := newStore(t)
		digest, _, err := c.Push(t.Context(), bytes.NewReader(archive), "")
		if err != nil {
			t.Fatal(err)
		}
		open := filepath.Join(filepath.Dir(c.options.CacheDir), below)
		if err := os.Chmod(open, 0o777); err != nil { //nolint:gosec // to be refused
			t.Fatal(err)
		}
		_, _, err = c.Push(t.Context(), bytes.NewReader(archive), "")
		expect.Fault(t, err, fault.Precondition, "cache-dir: ", open, "mode 0777")
		other := New(Options{CacheDir: c.options.CacheDir, Log: zap.NewNop()})
		defer other.Close()
		_, err = other.Find(t.Context(), digest, "")
		expect.Fault(t, err, fault.Precondition, "cache-dir: ", open, "mode 0777")
	}
}

// TestChangedModelIsNotUsed changes a pushed model behind the back of a front that has yet to use it, while another
// holds it.
func TestChangedModelIsNotUsed(t *testing.T) {
	archive := archived(t, entry{name: "saved_model.pb", text: expect.SavedModel()},
		entry{name: "assets/a", text: "good"})
	c := newStore(t)
	digest, _, err := c.Push(t.Context(), bytes.NewReader(archive), "")
	if err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func(*Repository) error{
		"Find": func(r *Repository) error { _, err := r.Find(t.Context(), digest, ""); return err },
		"Hold": func(r *Repository) error {
			release, err := r.Hold(t.Context(), Model{Dir: r.Place(digest)})
			if err == nil {
				release()
			}
			return err
		},
	} {
		release, err := c.Hold(t.Context(), Model{Dir: c.Place(digest)})
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		if err := os.WriteFile(filepath.Join(c.Place(digest), "assets", "a"), []byte("evil"), 0o600); err != nil {
			t.Fatal(err)
		}
		other := New(Options{CacheDir: c.options.CacheDir, Log: zap.NewNop()})
		defer other.Close()
		expect.Fault(t, use(other), fault.Unavailable, digest, "were changed")
		if err := use(other); err == nil || other.Known(digest) {
			t.Errorf("%s: it is still there: %v", name, err)
		}
		if _, _, err := other.Push(t.Context(), bytes.NewReader(archive), ""); err != nil {
			t.Fatal(err)
		}
		if err := use(other); err != nil {
			t.Errorf("%s of the model that was pushed again: %v", name, err)
		}
	}
}

// TestFilesThatNeverEnd has a model whose files are no regular files, or endless.
func TestFilesThatNeverEnd(t *testing.T) {
	r := newStore(t)
	for name, makeFile := range map[string]func(path string) error{
		"a pipe":   func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a device": func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		for _, file := range []string{savedmodel.File, control.SettingsFile} {
			dir := t.TempDir()
			if file != savedmodel.File {
				expect.Write(t, filepath.Join(dir, savedmodel.File), expect.SavedModel())
			}
			if err := makeFile(filepath.Join(dir, file)); err != nil {
				t.Fatal(err)
			}
			_, err := r.Find(t.Context(), dir, "")
			if expect.Fault(t, err, fault.Precondition, file, "not a regular file"); t.Failed() {
				t.Fatalf("%s that is %s", file, name)
			}
		}
	}
	dir := t.TempDir()
	expect.Write(t, filepath.Join(dir, savedmodel.File), expect.SavedModel())
	expect.Write(t, filepath.Join(dir, control.SettingsFile), strings.Repeat(" ", maxSettings+1))
	_, err := r.Find(t.Context(), dir, "")
	expect.Fault(t, err, fault.Precondition, control.SettingsFile, "more than 1048576 bytes")
}

// TestHashingEndsWithItsCaller hashes a sparse file of 4 TB for a caller that leaves.
func TestHashingEndsWithItsCaller(t *testing.T) {
	r := newStore(t)
	dir := t.TempDir()
	expect.Write(t, filepath.Join(dir, savedmodel.File), expect.SavedModel())
	expect.Write(t, filepath.Join(dir, "weights"), "")
	if err := os.Truncate(filepath.Join(dir, "weights"), 4<<40); err != nil {
		t.Fatal(err)
	}
	model, err := r.Find(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Digest(ctx, model); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the digest of 4 TB: %v", err)
	}
	r.working.Wait() // until the hashing has ended, too
}

// TestSweepsPushesOfTheDead leaves what a live process unpacks.
func TestSweepsPushesOfTheDead(t *testing.T) {
	c := newStore(t)
	self, err := rundir.Of(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	dead, live := fmt.Sprintf(".push-%d-%d-1", gone.Process.Pid, self.Start),
		fmt.Sprintf(".push-%d-%d-1", self.PID, self.Start)
	for _, name := range []string{dead, live, ".push-x", "notes"} {
		expect.Write(t, filepath.Join(c.models(), name, "f"), "")
	}
	New(c.options).Close()
	if got := tree(t, c.models()); got != fmt.Sprintf("%s %[1]s/f:0 .push-x .push-x/f:0 notes notes/f:0", live) {
		t.Errorf("after the sweep there are %s", got)
	}
	if entries, err := c.Index(t.Context()); err != nil || len(entries) != 1 {
		t.Errorf("the index is %+v, %v", entries, err)
	}
}

// memoryFolder returns a folder in memory, "" where there is none.
func memoryFolder() string {
	const folder = "/dev/shm"
	if info, err := os.Stat(folder); err != nil || !info.IsDir() {
		return ""
	}
	return folder
}

// FuzzUnpack feeds damaged archives: nothing may appear beside the folder, a success has a digest and a
// graph, and a push that fails leaves nothing.
func FuzzUnpack(f *testing.F) {
	pb := expect.SavedModel()
	f.Add(archived(f, entry{name: "saved_model.pb", text: pb}, entry{name: "variables/v", text: "w"}))
	f.Add(archived(f, entry{name: "../x", text: "1"}, entry{name: "/x", text: "1"}))
	f.Add(archived(f, entry{name: "a", header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: ".."}},
		entry{name: "a/x", text: "1"}))
	f.Add(archived(f, entry{name: "saved_model.pb", text: pb}, entry{name: strings.Repeat("n", 150) + "/ü",
		text: "pax"}))
	f.Add([]byte{})
	around, err := os.MkdirTemp(memoryFolder(), "flightsvc-fuzz-")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = os.RemoveAll(around) })
	c := New(Options{CacheDir: filepath.Join(around, "cache"), Log: zap.NewNop()})
	f.Cleanup(c.Close)
	f.Fuzz(func(t *testing.T, archive []byte) {
		fuzztest.Bounded(t, 64<<20, func() {
			digest, known, err := c.Push(t.Context(), bytes.NewReader(archive), "")
			got := tree(t, around)
			switch {
			case err != nil && got != "cache cache/models":
				t.Errorf("after %v there is %s", err, got)
			case err == nil && (known || !c.Known(digest) || !strings.HasPrefix(got,
				"cache cache/models cache/models/"+strings.TrimPrefix(digest, "sha256:"))):
				t.Errorf("%s, known %t, has left %s", digest, known, got)
			}
			if kind, ok := fault.KindOf(err); err != nil && (!ok || kind != fault.BadRequest) {
				t.Errorf("the error is %v", err)
			}
			if err == nil {
				if err := os.RemoveAll(c.Place(digest)); err != nil {
					t.Error(err)
				}
			}
		})
	})
}
