// Tests of actions, puts and criteria, with fuzz targets for whatever a caller sends there.

package front

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"go.uber.org/zap"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/fuzztest"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
)

func command(text string) *flight.FlightDescriptor {
	return &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: []byte(text)}
}

const (
	fuzzJSON  = 64 << 20  // of memory that a JSON text may take while it is read
	fuzzArrow = 512 << 20 // of memory that the messages of a stream may take
)

// captured is what was sent.
type captured []*flight.FlightData

func (c *captured) Send(data *flight.FlightData) error {
	*c = append(*c, &flight.FlightData{DataHeader: bytes.Clone(data.DataHeader), DataBody: bytes.Clone(data.DataBody)})
	return nil
}

func TestBodies(t *testing.T) {
	for body, want := range map[string]protocol.ModelBody{
		`{"model":"m"}`: {Model: "m"},
		` {"model":"m","version":"latest"}` + "\n": {Model: "m", Version: "latest"},
		`{"model":"m","version":7}`:                {Model: "m", Version: "7"},
		`{"model":"m","version":null}`:             {Model: "m"},
	} {
		if got, err := decodeModel([]byte(body)); err != nil || got != want {
			t.Errorf("%s is %+v, %v", body, got, err)
		}
	}
	for body, part := range map[string]string{
		``:                           "model is missing",
		`{}`:                         "model is missing",
		`null`:                       "JSON object",
		`"m"`:                        "JSON object",
		`{"model":"m"`:               "unexpected EOF",
		`{"model":"m"} {}`:           "text after the object",
		`{"model":"m","sig":"x"}`:    `unknown field "sig"`,
		`{"model":1}`:                `field "model" cannot be a number`,
		`{"model":"m","version":-1}`: `version must be a number, "latest"`,
		`{"model":"m","version":[]}`: `version must be a number, "latest"`,
		strings.Repeat(" ", protocol.MaxActionBytes) + `{"model":"m"}`: "more than 65536",
	} {
		_, err := decodeModel([]byte(body))
		expect.Fault(t, err, fault.BadRequest, `{"model":"name"}`, part)
	}
	for _, body := range []string{"", "{}", " {} "} {
		if err := nothing([]byte(body)); err != nil {
			t.Errorf("%q: %v", body, err)
		}
	}
	expect.Fault(t, nothing([]byte(`{"a":1}`)), fault.BadRequest, "empty body, or {}", `unknown field "a"`)
}

func TestPutCommands(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	for _, text := range []string{`{"v":1,"put":"model"}`, `{"v":1,"put":"model","digest":"` + digest + `"}`} {
		if _, err := parsePut(command(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, part := range map[string]string{
		``:                                     "v is 0",
		`{"v":2,"put":"model"}`:                "v is 2, this server speaks 1",
		`{"v":1}`:                              `put is ""`,
		`{"v":1,"put":"table"}`:                `put is "table", this server takes "model"`,
		`{"v":1,"put":"model","x":1}`:          `unknown field "x"`,
		`{"v":1,"put":"model"}{}`:              "text after the object",
		`{"v":1,"put":"model","digest":"md5"}`: `"md5" is not a digest`,
	} {
		_, err := parsePut(command(text))
		expect.Fault(t, err, fault.BadRequest, part)
	}
	for _, fd := range []*flight.FlightDescriptor{nil, {Type: flight.DescriptorPATH, Path: []string{"m"}}} {
		_, err := parsePut(fd)
		expect.Fault(t, err, fault.BadRequest, "DoPut wants a CMD descriptor")
	}
}

// sent is a stream of messages that were sent already.
type sent struct {
	flight.FlightService_DoPutServer
	messages []*flight.FlightData
}

func (s *sent) Recv() (*flight.FlightData, error) {
	if len(s.messages) == 0 {
		return nil, io.EOF
	}
	next := s.messages[0]
	s.messages = s.messages[1:]
	return next, nil
}

// chunks encodes record batches of an archive; a nil chunk is null.
func chunks(t testing.TB, options []ipc.Option, batches ...[][]byte) *sent {
	t.Helper()
	out := &captured{}
	w := flight.NewRecordWriter(out, append(options, ipc.WithSchema(putSchema))...)
	for _, chunks := range batches {
		b := array.NewBinaryBuilder(memory.DefaultAllocator, arrow.BinaryTypes.Binary)
		for _, chunk := range chunks {
			if chunk == nil {
				b.AppendNull()
			} else {
				b.Append(chunk)
			}
		}
		column := b.NewArray()
		if err := w.Write(array.NewRecord(putSchema, []arrow.Array{column}, int64(len(chunks)))); err != nil {
			t.Fatal(err)
		}
	}
	return &sent{messages: *out}
}

func read(t *testing.T, s *sent) (string, error) {
	t.Helper()
	archive, _, err := openArchive(s)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.reader.Release()
	data, err := io.ReadAll(archive)
	return string(data), err
}

func TestArchiveOfChunks(t *testing.T) {
	got, err := read(t, chunks(t, nil, [][]byte{[]byte("ab"), {}, []byte("c")}, nil, [][]byte{[]byte("de")}))
	if got != "abcde" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	got, err = read(t, chunks(t, []ipc.Option{ipc.WithZstd()}, [][]byte{bytes.Repeat([]byte("a"), 1<<20)}))
	if len(got) != 1<<20 || err != nil {
		t.Errorf("of a compressed record batch %d bytes, %v", len(got), err)
	}
	_, err = read(t, chunks(t, nil, [][]byte{[]byte("ab"), nil}))
	expect.Fault(t, err, fault.BadRequest, "chunk 1 of the archive is null")
	_, err = read(t, chunks(t, nil, [][]byte{make([]byte, maxPutBytes+1)}))
	expect.Fault(t, err, fault.BadRequest, "more than 67108864 bytes", "4 MiB")
	// Few bytes that claim to become many.
	_, err = read(t, chunks(t, []ipc.Option{ipc.WithZstd()}, [][]byte{make([]byte, maxPutBytes+1)}))
	expect.Fault(t, err, fault.BadRequest, "more than 67108864 bytes")

	// Offsets that are not in order: the first of three values ends behind the second.
	s := chunks(t, nil, [][]byte{[]byte("ab"), []byte("cd"), []byte("ef")})
	body := s.messages[1].DataBody
	at := bytes.Index(body, []byte{0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 6, 0, 0, 0})
	body[at+4] = 200
	got, err = read(t, s)
	expect.Fault(t, err, fault.BadRequest, "chunk 0 of the archive lies outside its buffer")
	if got != "" {
		t.Errorf("read %q", got)
	}
}

// FuzzAction feeds bodies: a model, or a fault of the caller.
func FuzzAction(f *testing.F) {
	f.Add([]byte(`{"model":"m","version":"1"}`))
	f.Add([]byte(`{"model":"m","version":18446744073709551616}`))
	f.Add([]byte(`{"model":"m"}{`))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		fuzztest.Bounded(t, fuzzJSON, func() {
			ask, err := decodeModel(body)
			if err != nil {
				expect.Fault(t, err, fault.BadRequest)
			} else if ask.Model == "" {
				t.Error("no model is taken for one")
			}
			if err := nothing(body); err == nil && len(body) > 0 && !json.Valid(body) {
				t.Error("what is no JSON was taken")
			}
		})
	})
}

// FuzzPutCommand feeds commands of DoPut: one that can be followed, or a fault of the caller.
func FuzzPutCommand(f *testing.F) {
	f.Add([]byte(`{"v":1,"put":"model","digest":"sha256:` + strings.Repeat("0", 64) + `"}`))
	f.Add([]byte(`{"v":1,"put":"model"}`))
	f.Add([]byte(`{"v":1,"put":"model","digest":"sha256:` + strings.Repeat("../", 20) + `etc/passwd"}`))
	f.Fuzz(func(t *testing.T, cmd []byte) {
		fuzztest.Bounded(t, fuzzJSON, func() {
			c, err := parsePut(&flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: cmd})
			if err != nil {
				expect.Fault(t, err, fault.BadRequest)
			} else if c.V != protocol.Version || c.Put != "model" || strings.ContainsAny(c.Digest, "/.") {
				t.Errorf("taken: %+v", c)
			}
		})
	})
}

