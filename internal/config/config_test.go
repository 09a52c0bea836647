package config

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func valid() Serve {
	return Serve{IdleTimeout: time.Minute, LoadTimeout: time.Minute, DrainTimeout: time.Second, MaxImagePixels: 1,
		MaxImageBytes: 1}
}

func TestValidate(t *testing.T) {
	good := valid()
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	never := valid()
	never.IdleTimeout = 0
	if err := never.Validate(); err != nil {
		t.Error(err)
	}
	bad := Serve{IdleTimeout: -1, LoadTimeout: -time.Second, Cores: -2, KeepAlive: -time.Minute, PollInterval: -1}
	want := `load-timeout is -1s; want more than 0
drain-timeout is 0s; want more than 0
cores is -2; want 0 for all, or at most 1024
idle-timeout is -1ns; want 0 or more
keep-alive is -1m0s; want 0 or more
poll-interval is -1ns; want 0 or more
max-image-pixels is 0; want 1 or more
max-image-bytes is 0; want 1 or more`
	for range 10 { // always in one order
		if err := bad.Validate(); err == nil || err.Error() != want {
			t.Fatalf("the faults are\n%v", err)
		}
	}
}

func TestBytes(t *testing.T) {
	for text, want := range map[string]Bytes{"512MiB": 512 << 20, "2g": 2 << 30, "1.5 GiB": 3 << 29, "100": 100,
		"1kB": 1000} {
		var got Bytes
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%s is %d, %v", text, got, err)
		}
	}
	for bytes, want := range map[Bytes]string{0: "0 B", 999: "999 B", 512 << 20: "512 MiB", 1536 << 20: "1.5 GiB",
		-1: "0 B"} {
		if got := bytes.String(); got != want {
			t.Errorf("%d bytes are %q, want %q", int64(bytes), got, want)
		}
	}
}

// TestSpellings holds the promise of one name in four spellings: the variable follows from the field's name.
func TestSpellings(t *testing.T) {
	table := reflect.TypeFor[Serve]()
	for i := range table.NumField() {
		field := table.Field(i)
		if field.Tag.Get("help") == "" && field.Name != "OwnerFD" {
			t.Errorf("%s has no help", field.Name)
		}
		variable, ok := field.Tag.Lookup("env")
		if !ok {
			continue // of one start, not a setting
		}
		if got := strings.ReplaceAll(variable, "_", ""); got != "FLIGHTSVC"+strings.ToUpper(field.Name) {
			t.Errorf("%s has the variable %s", field.Name, variable)
		}
	}
}
