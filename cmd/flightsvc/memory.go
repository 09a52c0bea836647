package main

import (
	"debug/elf"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where control groups of version 2 are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// defaultMemory returns the bytes of host memory that models may use if no setting says: half of the limit of this
// process's control groups, else half of the machine's memory. The other half is for Spark and Python.
func defaultMemory() int64 {
	most := int64(math.MaxInt64)
	var machine unix.Sysinfo_t
	if err := unix.Sysinfo(&machine); err == nil {
		most = int64(machine.Totalram) * int64(machine.Unit)
	}
	own := "/" // in a container, the process's group is the root
	if text, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(text)) {
			if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
				own = path
			}
		}
	}
	for group := own; ; group = filepath.Dir(group) { // a limit holds for all groups below it
		most = min(most, limitOf(filepath.Join(cgroupRoot, group, "memory.max")))
		if group == "/" || group == "." {
			break
		}
	}
	most = min(most, limitOf("/sys/fs/cgroup/memory/memory.limit_in_bytes")) // version 1
	return most / 2
}

// dropStartupPages drops the pages of this program's own file that only start-up needed (MADV_DONTNEED): some 50 MB of
// tables of the libraries for stores and protocols. The kernel reads a page from the file again when it is needed, so
// only segments that cannot be written are dropped.
func dropStartupPages() {
	file, err := elf.Open("/proc/self/exe")
	if err != nil || file.Type != elf.ET_EXEC { // a file of another type is loaded at an unknown address
		return
	}
	defer func() { _ = file.Close() }()
	page := uint64(os.Getpagesize())
	for _, segment := range file.Progs {
		if segment.Type != elf.PT_LOAD || segment.Flags&elf.PF_W != 0 {
			continue
		}
		start := segment.Vaddr &^ (page - 1)
		// an error is ignored: the pages stay
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(start), uintptr(segment.Vaddr+segment.Memsz-start),
			unix.MADV_DONTNEED)
	}
}

// limitOf reads a memory limit of a control group; it is MaxInt64 if the file is missing or says "max".
func limitOf(path string) int64 {
	text, err := os.ReadFile(path) //nolint:gosec // the kernel's
	if err != nil {
		return math.MaxInt64
	}
	limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return math.MaxInt64
	}
	return limit
}
