// Protocol buffers that are read field by field, so that memory does not grow with the file.

package savedmodel

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
)

// maxText is the most bytes of a name in a protocol buffer.
const maxText = 64 << 10

var errBroken = errors.New("it is damaged, or no protocol buffer")

// message is a protocol buffer of which fields are read one after the other.
type message struct {
	in   *input
	left int64 // bytes of the message that have not been read
}

// input is the file that a message and all messages in it are read from.
type input struct {
	file   io.ReadSeeker
	buffer *bufio.Reader // reads file
	text   [maxText]byte // what message.text returned last
}

// newMessage returns the message in a file of size bytes.
func newMessage(file io.ReadSeeker, size int64) *message {
	buffer := bufio.NewReaderSize(file, int(min(size, 256<<10)))
	return &message{in: &input{file: file, buffer: buffer}, left: size}
}

// fields calls visit with each field that may be a message, text or bytes, and skips all others. It also skips what
// visit does not read of a field.
func (m *message) fields(visit func(protowire.Number, *message) error) error {
	for m.left > 0 {
		tag, err := m.varint()
		if err != nil {
			return err
		}
		num, kind := protowire.DecodeTag(tag)
		switch {
		case num < protowire.MinValidNumber:
			return errBroken
		case kind == protowire.VarintType:
			_, err = m.varint()
		case kind == protowire.Fixed32Type:
			err = m.skip(4)
		case kind == protowire.Fixed64Type:
			err = m.skip(8)
		case kind == protowire.BytesType:
			err = m.field(num, visit)
		default: // groups, which none of these messages has
			err = errBroken
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *message) field(num protowire.Number, visit func(protowire.Number, *message) error) error {
	size, err := m.varint()
	if err != nil {
		return err
	}
	if size > uint64(m.left) {
		return errBroken
	}
	m.left -= int64(size)
	field := message{in: m.in, left: int64(size)}
	if err := visit(num, &field); err != nil {
		return err
	}
	return field.skip(field.left)
}

func (m *message) varint() (value uint64, err error) {
	for shift := 0; shift < 64 && m.left > 0; shift += 7 {
		b, err := m.in.buffer.ReadByte()
		if err != nil {
			return 0, shortened(err)
		}
		m.left--
		value |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return value, nil
		}
	}
	return 0, errBroken
}

// skip skips n bytes. It seeks past those that are not buffered.
func (m *message) skip(n int64) error {
	if n > m.left {
		return errBroken
	}
	m.left -= n
	near := min(n, int64(m.in.buffer.Buffered()))
	_, _ = m.in.buffer.Discard(int(near)) // cannot fail: they are buffered
	if n -= near; n == 0 {
		return nil
	}
	_, err := m.in.file.Seek(n, io.SeekCurrent)
	m.in.buffer.Reset(m.in.file)
	return err
}

// text reads the message as text, which is valid until the next one is read.
func (m *message) text() ([]byte, error) {
	if m.left > maxText {
		return nil, fmt.Errorf("it has a name of %d bytes; the maximum is %d", m.left, maxText)
	}
	return m.fill(m.in.text[:m.left])
}

// bytes reads the message as it is; more bytes than most are an error.
func (m *message) bytes(most int64) ([]byte, error) {
	if m.left > most {
		return nil, fmt.Errorf("a part of it has %d bytes; the maximum is %d", m.left, most)
	}
	return m.fill(make([]byte, m.left))
}

func (m *message) fill(to []byte) ([]byte, error) {
	_, err := io.ReadFull(m.in.buffer, to)
	m.left = 0
	return to, shortened(err)
}

// shortened replaces the error at the end of the file: the file became shorter while it was read.
func shortened(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return errBroken
	}
	return err
}

// meter reserves memory before it is used. Its zero value reserves nothing and never fails.
type meter struct {
	reserve func(bytes int64) error
	left    int64 // bytes that were reserved and are not used
}

// meterStep is the fewest bytes that a meter reserves at once.
const meterStep = 1 << 20

func (m *meter) take(bytes int64) error {
	m.left -= bytes
	if m.left >= 0 || m.reserve == nil {
		return nil
	}
	more := max(-m.left, meterStep)
	m.left += more
	return m.reserve(more)
}
