// TF Serving's warm-up requests: the records of a TFRecord file, and the tensors in them.

package savedmodel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math"

	tensorpb "github.com/galeone/tensorflow/tensorflow/go/core/framework/tensor_go_proto"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// WarmupFile is the path, in a SavedModel's folder, of the requests that TF Serving runs before it serves the model.
const WarmupFile = "assets.extra/tf_serving_warmup_requests"

// MaxWarmups is the most records that the file may have, as in TF Serving.
const MaxWarmups = 1000

// maxWarmupBytes is the most bytes of one record, and of the tensors in it.
const maxWarmupBytes = 256 << 20

// Warmup is one record of the file.
type Warmup struct {
	Number    int    // in the file, from 1
	Skipped   string // the kind of a record that is no Predict request; the fields below are empty then
	Signature string
	Inputs    map[string]Constant // by name in the signature
	Outputs   []string            // names in the signature; none means all
}

// Constant is a tensor in a file, row-major: elements of fixed size are in Data, little endian, strings in Strings.
type Constant struct {
	DType   DType
	Shape   []int64
	Data    []byte
	Strings [][]byte
}

// Field numbers of PredictionLog, PredictLog, PredictRequest and ModelSpec, from TF Serving's prediction_log.proto,
// predict.proto and model.proto.
const (
	fieldPredictLog     = 6
	fieldPredictRequest = 1
	fieldModelSpec      = 1
	fieldInputs         = 2
	fieldOutputFilter   = 3
	fieldSignatureName  = 3
)

// logTypes are the other kinds of PredictionLog.
var logTypes = map[protowire.Number]string{
	2: "classify_log", 3: "regress_log", 4: "multi_inference_log", 5: "session_run_log", 7: "predict_streamed_log",
}

// ReadWarmups reads the records of a WarmupFile: a TFRecord file of PredictionLog. It ends with the first error, which
// comes with the number of its record: a wrong checksum, a truncated file, an invalid message or tensor, or more than
// MaxWarmups records. Only one record at a time is in memory.
func ReadWarmups(file io.Reader) iter.Seq2[Warmup, error] { return readWarmups(file, maxWarmupBytes) }

func readWarmups(file io.Reader, most int64) iter.Seq2[Warmup, error] {
	return func(yield func(Warmup, error) bool) {
		for number := 1; ; number++ {
			w := Warmup{Number: number}
			record, err := readRecord(file, most)
			switch {
			case err == io.EOF:
				return
			case err == nil && number > MaxWarmups:
				err = fmt.Errorf("there are more than %d records, the limit of TensorFlow Serving", MaxWarmups)
			case err == nil:
				err = w.parse(record, most)
			}
			if !yield(w, err) || err != nil {
				return
			}
		}
	}
}

// readRecord reads one record of a TFRecord file, as tensorflow/core/lib/io/record_writer.h describes it: the length of
// the data, 8 bytes, its checksum, 4, the data and their checksum, 4.
func readRecord(file io.Reader, most int64) ([]byte, error) {
	var head [12]byte
	if _, err := io.ReadFull(file, head[:]); err != nil {
		return nil, cut(err)
	}
	if masked(head[:8]) != binary.LittleEndian.Uint32(head[8:]) {
		return nil, errors.New("the checksum of its length is wrong: this is not a TFRecord file, or it is damaged")
	}
	length := binary.LittleEndian.Uint64(head[:8])
	if length > uint64(most) {
		return nil, fmt.Errorf("it has %d bytes; the maximum is %d", length, most)
	}
	var data bytes.Buffer // grows with the bytes that are read, since the length may be wrong
	if _, err := io.CopyN(&data, file, int64(length)+4); err != nil {
		return nil, cut(io.ErrUnexpectedEOF)
	}
	record := data.Bytes()[:length]
	if masked(record) != binary.LittleEndian.Uint32(data.Bytes()[length:]) {
		return nil, errors.New("the checksum of its data is wrong: the file is damaged")
	}
	return record, nil
}

