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

// TestFaultsArePrintable puts what a caller may write into faults: no control character gets through, nothing printable
// is changed, and what is printable already stays so.
func TestFaultsArePrintable(t *testing.T) {
	for text, want := range map[string]string{
		"model größe 模型 \"x\" \\": "model größe 模型 \"x\" \\",
		"\x1b[31mred\x1b[0m":      `\x1b[31mred\x1b[0m`,
		"a\nINFO forged\r\ttab":   `a\nINFO forged\r\ttab`,
		"back\b\a\x00\x7f":        `back\b\a\x00\x7f`,
		"\u202egnp.exe\u2028":     `\u202egnp.exe\u2028`,
		"csi \u009b2J":            `csi \u009b2J`,
		"bytes \xff\xc3, \ufffd":  `bytes \xff\xc3, ` + "\ufffd",
	} {
		if got := New(BadRequest, "%s", text).Error(); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
		if got := New(BadRequest, "around: %w", New(NotFound, "%s", text)).Error(); got != "around: "+want {
			t.Errorf("%q within another fault became %q", text, got)
		}
		if got := Printable(Printable(text)); got != want {
			t.Errorf("%q made printable twice became %q", text, got)
		}
	}
}
