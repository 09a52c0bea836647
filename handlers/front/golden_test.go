package front

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
)

// golden is the folder of the files that testdata/make_golden.py has written.
const golden = "../../testdata/golden"

func TestGoldenStatus(t *testing.T) {
	var got protocol.Status
	expect.Golden(t, golden, "status.json", &got)
	if got.V != protocol.Version {
		t.Errorf("the golden answer says version %d", got.V)
	}
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(golden, "status.json"))
	if err != nil {
		t.Fatal(err)
	}
	expect.SameJSON(t, text, want)
}

func TestGoldenDigest(t *testing.T) {
	var file struct {
		Lines  []string
		Digest string
	}
	expect.Golden(t, golden, "digest.json", &file)
	cache := repository.New(repository.Options{CacheDir: filepath.Join(t.TempDir(), "cache"), Log: zap.NewNop()})
	defer cache.Close()
	for _, wantKnown := range []bool{false, true} {
		archive, err := os.Open(filepath.Join(golden, "model.tar"))
		if err != nil {
			t.Fatal(err)
		}
		digest, known, err := cache.Push(t.Context(), archive, "")
		if err != nil || digest != file.Digest || known != wantKnown {
			t.Errorf("the digest of the archive is %s, known %t, %v; want %s, known %t", digest, known, err,
				file.Digest, wantKnown)
		}
		if err := archive.Close(); err != nil {
			t.Error(err)
		}
	}
}