func cut(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the file ends in the middle of it")
	}
	return err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// masked returns TFRecord's checksum: CRC-32C, rotated by 15 bits and with a constant added (tsl/lib/hash/crc32c.h).
func masked(data []byte) uint32 {
	sum := crc32.Checksum(data, castagnoli)
	return (sum>>15 | sum<<17) + 0xa282ead8
}

func (w *Warmup) parse(record []byte, room int64) error {
	found := false
	m := newMessage(bytes.NewReader(record), int64(len(record)))
	err := m.fields(func(num protowire.Number, field *message) error {
		if kind, ok := logTypes[num]; ok {
			w.Skipped = kind
		}
		if num != fieldPredictLog {
			return nil
		}
		return field.fields(func(num protowire.Number, field *message) error {
			if num != fieldPredictRequest {
				return nil
			}
			found = true
			return w.parseRequest(field, room)
		})
	})
	if err == nil && !found && w.Skipped == "" {
		err = errors.New("it has no predict_log.request")
	}
	if w.Signature == "" {
		w.Signature = DefaultSignature
	}
	return err
}

func (w *Warmup) parseRequest(m *message, room int64) error {
	w.Inputs = map[string]Constant{}
	return m.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldModelSpec:
			return field.fields(func(num protowire.Number, field *message) error {
				if num != fieldSignatureName {
					return nil
				}
				name, err := field.text()
				w.Signature = string(name)
				return err
			})
		case fieldOutputFilter:
			name, err := field.text()
			w.Outputs = append(w.Outputs, string(name))
			return err
		case fieldInputs:
			return w.parseInput(field, &room)
		}
		return nil
	})
}

// parseInput reads one entry of map<string, TensorProto>.
func (w *Warmup) parseInput(entry *message, room *int64) error {
	var name string
	var content tensorpb.TensorProto
	err := entry.fields(func(num protowire.Number, field *message) error {
		switch num {
		case fieldMapKey:
			text, err := field.text()
			name = string(text)
			return err
		case fieldMapValue:
			data, err := field.bytes(maxWarmupBytes)
			if err != nil {
				return err
			}
			return proto.Unmarshal(data, &content)
		}
		return nil
	})
	if err != nil {
		return err
	}
	constant, err := newConstant(&content, room)
	if err != nil {
		return fmt.Errorf("input %q: %w", name, err)
	}
	w.Inputs[name] = constant
	return nil
}

var errLarge = fmt.Errorf("its record has more than %d MiB of tensors", maxWarmupBytes>>20)

// stringBytes is the memory of an element of a string tensor, without its bytes.
const stringBytes = 24

// newConstant makes a tensor of its message as TensorFlow does (Tensor::FromProto): from tensor_content, or from the
// values in the field of its type. The last value is repeated if there are too few; without any the tensor is zeros.
// The tensor may have at most *room bytes, and its bytes are subtracted from *room.
func newConstant(content *tensorpb.TensorProto, room *int64) (Constant, error) {
	c := Constant{DType: DType(content.GetDtype()), Shape: []int64{}}
	size := int64(c.DType.Size())
	if c.DType == String {
		size = stringBytes
	} else if size == 0 {
		return c, fmt.Errorf("a tensor of %v cannot be fed", c.DType)
	}
	if content.GetTensorShape().GetUnknownRank() {
		return c, errors.New("its shape is unknown")
	}
	n, empty := int64(1), false
	for _, dim := range content.GetTensorShape().GetDim() {
		d := dim.GetSize()
		c.Shape = append(c.Shape, d)
		if d < 0 {
			return c, fmt.Errorf("its shape is %v", c.Shape)
		}
		if d == 0 {
			empty = true
		} else if n > *room/size/d {
			return c, errLarge
		} else {
			n *= d
		}
	}
	if len(c.Shape) > maxRank {
		return c, fmt.Errorf("it has %d dimensions; the maximum is %d", len(c.Shape), maxRank)
	}
	if empty {
		n = 0
	}
	if *room -= n * size; *room < 0 {
		return c, errLarge
	}
	raw := content.GetTensorContent()
	if c.DType == String {
		return c, c.addStrings(content.GetStringVal(), raw, int(n), room)
	}
	if len(raw) > 0 {
		if int64(len(raw)) != n*size {
			return c, fmt.Errorf("it has %d bytes of tensor_content; a %v tensor of shape %v has %d",
				len(raw), c.DType, c.Shape, n*size)
		}
		c.Data = raw
		return c, nil
	}
	values := c.DType.values(content)
	if int64(len(values)) > n*size {
		return c, fmt.Errorf("it has %d values for the shape %v", int64(len(values))/size, c.Shape)
	}
	c.Data = make([]byte, n*size)
	filled := copy(c.Data, values)
	if filled > 0 {
		for filled < len(c.Data) { // the last value, in doubling strides
			last := c.Data[len(values)-int(size) : filled]
			filled += copy(c.Data[filled:], last)
		}
	}
	return c, nil
}

