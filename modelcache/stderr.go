package modelcache

import (
	"bytes"
	"encoding/json"
	"io"
	"time"

	"go.uber.org/zap"
)

// Bounds on what a runner prints that is not a line of a log, such as a library's warnings about pictures, or a crash.
const (
	maxLine       = 16 << 10         // bytes of a line; the rest is left out
	maxForeign    = 200              // such lines in foreignWindow; more are only counted
	foreignWindow = 10 * time.Minute // a library may complain about each row
)

// runnerLog takes a runner's standard error. It passes on lines of JSON, and logs all others as lines of the front.
// Only one goroutine, that of the process's exec.Cmd, calls Write.
type runnerLog struct {
	out  io.Writer
	log  *zap.Logger
	line []byte // the beginning of a line that has not ended

	since         time.Time // when the window began
	foreign, more int       // lines that are not JSON in it: logged, and left out
}

// Write is part of io.Writer. It never fails, because exec.Cmd would stop reading.
func (l *runnerLog) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		text, after, ended := bytes.Cut(rest, []byte("\n"))
		l.line = append(l.line, text[:min(len(text), maxLine-len(l.line))]...)
		if ended {
			l.pass()
		}
		rest = after
	}
	return len(p), nil
}

// pass passes on or logs the line that has ended.
func (l *runnerLog) pass() {
	line := l.line
	l.line = l.line[:0]
	switch {
	case len(bytes.TrimSpace(line)) == 0:
		return
	case line[0] == '{' && json.Valid(line):
		_, _ = l.out.Write(append(line, '\n')) // fails if nobody reads the log any more
		return
	}
	if now := time.Now(); now.Sub(l.since) > foreignWindow {
		l.tell()
		l.since, l.foreign, l.more = now, 0, 0
	}
	if l.foreign == maxForeign {
		l.more++
		return
	}
	l.foreign++
	l.log.Warn("runner wrote", zap.ByteString("line", line))
}

// tell logs how many lines were left out.
func (l *runnerLog) tell() {
	if l.more > 0 {
		l.log.Warn("runner wrote more than is logged", zap.Int("lines left out", l.more))
	}
}

// close handles a last line that has no end, and logs what was left out. Call it when the process has ended.
func (l *runnerLog) close() {
	if len(l.line) > 0 {
		l.pass()
	}
	l.tell()
}

// Interface guards.
var _ io.Writer = (*runnerLog)(nil)
