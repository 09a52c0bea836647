package front

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"go.uber.org/zap"

	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
)

// golden is the folder of the files that testdata/make_golden.py has written.
const golden = "../../testdata/golden"

// readGolden decodes one of the JSON files strictly.
func readGolden(t *testing.T, name string, v any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(golden, name))
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// sameJSON compares two JSON texts by what they say; the order of fields does not matter.
func sameJSON(t *testing.T, got, want []byte) {
	t.Helper()
	var values [2]any
	for i, text := range [][]byte{got, want} {
		if err := json.Unmarshal(text, &values[i]); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	}
	if !reflect.DeepEqual(values[0], values[1]) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestGoldenStatus(t *testing.T) {
	var got protocol.Status
	readGolden(t, "status.json", &got)
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
	sameJSON(t, text, want)
}

func TestGoldenDigest(t *testing.T) {
	var file struct {
		Lines  []string
		Digest string
	}
	readGolden(t, "digest.json", &file)
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
