package protocol

import (
	"strings"
	"testing"
)

func TestSocketPath(t *testing.T) {
	long := "/" + strings.Repeat("a", maxSocketPath-1)
	for address, want := range map[string]string{
		"grpc+unix:///a/b.sock": "/a/b.sock", "/a/b.sock": "want grpc+unix://", "grpc://h:1": "want grpc+unix://",
		"grpc+unix://a": "must be absolute", "grpc+unix://": "must be absolute",
		Scheme + long: long, Scheme + long + "a": "at most 107 bytes, this one has 108; choose a shorter run-dir",
	} {
		got, err := SocketPath(address)
		if err != nil {
			got = err.Error()
		}
		if err == nil && got != want || !strings.Contains(got, want) {
			t.Errorf("%s: %s, want %s", address, got, want)
		}
	}
}
