package protocol

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Scheme begins each address; the absolute path of a Unix socket follows it.
const Scheme = "grpc+unix://"

// maxSocketPath is the longest path of a Unix socket on Linux: sun_path has 108 bytes, the last is 0 (unix(7)).
const maxSocketPath = 107

// SocketPath returns the path in an address, or an error that says what is wrong with the address.
func SocketPath(address string) (string, error) {
	path, ok := strings.CutPrefix(address, Scheme)
	switch {
	case !ok:
		return "", fmt.Errorf("address %q: want %s and an absolute path", address, Scheme)
	case !filepath.IsAbs(path):
		return "", fmt.Errorf("address %q: the path must be absolute", address)
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("address %q: a Unix socket's path has at most %d bytes, this one has %d; "+
			"choose a shorter run-dir", address, maxSocketPath, len(path))
	}
	return path, nil
}
