// Puts: models that callers push as an archive.

package front

import (
	"encoding/json"
	"io"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/handlers"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
)

// maxPutBytes bounds a record batch of DoPut, uncompressed in memory.
const maxPutBytes = 64 << 20

// putSchema is what DoPut takes: rows are consecutive chunks of one archive.
var putSchema = arrow.NewSchema([]arrow.Field{{Name: "chunk", Type: arrow.BinaryTypes.Binary}}, nil)

func parsePut(fd *flight.FlightDescriptor) (*protocol.PutCommand, error) {
	const want = "DoPut wants a CMD descriptor like {\"v\":1,\"put\":\"model\",\"digest\":\"sha256:...\"}"
	if fd == nil || fd.GetType() != flight.DescriptorCMD {
		return nil, fault.New(fault.BadRequest, want)
	}
	command := &protocol.PutCommand{}
	if err := protocol.DecodeBody(fd.GetCmd(), command); err != nil {
		return nil, fault.New(fault.BadRequest, want+": %w", err)
	}
	if command.V != protocol.Version {
		return nil, fault.New(fault.BadRequest, want+"; v is %d, this server speaks %d", command.V, protocol.Version)
	}
	if command.Put != "model" {
		return nil, fault.New(fault.BadRequest, want+"; put is %.80q, this server takes \"model\"", command.Put)
	}
	if command.Digest == "" {
		return command, nil
	}
	return command, repository.CheckDigest(command.Digest)
}

// DoPut takes a SavedModel as one plain POSIX tar of its folder, in the rows of the column chunk (binary). It answers a
// PutResult with the digest, under which the model may be used from then on. If the command's digest is known, it
// answers at once, without reading the archive.
func (f *Front) DoPut(stream flight.FlightService_DoPutServer) error {
	archive, fd, err := openArchive(stream)
	if err != nil {
		return err
	}
	defer archive.reader.Release()
	command, err := parsePut(fd)
	if err != nil {
		return err
	}
	if got := archive.reader.Schema(); got.NumFields() != 1 || got.Field(0).Name != "chunk" ||
		got.Field(0).Type.ID() != arrow.BINARY {
		return fault.New(fault.BadRequest, "DoPut wants the schema %s, with chunks of a tar archive", putSchema)
	}
	result := protocol.PutResult{Digest: command.Digest}
	result.Known = command.Digest != "" && f.options.Repository.Known(command.Digest)
	if !result.Known {
		result.Digest, result.Known, err = f.options.Repository.Push(stream.Context(), archive, command.Digest)
		if err != nil {
			return err
		}
	}
	about, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return stream.Send(&flight.PutResult{AppMetadata: about})
}

// archive reads the bytes of a DoPut stream, one record batch at a time.
type archive struct {
	reader *flight.Reader
	mem    *handlers.ReadMemory
	chunks *array.Binary // of the current record batch, nil before the first
	next   int           // index of the next chunk in it
	rest   []byte        // unread bytes of the last chunk
	row    int64         // number of the next chunk in the stream
}

func openArchive(stream flight.FlightService_DoPutServer) (*archive, *flight.FlightDescriptor, error) {
	mem := handlers.NewReadMemory(memory.NewGoAllocator(), maxPutBytes)
	reader, fd, err := handlers.OpenReader(stream, mem)
	if err != nil {
		return nil, nil, err
	}
	return &archive{reader: reader, mem: mem}, fd, nil
}

// Read is part of io.Reader. Its errors are faults, or the transport's.
func (a *archive) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.chunks == nil || a.next == a.chunks.Len() {
			if err := a.advance(); err != nil {
				return 0, err
			}
			continue
		}
		i := a.next
		if a.chunks.IsNull(i) {
			return 0, fault.New(fault.BadRequest, "chunk %d of the archive is null", a.row)
		}
		begin, size := a.chunks.ValueOffset(i), a.chunks.ValueLen(i)
		values := a.chunks.Data().Buffers()[2]
		if begin < 0 || size < 0 || size > 0 && (values == nil || begin+size > values.Len()) {
			return 0, fault.New(fault.BadRequest, "chunk %d of the archive lies outside its buffer", a.row)
		}
		if size > 0 { // the offset of an empty chunk may be anything
			a.rest = a.chunks.Value(i)
		}
		a.next++
		a.row++
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// advance goes on to the next record batch; the reader releases the one before.
func (a *archive) advance() error {
	a.chunks = nil
	if !a.reader.Next() {
		err := a.reader.Err()
		switch {
		case err == nil:
			return io.EOF
		case a.mem.Refused():
			return errPutSize
		}
		return handlers.StreamError(err, "the archive cannot be read after chunk %d: %w", a.row, err)
	}
	rec := a.reader.Record()
	a.chunks, a.next = rec.Column(0).(*array.Binary), 0
	return nil
}

var errPutSize = fault.New(fault.BadRequest,
	"a record batch of the archive has more than %d bytes; send chunks of 4 MiB", maxPutBytes)

// Interface guards.
var _ io.Reader = (*archive)(nil)
