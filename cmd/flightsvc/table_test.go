package main

import (
	"bytes"
	"testing"
)

func TestSize(t *testing.T) {
	for bytes, want := range map[int64]string{
		-1: "", 0: "", 1: "1 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 1010 << 20: "0.986 " +
			"GiB", 1536 << 20: "1.5 GiB", 1 << 62: "4.19e+06 TiB",
	} {
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
