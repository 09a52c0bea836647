// Status: how errors become gRPC codes and sentences, and what is logged of them.

package handlers

import (
	"context"
	"errors"
	"runtime/debug"
	"strings"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"flightsvc/internal/build"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
)

// table is the only place where faults become gRPC codes. The comments say what a Python caller gets, because pyarrow
// tells only some codes apart.
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
		return status.Error(table[f.Kind], clipped(fault.Printable(err.Error()))) // not f's text: err may wrap f
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the caller's deadline passed")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the caller left")
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(codes.Internal, clipped(fault.Printable(err.Error())))
}

// withBuilds adds to an error about an unknown field the builds of both sides, because one of them must be older. The
// caller's user agent says what the caller is.
func withBuilds(ctx context.Context, err error) error {
	var unknown *protocol.UnknownFieldError
	if !errors.As(err, &unknown) {
		return err
	}
	caller := "of an unknown build"
	if about, _ := metadata.FromIncomingContext(ctx); len(about.Get("user-agent")) > 0 {
		caller = about.Get("user-agent")[0]
	}
	return fault.New(kindOf(err), "%w; this server is flightsvc %s, build %s, the caller is %.100s: "+
		"run both of one version, or leave the field out", err, build.Version, build.ID(), caller)
}

// clipped cuts a text to what every client accepts. gRPC sends it as metadata, of which clients accept 8 KiB, and in
// which each byte that is not ASCII takes three.
func clipped(text string) string {
	const most = 2500
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}

// kindOf returns the kind of a fault, Internal for any other error.
func kindOf(err error) fault.Kind {
	kind, _ := fault.KindOf(err)
	return kind
}

// errPanic is all that a caller learns of a panic; the server's log has the stack.
var errPanic = fault.New(fault.Internal, "the server hit a defect while serving this call; its log has the details")

// guard turns a panic in a handler into an error and a log line.
func guard(log *zap.Logger, method string, err *error) {
	if cause := recover(); cause != nil {
		log.Error("panic", zap.String("method", method), zap.Any("cause", cause),
			zap.ByteString("stack", debug.Stack()))
		*err = errPanic
	}
}

// TensorFlowSays stands in an error before TensorFlow's own words, which may quote what is in a row. The caller gets
// them, the log must not.
const TensorFlowSays = "TensorFlow refused it: "

// cause is the field of a log line that says why something ended, without TensorFlow's words.
func cause(err error) zap.Field {
	if err == nil {
		return zap.Skip()
	}
	own, _, quotes := strings.Cut(err.Error(), TensorFlowSays)
	if quotes {
		own += TensorFlowSays + "..."
	}
	return zap.String("error", own)
}

// Interceptors returns the server options that map errors through the table, turn panics into errors, and log calls
// that fail.
func Interceptors(log *zap.Logger) []grpc.ServerOption {
	finish := func(ctx context.Context, method string, err error) error {
		if err == nil {
			return nil
		}
		err = statusOf(withBuilds(ctx, err))
		log.Info("call ended", zap.String("method", method), zap.Stringer("code", status.Code(err)), cause(err))
		return err
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo,
			next grpc.UnaryHandler) (reply any, err error) {
			defer func() { err = finish(ctx, info.FullMethod, err) }()
			defer guard(log, info.FullMethod, &err)
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo,
			next grpc.StreamHandler) (err error) {
			defer func() { err = finish(stream.Context(), info.FullMethod, err) }()
			defer guard(log, info.FullMethod, &err)
			return next(srv, stream)
		}),
	}
}
