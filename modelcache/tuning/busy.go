package tuning

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"
)

// busyTime is how long processors are watched before a search.
const busyTime = 500 * time.Millisecond

// busyShare returns the share of this host's processors that were in use for a while; 0 where that is not known.
func busyShare(ctx context.Context) float64 {
	idle, all := processorTime()
	select {
	case <-time.After(busyTime):
	case <-ctx.Done():
	}
	idleThen, allThen := processorTime()
	if allThen <= all {
		return 0
	}
	return 1 - (idleThen-idle)/(allThen-all)
}

// processorTime returns how long the processors have been idle, and how long they have been there, in clock ticks.
func processorTime() (idle, all float64) {
	text, _ := os.ReadFile("/proc/stat") // empty where it cannot be read
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal guest guest_nice
	for i, field := range fields[min(1, len(fields)):] {
		ticks, err := strconv.ParseFloat(field, 64)
		if err != nil || i > 7 { // guests are in user and nice already
			break
		}
		all += ticks
		if i == 3 || i == 4 {
			idle += ticks
		}
	}
	return idle, all
}
