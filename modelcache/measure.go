// Measuring: one more runner of a model, which reports how fast it is and ends.

package modelcache

import (
	"context"
	"time"

	"flightsvc/gpu"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// Measure starts one more runner of a model, configured by choice instead of the model's own configuration, and returns
// what it has measured. It waits for memory, as a load does. When it returns, the process has ended.
func (c *Cache) Measure(
	ctx context.Context, model repository.Model, choice protocol.Choice, what control.Measurement,
) (control.Report, error) {
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
		Cores: c.options.Cores, Threads: choice.Cores,
		Batching:       control.Batching{NumBatchThreads: choice.BatchThreads},
		MaxImagePixels: c.options.MaxImagePixels, MaxImageBytes: c.options.MaxImageBytes,
		Measure: &what,
	}
	if choice.Frozen != "" {
		setup.Dir = c.options.Repository.Place(choice.Frozen)
	}
	if setup.OpLibraries, err = c.options.Repository.AllowedLibraries(model); err != nil {
		return control.Report{}, err
	}
	unhold, err := c.hold(ctx, model, setup.Dir)
	if err != nil {
		return control.Report{}, err
	}
	defer unhold()
	var cpu *gpu.Placement // nil is the CPU: models are tuned only for that
	return c.runToEnd(ctx, setup, append(cpu.Env(), tuning.Environment(choice)...))
}

// measureTime bounds a measurement; load-timeout is added for the load before it.
const measureTime = 5 * time.Minute

// runToEnd starts a runner that ends by itself, and returns its last report. When ctx ends, the runner is killed.
func (c *Cache) runToEnd(ctx context.Context, setup control.Setup, fixed []string) (last control.Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.options.LoadTimeout+measureTime)
	defer cancel()
	process, err := c.options.Runners.Start(ctx, setup, nil, fixed)
	if err != nil {
		return last, err
	}
	defer context.AfterFunc(ctx, process.Kill)()
	for {
		report, err := process.Report()
		if err != nil {
			break
		}
		if report.Measured != nil || report.Error != "" {
			last = report
		}
	}
	how := process.Wait()
	switch {
	case ctx.Err() != nil:
		return last, ctx.Err()
	case last.Error != "":
		return last, fault.New(last.Kind, "%s", last.Error)
	case last.Measured == nil:
		return last, fault.New(fault.Internal, "model %s: its runner ended while it was measured (%s); the log has "+
			"what it said", setup.Model, how)
	case last.Build != c.options.Build:
		return last, fault.New(fault.Precondition, "flightsvc-runner is build %s, flightsvc is build %s; install "+
			"both from one release", last.Build, c.options.Build)
	}
	return last, nil
}

// InMemory returns the models that are ready, without the built-in one and superseded versions.
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

// Interface guards.
var _ tuning.Pool = (*Cache)(nil)
