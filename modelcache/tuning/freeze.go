// Freezing: Python makes a frozen and folded SavedModel of a model.

package tuning

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"flightsvc/internal/config"
	"flightsvc/modelcache/repository"
)

// notFrozen is the reason why a model's variables cannot be made constants.
type notFrozen string

func (n notFrozen) Error() string { return string(n) }

// ended says by what signal Python was ended, which need not happen again.
type ended string

func (e ended) Error() string { return "Python was ended while it froze the model (" + string(e) + ")" }

// freeze makes constants of the model's variables and folds its graph, with Python, keeps the resulting SavedModel in
// the repository and returns its digest. Its error is a notFrozen if the model is the reason, any other if this host
// is. With most above 0 it works in the background: other processes have precedence, and it ends when Python uses more
// bytes than that.
func (t *Tuner) freeze(ctx context.Context, model repository.Model, library string, most int64) (string, error) {
	if t.options.Python == nil {
		return "", errors.New("this server has no Python to freeze it with")
	}
	python, err := t.options.Python(ctx, library)
	if err != nil {
		return "", err
	}
	return t.options.Repository.Add(ctx, model.Ref, func(folder string) error {
		return t.freezeInto(ctx, python, model, folder, most)
	})
}

func (t *Tuner) freezeInto(
	ctx context.Context, python string, model repository.Model, folder string, most int64,
) error {
	args := []string{"-m", "flightsvc", "freeze", model.Dir, folder}
	for _, name := range model.Saved.Names() {
		if model.Saved.Signatures[name].Assigns == "" {
			args = append(args, "--signature", name)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, python, args...) //nolint:gosec // the user's own interpreter
	cmd.WaitDelay = freezerGrace
	// If this process is killed, Python is, too: the signal comes when the thread that has started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said, cause strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &cause
	if err := cmd.Start(); err != nil {
		return err
	}
	if most > 0 {
		_ = unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, niceness) // Python has no other threads yet
		go t.bound(ctx, cmd.Process.Pid, most, cancel)
	}
	err := cmd.Wait()
	var told struct {
		Frozen    bool   `json:"frozen"`
		Reason    string `json:"reason"`
		NotFolded string `json:"not_folded"`
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case cmd.ProcessState != nil && cmd.ProcessState.ExitCode() < 0:
		return ended(cmd.ProcessState.String())
	case json.Unmarshal([]byte(lastLine(said.String())), &told) != nil:
		return fmt.Errorf("freezing failed (%w): %s", cmp.Or(err, io.ErrUnexpectedEOF), lastLine(cause.String()))
	case !told.Frozen:
		return notFrozen(told.Reason)
	case told.NotFolded != "":
		return notFrozen(fmt.Sprintf("it has an operation with a state (%s)", told.NotFolded))
	}
	return nil
}

// niceness is that of a process beside which models are served: it gets a tenth of a processor that they
// want, so it ends within a few jobs of a cluster that is never idle, and its first job is not slower.
const niceness = 10

// bound cancels when a process uses more memory of its own than most, and returns when ctx ends.
func (t *Tuner) bound(ctx context.Context, pid int, most int64, cancel context.CancelCauseFunc) {
	ticker := time.NewTicker(boundTick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if bytes, err := t.options.OwnMemory(pid); err == nil && bytes > most {
			cancel(notFrozen(fmt.Sprintf("freezing it needs more than %s of memory", config.Bytes(most))))
			return
		}
	}
}

// boundTick is how often the memory of a process that freezes is measured.
const boundTick = 100 * time.Millisecond

// freezerGrace is how long child processes of Python may keep its pipes open after Python has ended.
const freezerGrace = 2 * time.Second

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
