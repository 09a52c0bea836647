package modelcache

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"time"

	"flightsvc/gpu"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// Measure runs one more runner of a model, which measures what it is asked to with a choice in place of the model's
// own, and ends. It waits for memory, as a load does. The process is gone when it returns.
func (c *Cache) Measure(ctx context.Context, model repository.Model, choice protocol.Choice, what control.Measurement) (control.Report, error) {
	digest, err := c.options.Repository.Digest(ctx, model)
	if err != nil {
		return control.Report{}, err
	}
	release, err := c.borrow(ctx, model, digest)
	if err != nil {
		return control.Report{}, err
	}
	defer release()
	setup := control.Setup{
		Model: model.Ref, Dir: model.Dir, Server: c.options.Server, LogLevel: c.options.LogLevel,
		Cores: choice.Cores, Batching: control.Batching{NumBatchThreads: choice.BatchThreads},
		MaxImagePixels: c.options.MaxImagePixels, MaxImageBytes: c.options.MaxImageBytes,
		Measure: &what,
	}
	if choice.Frozen != "" {
		setup.Dir = c.options.Repository.Place(choice.Frozen)
	}
	if setup.OpLibraries, err = c.options.Repository.AllowedLibraries(model); err != nil {
		return control.Report{}, err
	}
	unhold, err := c.options.Repository.Hold(ctx, repository.Model{Ref: model.Ref, Dir: setup.Dir})
	if err != nil {
		return control.Report{}, err
	}
	defer unhold()
	library, err := c.options.Library(ctx)
	if err != nil {
		return control.Report{}, fault.New(fault.Precondition, "model %s: %w", model.Ref, err)
	}
	var processor *gpu.Placement // it is what is tuned
	return runToEnd(ctx, c.options, setup, append(runnerEnv(os.Environ(), library, nil, processor.Env()), tuning.Environment(choice)...))
}

// InMemory returns the models that are ready.
func (c *Cache) InMemory() (models []repository.Model) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slots {
		if s.state == StateReady && !s.superseded && s.model.Dir != "" {
			models = append(models, s.model)
		}
	}
	return models
}

// runToEnd starts a runner that ends by itself and returns its report.
func runToEnd(ctx context.Context, options Options, setup control.Setup, env []string) (control.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, options.LoadTimeout+5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, options.Binary) //nolint:gosec // the binary lies beside our own
	cmd.Env, cmd.Stderr = env, os.Stderr
	cmd.WaitDelay = runnerGrace
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return control.Report{}, err
	}
	defer func() { _ = stdin.Close() }() // its end would end the runner
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return control.Report{}, err
	}
	line, err := json.Marshal(setup)
	if err != nil {
		return control.Report{}, err
	}
	if err := cmd.Start(); err != nil {
		return control.Report{}, fault.New(fault.Precondition, "model %s: start %s: %w", setup.Model, options.Binary, err)
	}
	_, _ = stdin.Write(append(line, '\n')) // a runner that is gone says nothing, which is an error below
	var last control.Report
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		var report control.Report
		if json.Unmarshal(lines.Bytes(), &report) == nil && (report.Measured != nil || report.Error != "") {
			last = report
		}
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return last, ctx.Err()
	case last.Error != "":
		return last, fault.New(last.Kind, "%s", last.Error)
	case last.Measured == nil:
		return last, fault.New(fault.Internal, "model %s: its runner ended while it was measured (%v); the log has what it said", setup.Model, err)
	case last.Build != options.Build:
		return last, fault.New(fault.Precondition, "flightsvc-runner is build %s, flightsvc is build %s; install both from one release", last.Build, options.Build)
	}
	return last, nil
}

// Interface guards.
var _ tuning.Pool = (*Cache)(nil)
