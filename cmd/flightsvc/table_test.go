package main

import (
	"bytes"
	"testing"
)

func TestSize(t *testing.T) {
	for bytes, want := range map[int64]string{-1: "", 0: "", 1: "1 B", 1536 << 20: "1.5 GiB"} {
		if got := size(bytes); got != want {
			t.Errorf("%d bytes are %q, want %q", bytes, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := table(&out, []string{"A", "LONG", "Z"}, [][]string{{"model", "", "x"}, {"", "1", ""}}); err != nil {
		t.Fatal(err)
	}
	if want := "A      LONG  Z\nmodel  -     x\n-      1     -\n"; out.String() != want {
		t.Errorf("the table is\n%s", out.String())
	}
}
