// Answers: how record batches become Flight messages.

package handlers

import (
	"bytes"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"

	"flightsvc/internal/protocol"
)

// answerMemory is where answers are built and encoded: Go memory, because that is zeroed. Arrow's encoder allocates the
// validity bits of a column without a valid row and does not clear them.
var answerMemory = memory.NewGoAllocator()

// answerWriter sends an answer: the schema at once, so that a client knows that its stream is open before it sends a
// row, and then record batches with their metadata. flight.Writer would send the schema with the first record batch
// only.
type answerWriter struct {
	stream   flight.DataStreamWriter
	encoder  *ipc.Writer
	body     bytes.Buffer // reused, so as large as the largest record batch so far
	about    []byte       // metadata of the next message
	skipNext bool         // the next message is the schema, which the client has
}

func newAnswerWriter(stream flight.DataStreamWriter, schema *arrow.Schema) (*answerWriter, error) {
	w := &answerWriter{stream: stream}
	encoder := func() *ipc.Writer {
		return ipc.NewWriterWithPayloadWriter(w, ipc.WithSchema(schema), ipc.WithAllocator(answerMemory))
	}
	// A writer that is closed before its first record batch sends the schema alone.
	if err := encoder().Close(); err != nil {
		return nil, err
	}
	w.encoder, w.skipNext = encoder(), true
	return w, nil
}

func (w *answerWriter) write(rec arrow.Record, about protocol.AnswerMetadata) error {
	w.about = about.Encode()
	return w.encoder.Write(rec)
}

// WritePayload copies one encoded message into the body and sends it; gRPC copies it into its own buffers before Send
// returns. It is part of ipc.PayloadWriter.
func (w *answerWriter) WritePayload(payload ipc.Payload) error {
	meta := payload.Meta()
	defer meta.Release()
	if w.skipNext {
		w.skipNext = false
		return nil
	}
	w.body.Reset()
	if err := payload.SerializeBody(&w.body); err != nil {
		return err
	}
	return w.stream.Send(&flight.FlightData{DataHeader: meta.Bytes(), DataBody: w.body.Bytes(), AppMetadata: w.about})
}

// Start is part of ipc.PayloadWriter.
func (w *answerWriter) Start() error { return nil }

// Close is part of ipc.PayloadWriter.
func (w *answerWriter) Close() error { return nil }
