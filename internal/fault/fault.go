// Package fault holds the one error type that crosses package borders towards a
// caller. A fault has a kind, which handlers turns into a gRPC code in one table,
// and a sentence for people: which model, signature, column, both types, what to
// do next. It never holds row data.
//
// Only errors that a caller can see belong here; errors that stay inside one
// package are ordinary errors.
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
	// Internal is a defect of ours or of TensorFlow; a retry does not help.
	Internal Kind = iota
	// BadRequest is a mistake in the descriptor, a column, a type, a shape or a row.
	BadRequest
	// NotFound is an unknown model, version or signature.
	NotFound
	// Unavailable passes by itself: asking again helps.
	Unavailable
	// Exhausted is a limit on memory or size that a retry does not change.
	Exhausted
	// Precondition is something that must be installed or configured first.
	Precondition
	// Deadline is time that ran out.
	Deadline
	// Canceled is a caller that left.
	Canceled
	// Unimplemented is a verb or action that this server does not have.
	Unimplemented
)

// Error is a fault: a kind, a sentence, and the error below it, if any.
type Error struct {
	Kind  Kind
	text  string
	cause error
}

// New returns a fault whose sentence is formatted as by fmt.Errorf; %w keeps a cause. What callers have written may be
// among args: the sentence is Printable.
func New(kind Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, text: Printable(err.Error()), cause: errors.Unwrap(err)}
}

// Printable replaces whatever is not a printable character by its escape as Go writes it (\x1b, \n, \u202e), so that a
// text stays one line and cannot command a terminal. It leaves a printable text as it is.
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
