package rundir

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Process identifies a process, even if its id is used again later.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot: field 22 of /proc/<pid>/stat, see proc(5)
}

// startField is the position of the start time among the fields after the command's name.
const startField = 22 - 3

// Of returns the process that has the id now.
func Of(pid int) (Process, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, fmt.Errorf("no process %d", pid)
	}
	// The name is in parentheses and may itself hold parentheses.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) <= startField {
		return Process{}, fmt.Errorf("/proc/%d/stat has no start time", pid)
	}
	if fields[0] == "Z" {
		return Process{}, fmt.Errorf("process %d has ended and waits for its parent to notice", pid)
	}
	start, err := strconv.ParseUint(fields[startField], 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("/proc/%d/stat: start time: %w", pid, err)
	}
	return Process{PID: pid, Start: start}, nil
}

// ParseProcess reads "PID:START".
func ParseProcess(text string) (Process, error) {
	before, after, _ := strings.Cut(text, ":")
	pid, pidErr := strconv.ParseUint(before, 10, 31)
	start, startErr := strconv.ParseUint(after, 10, 64)
	if pidErr != nil || startErr != nil || pid == 0 {
		return Process{}, fmt.Errorf("process %q: want its id and its start time in clock ticks, PID:START", text)
	}
	return Process{PID: int(pid), Start: start}, nil
}

// Alive reports whether this process, and not another with its id, still runs.
func (p Process) Alive() bool {
	now, err := Of(p.PID)
	return err == nil && now == p
}

// Watch calls gone when the process has ended, from a goroutine that ends with ctx. fd is a pidfd of the process, which
// Watch closes, or -1 to open one. An error means that the process is another one, or has ended already.
func (p Process) Watch(ctx context.Context, fd int, gone func()) error {
	if fd < 0 {
		var err error
		if fd, err = unix.PidfdOpen(p.PID, 0); err != nil {
			return fmt.Errorf("watch process %d: %w", p.PID, err)
		}
	}
	// Checked after the pidfd was opened, so that both are about the same process.
	if !p.Alive() {
		_ = unix.Close(fd)
		return fmt.Errorf("process %d that started at %d has ended", p.PID, p.Start)
	}
	go func() {
		defer func() { _ = unix.Close(fd) }()
		for ctx.Err() == nil {
			polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(polled, pollMillis); n > 0 && err == nil {
				gone()
				return
			}
		}
	}()
	return nil
}

// pollMillis is the length of one wait for the process; ctx is checked after it.
const pollMillis = 1000
