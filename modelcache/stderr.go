package modelcache

import (
	"bytes"
	"encoding/json"
	"io"
	"time"

	"go.uber.org/zap"
)

// What a runner writes that is no line of a log, such as a library's complaints about pictures, or a crash.
const (
	maxLine       = 16 << 10         // bytes of a line; the rest of it is left out
	maxForeign    = 200              // lines of others in foreignWindow; more are only counted
	foreignWindow = 10 * time.Minute // a library may complain about each row
)

// runnerLog takes a runner's standard error. It passes on lines of JSON and makes others lines of the front's log. One
// goroutine of the process's exec.Cmd writes to it.
type runnerLog struct {
	out  io.Writer
	log  *zap.Logger
	line []byte // that has not ended

	since         time.Time // when the window began
	foreign, more int       // lines of others in it: logged, and left out
}

// Write is part of io.Writer. It never fails, so that the runner is always read.
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

// pass hands on the line that has ended.
func (l *runnerLog) pass() {
	line := l.line
	l.line = l.line[:0]
	switch {
	case len(bytes.TrimSpace(line)) == 0:
		return
	case line[0] == '{' && json.Valid(line):
		_, _ = l.out.Write(append(line, '\n')) // nobody reads the log any more
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

// close passes on what was written last. It is called when the process has ended.
func (l *runnerLog) close() {
	if len(l.line) > 0 {
		l.pass()
	}
	l.tell()
}

// Interface guards.
var _ io.Writer = (*runnerLog)(nil)
