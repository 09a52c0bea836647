package handlers

import (
	"context"
	"errors"
	"runtime/debug"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"flightsvc/internal/fault"
)

// table is the one place where our errors become gRPC codes. What a Python caller sees is
// in the comment: pyarrow tells apart only some codes.
var table = map[fault.Kind]codes.Code{
	fault.Internal:      codes.Internal,           // FlightInternalError
	fault.BadRequest:    codes.InvalidArgument,    // ArrowInvalid
	fault.NotFound:      codes.NotFound,           // ArrowKeyError
	fault.Unavailable:   codes.Unavailable,        // FlightUnavailableError: ask again
	fault.Exhausted:     codes.ResourceExhausted,  // ArrowInvalid: a retry does not help
	fault.Precondition:  codes.FailedPrecondition, // ArrowInvalid: install or configure first
	fault.Deadline:      codes.DeadlineExceeded,   // FlightTimedOutError
	fault.Canceled:      codes.Canceled,           // FlightCancelledError
	fault.Unimplemented: codes.Unimplemented,      // ArrowNotImplementedError
}

// statusOf turns any error into a gRPC status error.
func statusOf(err error) error {
	var f *fault.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &f):
		return status.Error(table[f.Kind], err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the caller's deadline passed")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller left")
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(codes.Internal, err.Error())
}

// kindOf returns the kind of a fault, Internal for any other error.
func kindOf(err error) fault.Kind {
	kind, _ := fault.KindOf(err)
	return kind
}

// errPanic is all that a caller learns of a panic; the stack is in the server's log.
var errPanic = fault.New(fault.Internal, "the server hit a defect while serving this call; its log has the details")

// guard turns a panic in a handler into an error and a log line.
func guard(log *zap.Logger, method string, err *error) {
	if cause := recover(); cause != nil {
		log.Error("panic", zap.String("method", method), zap.Any("cause", cause), zap.ByteString("stack", debug.Stack()))
		*err = errPanic
	}
}

// Interceptors returns the server options that map errors through the table, survive
// panics, and log calls that fail.
func Interceptors(log *zap.Logger) []grpc.ServerOption {
	finish := func(method string, err error) error {
		if err == nil {
			return nil
		}
		err = statusOf(err)
		log.Info("call ended", zap.String("method", method), zap.Stringer("code", status.Code(err)), zap.Error(err))
		return err
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (reply any, err error) {
			defer func() { err = finish(info.FullMethod, err) }()
			defer guard(log, info.FullMethod, &err)
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
			defer func() { err = finish(info.FullMethod, err) }()
			defer guard(log, info.FullMethod, &err)
			return next(srv, stream)
		}),
	}
}
