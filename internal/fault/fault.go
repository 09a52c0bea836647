// Package fault holds the one error type that callers of the server see. A fault has a kind, for which handlers has a
// table of gRPC codes, and a sentence for people: which model, signature, column, both types, what to do next. It never
// holds row data.
//
// Errors that stay inside one package are ordinary errors.
package fault

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Kind says what a caller can do about an error.
type Kind int

const (
	// Internal is a defect of flightsvc or of TensorFlow; a retry does not help.
	Internal Kind = iota
	// BadRequest is a mistake in the descriptor, a column, a type, a shape or a row.
	BadRequest
	// NotFound is an unknown model, version or signature.
	NotFound
	// Unavailable passes by itself: a retry helps.
	Unavailable
	// Exhausted is a limit on memory or size that a retry does not change.
	Exhausted
	// Precondition is something that must be installed or configured first.
	Precondition
	// Deadline is a time limit that is over.
	Deadline
	// Canceled is a call that its caller has ended.
	Canceled
	// Unimplemented is a call or action that this server does not have.
	Unimplemented
)

// Error is a fault: a kind, a sentence, and the error below it, if any.
type Error struct {
	Kind  Kind
	text  string
	cause error
}

// New returns a fault whose sentence is formatted as by fmt.Errorf; %w keeps a cause. The sentence is made Printable,
// since args may hold what callers have written.
func New(kind Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, text: Printable(err.Error()), cause: errors.Unwrap(err)}
}

// Printable replaces each character that is not printable by its escape as Go writes it (\x1b, \n, \u202e), so that a
// text stays one line and cannot control a terminal. It leaves a printable text as it is.
func Printable(text string) string {
	var out strings.Builder
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], string(utf8.RuneError)): // a byte that is not UTF-8
			fmt.Fprintf(&out, `\x%02x`, text[i])
		case unicode.IsPrint(r):
			out.WriteRune(r)
		default:
			out.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return out.String()
}

func (e *Error) Error() string { return e.text }

// Unwrap returns the cause that was given with %w, or nil.
func (e *Error) Unwrap() error { return e.cause }

// KindOf returns the kind of the outermost fault in err, and false if it has none.
func KindOf(err error) (Kind, bool) {
	var f *Error
	if errors.As(err, &f) {
		return f.Kind, true
	}
	return Internal, false
}
