package tensorflow

// #include "door.h"
import "C"

import "fmt"

// Code is a TF_Code, the kind of an Error. Its numbers are also those of gRPC.
type Code int

// The codes of TensorFlow.
const (
	OK                 Code = C.TF_OK
	Cancelled          Code = C.TF_CANCELLED
	Unknown            Code = C.TF_UNKNOWN
	InvalidArgument    Code = C.TF_INVALID_ARGUMENT
	DeadlineExceeded   Code = C.TF_DEADLINE_EXCEEDED
	NotFound           Code = C.TF_NOT_FOUND
	AlreadyExists      Code = C.TF_ALREADY_EXISTS
	PermissionDenied   Code = C.TF_PERMISSION_DENIED
	ResourceExhausted  Code = C.TF_RESOURCE_EXHAUSTED
	FailedPrecondition Code = C.TF_FAILED_PRECONDITION
	Aborted            Code = C.TF_ABORTED
	OutOfRange         Code = C.TF_OUT_OF_RANGE
	Unimplemented      Code = C.TF_UNIMPLEMENTED
	Internal           Code = C.TF_INTERNAL
	Unavailable        Code = C.TF_UNAVAILABLE
	DataLoss           Code = C.TF_DATA_LOSS
	Unauthenticated    Code = C.TF_UNAUTHENTICATED
)

var codeNames = [...]string{
	OK: "OK", Cancelled: "Cancelled", Unknown: "Unknown", InvalidArgument: "InvalidArgument",
	DeadlineExceeded: "DeadlineExceeded", NotFound: "NotFound", AlreadyExists: "AlreadyExists",
	PermissionDenied: "PermissionDenied", ResourceExhausted: "ResourceExhausted",
	FailedPrecondition: "FailedPrecondition", Aborted: "Aborted", OutOfRange: "OutOfRange",
	Unimplemented: "Unimplemented", Internal: "Internal", Unavailable: "Unavailable",
	DataLoss: "DataLoss", Unauthenticated: "Unauthenticated",
}

// String returns the name of the code, for instance "DeadlineExceeded".
func (c Code) String() string {
	if c >= 0 && int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("Code(%d)", int(c))
}

// Error is an error of TensorFlow, or of this package. Code is never OK. A message of TensorFlow may name operations of
// the graph and shapes, and may have several lines.
type Error struct {
	Code    Code
	Message string
}

// Error returns the code and the message.
func (e *Error) Error() string { return fmt.Sprintf("TensorFlow: %v: %s", e.Code, e.Message) }

// errorf makes an Error of this package.
func errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// withStatus calls f with a new status and returns the error that f left in it.
func withStatus(f func(*C.TF_Status)) error {
	status := C.TF_NewStatus()
	defer C.TF_DeleteStatus(status)
	f(status)
	if code := Code(C.TF_GetCode(status)); code != OK {
		return &Error{Code: code, Message: C.GoString(C.TF_Message(status))}
	}
	return nil
}
