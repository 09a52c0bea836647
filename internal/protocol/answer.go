package protocol

import (
	"encoding/json"
	"fmt"
)

// RetryAfter is the trailing metadata with the milliseconds after which a server that is full may be asked again.
const RetryAfter = "retry-after-ms"

// AnswerMetadata is the app_metadata of an answered record batch. Times are microseconds.
type AnswerMetadata struct {
	Batch   int64  `json:"batch"` // which input record batch this answers, from 0
	Last    bool   `json:"last"`  // whether it is the last part of that answer
	QueueUS int64  `json:"queue_us"`
	RunUS   int64  `json:"run_us"`
	TotalUS int64  `json:"total_us"`
	TFRows  int    `json:"tf_rows"`          // rows of the TensorFlow runs that it was part of, of all streams
	Server  string `json:"server,omitempty"` // on the first answer only
	Form    string `json:"form,omitempty"`   // FormSaved or FormFolded, on the first answer only
}

// The forms of a model. A stream keeps the form that it began with.
const (
	FormSaved  = "saved"  // the SavedModel as it is
	FormFolded = "folded" // frozen and folded: variables are constants, and TensorFlow fuses more
)

// Encode returns the metadata as JSON.
func (m AnswerMetadata) Encode() []byte { return encode(m) }

// encode returns JSON of a struct of numbers, strings and bools, which cannot fail.
func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("numbers and strings always encode: %v", err))
	}
	return data
}