// FuzzChunks feeds the messages of DoPut: what passes is an archive of as many bytes as arrived.
func FuzzChunks(f *testing.F) {
	for _, option := range []ipc.Option{ipc.WithDictionaryDeltas(false), ipc.WithLZ4(), ipc.WithZstd()} {
		messages := chunks(f, []ipc.Option{option}, [][]byte{{0, 0, 0}, {}, {1, 2, 3}}).messages
		f.Add(messages[0].DataHeader, messages[1].DataHeader, messages[1].DataBody)
	}
	f.Fuzz(func(t *testing.T, schema, header, body []byte) {
		fuzztest.Bounded(t, fuzzArrow, func() {
			message := &flight.FlightData{DataHeader: header, DataBody: body}
			stream := &sent{messages: []*flight.FlightData{{DataHeader: schema}, message, message}}
			archive, _, err := openArchive(stream)
			if err != nil {
				expect.Fault(t, err, fault.BadRequest)
				return
			}
			defer archive.reader.Release()
			if got := archive.reader.Schema(); got.NumFields() != 1 || got.Field(0).Type.ID() != arrow.BINARY {
				return
			}
			if _, err := io.Copy(io.Discard, archive); err != nil {
				expect.Fault(t, err, fault.BadRequest)
			}
		})
	})
}

// unheard takes flights and forgets them.
type unheard struct {
	flight.FlightService_ListFlightsServer
}

// Context is part of grpc.ServerStream.
func (unheard) Context() context.Context { return context.Background() }

func (unheard) Send(*flight.FlightInfo) error { return nil }

// FuzzCriteria feeds criteria of ListFlights: a list, or a fault of the caller.
func FuzzCriteria(f *testing.F) {
	f.Add([]byte(`{"model":"m"}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"Model":"m"}`))
	f.Add([]byte(``))
	models := repository.New(repository.Options{CacheDir: filepath.Join(f.TempDir(), "cache"), Log: zap.NewNop()})
	f.Cleanup(models.Close)
	cache := modelcache.New(modelcache.Options{Repository: models, Log: zap.NewNop()})
	f.Cleanup(cache.Close)
	front := New(Options{Cache: cache})
	f.Fuzz(func(t *testing.T, criteria []byte) {
		fuzztest.Bounded(t, fuzzJSON, func() {
			if err := front.ListFlights(&flight.Criteria{Expression: criteria}, unheard{}); err != nil {
				expect.Fault(t, err, fault.BadRequest, "criteria")
			} else if len(criteria) > 0 && !json.Valid(criteria) {
				t.Error("what is no JSON was taken")
			}
		})
	})
}
