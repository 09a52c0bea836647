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
	bad := Serve{IdleTimeout: -1, LoadTimeout: -time.Second, Cores: -2}
	err := bad.Validate()
	if err == nil {
		t.Fatal("nothing was refused")
	}
	for _, part := range []string{"idle-timeout is -1ns", "load-timeout is -1s", "drain-timeout is 0s", "cores is -2", "max-image-pixels is 0", "max-image-bytes is 0"} {
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
		var want strings.Builder
		for j, c := range field.Name {
			if j > 0 && c >= 'A' && c <= 'Z' {
				want.WriteByte('_')
			}
			want.WriteRune(c)
		}
		if got := "FLIGHTSVC_" + strings.ToUpper(want.String()); variable != got {
			t.Errorf("%s has the variable %s, want %s", field.Name, variable, got)
		}
	}
}
