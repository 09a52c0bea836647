package tuning

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// notFrozen is the reason why a model's variables cannot be made constants.
type notFrozen string

func (n notFrozen) Error() string { return string(n) }

// freeze makes constants of the model's variables, with Python, keeps the resulting SavedModel in the repository and
// returns its digest. Its error is a notFrozen if the model is the reason, any other if this host is.
func (s *search) freeze(ctx context.Context) (digest string, err error) {
	options := s.t.options
	if options.Python == nil {
		return "", errors.New("this server has no Python to freeze it with")
	}
	python, err := options.Python(ctx, s.library)
	if err != nil {
		return "", err
	}
	return options.Repository.Add(ctx, s.model.Ref, func(folder string) error {
		return s.freezeInto(ctx, python, folder)
	})
}

func (s *search) freezeInto(ctx context.Context, python, folder string) error {
	args := []string{"-m", "flightsvc", "freeze", s.model.Dir, folder}
	for _, name := range s.model.Saved.Names() {
		if s.model.Saved.Signatures[name].Assigns == "" {
			args = append(args, "--signature", name)
		}
	}
	cmd := exec.CommandContext(ctx, python, args...) //nolint:gosec // the user's own interpreter
	cmd.WaitDelay = freezerGrace
	var said, cause strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &cause
	err := cmd.Run()
	var told struct {
		Frozen bool   `json:"frozen"`
		Reason string `json:"reason"`
	}
	switch {
	case json.Unmarshal([]byte(lastLine(said.String())), &told) != nil:
		return fmt.Errorf("freezing failed (%w): %s", cmp.Or(err, io.ErrUnexpectedEOF), lastLine(cause.String()))
	case !told.Frozen:
		return notFrozen(told.Reason)
	}
	return nil
}

// freezerGrace is how long child processes of Python may keep its pipes open after Python has ended.
const freezerGrace = 2 * time.Second

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
