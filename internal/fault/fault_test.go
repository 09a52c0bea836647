package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestFault(t *testing.T) {
	inner := New(NotFound, "no model %q", "m")
	outer := New(BadRequest, "request r: %w", inner)
	if got := outer.Error(); got != `request r: no model "m"` {
		t.Errorf("the sentence is %q", got)
	}
	if kind, ok := KindOf(outer); kind != BadRequest || !ok {
		t.Errorf("the outermost kind is %d, %t", kind, ok)
	}
	if !errors.Is(outer, inner) {
		t.Error("the cause was lost")
	}
	if kind, ok := KindOf(fmt.Errorf("while serving: %w", inner)); kind != NotFound || !ok {
		t.Errorf("below a plain error the kind is %d, %t", kind, ok)
	}
	if !errors.Is(New(Deadline, "late: %w", context.DeadlineExceeded), context.DeadlineExceeded) {
		t.Error("a plain cause was lost")
	}
	for _, err := range []error{nil, errors.New("plain")} {
		if kind, ok := KindOf(err); kind != Internal || ok {
			t.Errorf("%v has kind %d, %t", err, kind, ok)
		}
	}
}
