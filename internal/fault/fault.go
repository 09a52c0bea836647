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

// New returns a fault whose sentence is formatted as by fmt.Errorf; %w keeps a cause.
func New(kind Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, text: err.Error(), cause: errors.Unwrap(err)}
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
