package config

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func valid() Serve {
	return Serve{IdleTimeout: time.Minute, LoadTimeout: time.Minute, DrainTimeout: time.Second, MaxImagePixels: 1, MaxImageBytes: 1}
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
	err := bad.Validate()
	if err == nil {
		t.Fatal("nothing was refused")
	}
	for _, part := range []string{"idle-timeout is -1ns", "keep-alive is -1m0s; want 0 or more", "poll-interval is -1ns", "load-timeout is -1s", "drain-timeout is 0s", "cores is -2", "max-image-pixels is 0", "max-image-bytes is 0"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
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
