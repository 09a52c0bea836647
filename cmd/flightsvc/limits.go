package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Below these limits a front or its first runner ends with a message that does not name the limit.
const (
	leastFiles   = 64      // a front without a call has about 20 open
	leastAddress = 4 << 30 // of address space: a runner of the smallest model takes more than 2.5 GB
)

// checkLimits returns an error that names a limit of this process (getrlimit(2)) that is too low for a front and its
// runners, or nil.
func checkLimits() error {
	for _, c := range []struct {
		resource int
		least    uint64
		what     string
	}{
		{unix.RLIMIT_NOFILE, leastFiles, "open files (ulimit -n) is %d; flightsvc needs %d, and more for each stream"},
		{unix.RLIMIT_AS, leastAddress, "address space (ulimit -v) is %d bytes; TensorFlow needs %d, and more for " +
			"large models"},
	} {
		var limit unix.Rlimit
		if err := unix.Getrlimit(c.resource, &limit); err == nil && limit.Cur < c.least {
			return fmt.Errorf("the limit on "+c.what+"; raise it where flightsvc is started", limit.Cur, c.least)
		}
	}
	return nil
}
