package handlers

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"flightsvc/internal/fault"
)

func TestStatusTable(t *testing.T) {
	want := map[fault.Kind]codes.Code{
		fault.Internal: codes.Internal, fault.BadRequest: codes.InvalidArgument, fault.NotFound: codes.NotFound,
		fault.Unavailable: codes.Unavailable, fault.Exhausted: codes.ResourceExhausted,
		fault.Precondition: codes.FailedPrecondition,
		fault.Deadline:     codes.DeadlineExceeded, fault.Canceled: codes.Canceled,
		fault.Unimplemented: codes.Unimplemented,
	}
	// Unimplemented is the last kind; a new one must be added here, in the table and in this line.
	for kind := fault.Internal; kind <= fault.Unimplemented; kind++ {
		code, ok := want[kind]
		if mapped, known := table[kind]; !ok || !known || mapped != code {
			t.Errorf("kind %d has code %s, %t; want %s, %t", kind, mapped, known, code, ok)
		}
		if got := status.Convert(statusOf(fmt.Errorf("around: %w", fault.New(kind,
			"a sentence")))); got.Code() != code || got.Message() != "around: a sentence" {
			t.Errorf("kind %d became %v", kind, got)
		}
	}
	if len(table) != len(want) {
		t.Errorf("the table has %d kinds, want %d", len(table), len(want))
	}
	seen := map[codes.Code]fault.Kind{}
	for kind, code := range table {
		if other, twice := seen[code]; twice {
			t.Errorf("kinds %d and %d are one code, %s", kind, other, code)
		}
		seen[code] = kind
	}
}

func TestStatusOfOtherErrors(t *testing.T) {
	for _, c := range []struct {
		err     error
		code    codes.Code
		message string
	}{
		{nil, codes.OK, ""},
		{errors.New("plain"), codes.Internal, "plain"},
		{errors.New("no \x1b[2J\nfile"), codes.Internal, `no \x1b[2J\nfile`},
		{fmt.Errorf("\x1b: %w", fault.New(fault.NotFound, "no \x07")), codes.NotFound, `\x1b: no \a`},
		{context.Canceled, codes.Canceled, "the caller left"},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "the caller's deadline passed"},
		{status.Error(codes.Unavailable, "from the runner"), codes.Unavailable, "from the runner"},
		{fault.New(fault.Deadline, "too late: %w", context.Canceled), codes.DeadlineExceeded,
			"too late: context canceled"},
	} {
		if got := status.Convert(statusOf(c.err)); got.Code() != c.code || got.Message() != c.message {
			t.Errorf("%v became %v", c.err, got)
		}
	}
}
