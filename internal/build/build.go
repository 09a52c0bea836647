// Package build says which release and which build of it a binary is.
package build

import (
	"crypto/sha256"
	"encoding/hex"
	"runtime/debug"
)

// Version and Commit are set by the linker from the file VERSION and the commit at hand.
var (
	Version = "0.0.0"
	Commit  = "unknown"
)

// ID identifies a build: front and runner work together only if theirs are equal. It covers
// the version, the commit and the modules that the binary was made from.
func ID() string {
	sum := sha256.New()
	sum.Write([]byte(Version + " " + Commit))
	if info, ok := debug.ReadBuildInfo(); ok {
		sum.Write([]byte(info.GoVersion + " " + info.Main.Path))
	}
	return Commit + "-" + hex.EncodeToString(sum.Sum(nil))[:8]
}