// maxRank is the most dimensions that TensorFlow's TensorShape can hold.
const maxRank = 254

// addStrings reads strings from string_val, or from tensor_content: the lengths of all as varints, then their bytes. A
// value that is repeated counts each time, since TensorFlow copies it.
func (c *Constant) addStrings(values [][]byte, raw []byte, n int, room *int64) error {
	if len(values) > n {
		return fmt.Errorf("it has %d values for the shape %v", len(values), c.Shape)
	}
	if len(raw) == 0 && len(values) > 0 {
		if *room -= int64(n-len(values)) * int64(len(values[len(values)-1])); *room < 0 {
			return errLarge
		}
	}
	c.Strings = make([][]byte, n)
	if len(raw) == 0 {
		for i := range c.Strings {
			if len(values) > 0 {
				c.Strings[i] = values[min(i, len(values)-1)]
			}
		}
		return nil
	}
	lengths := make([]uint64, n)
	for i := range lengths {
		length, read := protowire.ConsumeVarint(raw)
		if read < 0 {
			return errors.New("its tensor_content ends too soon")
		}
		lengths[i], raw = length, raw[read:]
	}
	for i, length := range lengths {
		if length > uint64(len(raw)) {
			return errors.New("its tensor_content ends too soon")
		}
		c.Strings[i], raw = raw[:length], raw[length:]
	}
	if len(raw) > 0 {
		return errors.New("its tensor_content is too long")
	}
	return nil
}

// values returns the values in the field of a type, as they are in a tensor's memory.
func (d DType) values(content *tensorpb.TensorProto) (data []byte) {
	order := binary.LittleEndian
	switch d {
	case Float32:
		for _, v := range content.GetFloatVal() {
			data = order.AppendUint32(data, math.Float32bits(v))
		}
	case Float64:
		for _, v := range content.GetDoubleVal() {
			data = order.AppendUint64(data, math.Float64bits(v))
		}
	case Float16, Bfloat16: // half_val has their bits
		for _, v := range content.GetHalfVal() {
			data = order.AppendUint16(data, uint16(v))
		}
	case Int32:
		for _, v := range content.GetIntVal() {
			data = order.AppendUint32(data, uint32(v))
		}
	case Int16, Uint16:
		for _, v := range content.GetIntVal() {
			data = order.AppendUint16(data, uint16(v))
		}
	case Int8, Uint8:
		for _, v := range content.GetIntVal() {
			data = append(data, byte(v))
		}
	case Int64:
		for _, v := range content.GetInt64Val() {
			data = order.AppendUint64(data, uint64(v))
		}
	case Uint32:
		for _, v := range content.GetUint32Val() {
			data = order.AppendUint32(data, v)
		}
	case Uint64:
		for _, v := range content.GetUint64Val() {
			data = order.AppendUint64(data, v)
		}
	case Bool:
		for _, v := range content.GetBoolVal() {
			b := byte(0)
			if v {
				b = 1
			}
			data = append(data, b)
		}
	}
	return data
}
