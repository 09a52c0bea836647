// The front that a command asks: the one at --endpoint, or this user's own, which is started if necessary.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"flightsvc/internal/client"
	"flightsvc/internal/protocol"
	"flightsvc/internal/rundir"
)

// userFolder is the folder, below the run-dir, of the front that all commands of this user share with Python's
// connect().
const userFolder = "user"

// readyTimeout bounds a front's answer to the action server.ready; endTimeout bounds the end of a front that did not
// answer it.
const (
	readyTimeout = 5 * time.Second
	endTimeout   = 15 * time.Second
)

// frontFlags say which front a command talks to.
type frontFlags struct {
	Endpoint string `env:"FLIGHTSVC_ENDPOINT" placeholder:"grpc+unix:///PATH" help:"${endpoint_help}"`
	RunDir   string `env:"FLIGHTSVC_RUN_DIR" placeholder:"DIR" help:"${run_dir_help}"`
}

// errNone means that this user's front does not run.
type errNone struct{ folder string }

func (e errNone) Error() string {
	return fmt.Sprintf("no flightsvc of yours runs (%s); flightsvc models, load, devices, predict and tune start one, "+
		"--endpoint asks another", e.folder)
}

// running returns a client of the front; it is an error if the front does not run.
func (f frontFlags) running(ctx context.Context) (*client.Client, error) {
	if f.Endpoint != "" {
		return client.Dial(f.Endpoint)
	}
	runDir, err := f.runDir()
	if err != nil {
		return nil, err
	}
	folder := filepath.Join(runDir, userFolder)
	front, err := answering(ctx, folder)
	if err != nil {
		return nil, errNone{folder}
	}
	return front, nil
}

// started returns a client of the front, and starts this user's own if it does not run.
func (f frontFlags) started(ctx context.Context, config string) (*client.Client, error) {
	if f.Endpoint != "" {
		return client.Dial(f.Endpoint)
	}
	runDir, err := f.runDir()
	if err != nil {
		return nil, err
	}
	for {
		var front *client.Client
		var ending rundir.Process
		err := rundir.Starting(runDir, userFolder, func(folder string) (err error) {
			if front, err = answering(ctx, folder); err == nil {
				return nil
			}
			var occupied bool
			if ending, occupied = rundir.Occupant(folder); occupied {
				return nil
			}
			endpoint, err := startFront(ctx, runDir, folder, config)
			if err != nil {
				return err
			}
			front, err = client.Dial(endpoint)
			return err
		})
		if err != nil || front != nil {
			return front, err
		}
		if err := awaitEnd(ctx, ending); err != nil { // without the folder's lock, which the front takes to end
			return nil, err
		}
	}
}

func (f frontFlags) runDir() (string, error) {
	return filepath.Abs(cmp.Or(f.RunDir, rundir.Default()))
}

// answering returns a client of the front whose socket is in folder, or an error if it takes no requests.
func answering(ctx context.Context, folder string) (*client.Client, error) {
	front, err := client.Dial(protocol.Scheme + filepath.Join(folder, frontSocket))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if _, err := client.Ask[protocol.Ready](ctx, front, "server.ready", struct{}{}); err != nil {
		_ = front.Close()
		return nil, err
	}
	return front, nil
}

// startFront starts a detached front and returns its endpoint. The front takes its settings from the environment and
// the configuration file.
func startFront(ctx context.Context, runDir, folder, config string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	args := []string{"serve", "--detach", "--endpoint", protocol.Scheme + filepath.Join(folder, frontSocket),
		"--run-dir", runDir}
	if config != "" {
		if config, err = filepath.Abs(config); err != nil {
			return "", err
		}
		args = append([]string{"--config", config}, args...)
	}
	out, err := exec.CommandContext(ctx, self, args...).Output() //nolint:gosec // this program
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		said := strings.TrimPrefix(strings.TrimSpace(string(failed.Stderr)), "flightsvc: ")
		return "", fmt.Errorf("no front could be started: %s", strings.TrimPrefix(said, "error: "))
	}
	if err != nil {
		return "", err
	}
	var greeting hello
	if err := json.Unmarshal(out, &greeting); err != nil {
		return "", fmt.Errorf("the front started but its handshake cannot be read: %w", err)
	}
	return greeting.Endpoint, nil
}

// awaitEnd waits until a front that does not answer has ended.
func awaitEnd(ctx context.Context, front rundir.Process) error {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan struct{})
	if front.Watch(watching, -1, func() { close(ended) }) != nil {
		return nil // it has ended already
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(endTimeout):
		return fmt.Errorf("your flightsvc, process %d, neither answers nor ends; see its log; to start another one: "+
			"kill -9 %d", front.PID, front.PID)
	}
}

// reference returns a model as a front understands it. A path becomes a file URI, since the front may have another
// working folder: text with a slash, or that names a folder here. URIs, digests and other names stay as they are. The
// Python package follows the same rule.
func reference(model string) (string, error) {
	if strings.Contains(model, "://") || strings.HasPrefix(model, "sha256:") || model == "image" {
		return model, nil
	}
	info, err := os.Stat(model)
	if !strings.Contains(model, "/") && (err != nil || !info.IsDir()) {
		return model, nil
	}
	path, err := filepath.Abs(model)
	if err != nil {
		return "", err
	}
	return (&url.URL{Scheme: "file", Path: path}).String(), nil
}
