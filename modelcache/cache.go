// The pool: one load of a model for all who ask, from a queued slot to a runner that is ready.

package modelcache

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/gpu"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// Options are what a Cache needs.
type Options struct {
	Repository  *repository.Repository // where models come from
	Profiles    *tuning.Profiles       // what was measured of them
	Folder      string                 // the front's folder, in which runners make their sockets
	Runners     Starter                // starts them
	Build       string                 // of the front; a runner of another build is refused
	Server      string                 // name under which runners answer
	Cores       int                    // threads of a runner's pools; 0 leaves it to TensorFlow
	Memory      int64                  // bytes of the host for all runners together; 0 is no bound
	Devices     *gpu.Inventory         // nil is none
	CPUFallback bool                   // the processor stands in where no device has room, or the one asked for is gone
	LogLevel    string                 // of runners
	// Bounds on a picture that a runner decodes: pixels, and bytes of its file.
	MaxImagePixels, MaxImageBytes int64
	KeepAlive                     time.Duration // how long a runner stays without a stream; 0 is for ever
	PollInterval                  time.Duration // how often a newer version of a model in use is looked for; 0 is never
	// bound on waiting for memory, and on starting a runner and loading its model
	LoadTimeout time.Duration
	Log         *zap.Logger
}

// Cache keeps runners: at most one for each model version on each device.
type Cache struct {
	options Options
	ctx     context.Context // ends when the Cache closes
	stop    context.CancelFunc
	working sync.WaitGroup // loads, unloads, pushes, and the goroutines that look after all this

	mu      sync.Mutex // guards the fields below, and those of slots, claims and healths
	slots   []*slot    // in memory or on their way there; one that is evicted leaves at once
	memory  budget
	healths map[string]*health  // by folder
	serving map[string]*serving // by reference: which version "latest" is
	counts  control.Counts      // of all runners, those that have ended included
}

// tick is how often the Cache looks after its runners: measures them, and ends those that nobody uses.
const tick = 500 * time.Millisecond

// New returns a cache without a model in memory.
func New(options Options) *Cache {
	ctx, stop := context.WithCancel(context.Background())
	c := &Cache{
		options: options, ctx: ctx, stop: stop,
		memory:  budget{total: options.Memory, changed: make(chan struct{})},
		healths: map[string]*health{},
		serving: map[string]*serving{},
	}
	if c.options.Devices == nil {
		c.options.Devices = &gpu.Inventory{}
	}
	if options.Repository != nil {
		options.Repository.ReserveWith(c.reserve)
	}
	c.working.Go(c.tend)
	c.working.Go(func() { c.options.Devices.Watch(ctx, c.drain) })
	return c
}

// Ready returns a runner that has the model loaded on a device, and starts one if there is none. device is as
// in a descriptor. Concurrent callers share one load, which goes on if a caller leaves.
//
// Faults: those of the load; Precondition for a model in quarantine; Exhausted where it does not fit
// into memory; Unavailable when the cache closes.
func (c *Cache) Ready(ctx context.Context, model repository.Model, device string) (*Runner, error) {
	for {
		s, err := c.slotOf(model, device)
		if err != nil {
			return nil, err
		}
		select {
		case <-s.loaded:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if s.callers--; s.callers == 0 {
			s.leave()
		}
		runner, err := s.runner, s.err
		c.mu.Unlock()
		switch {
		case errors.Is(err, context.Canceled) && ctx.Err() == nil:
			continue // the load was given up for want of callers when this one came
		case err != nil:
			return nil, err
		case ctx.Err() != nil: // the caller has left, perhaps before it was loaded
			return nil, ctx.Err()
		case runner.Alive():
			return runner, nil
		}
		c.forget(s)
	}
}

// slotOf returns the model's slot, and begins its load if it has none. The caller counts as one of its callers.
func (c *Cache) slotOf(model repository.Model, device string) (*slot, error) {
	target, err := c.targetOf(model, device)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, repository.ErrClosing
	}
	s := c.slotLocked(model, target)
	if s == nil {
		if err := c.healthLocked(model).refuses(model, time.Now()); err != nil {
			return nil, err
		}
		s = &slot{model: model, target: target, state: StateQueued, used: time.Now(), loaded: make(chan struct{})}
		s.waiting, s.leave = context.WithCancel(c.ctx)
		c.slots = append(c.slots, s)
		c.working.Go(func() { c.load(s) })
	}
	s.callers++
	s.superseded = false // somebody wants this very version
	return s, nil
}

// slotLocked returns the slot of a model on a target.
func (c *Cache) slotLocked(model repository.Model, target target) *slot {
	for _, s := range c.slots {
		if s.model.Dir == model.Dir && target.matches(s) {
			return s
		}
	}
	return nil
}

// load takes a slot from queued to ready or failed.
func (c *Cache) load(s *slot) {
	started := time.Now()
	runner, err := c.start(s)
	switch {
	case err == nil:
		c.options.Log.Info("model ready", zap.String("model", s.model.Ref), zap.String("version", s.model.Version),
			zap.Int("runner", runner.PID()), zap.Duration("load_time", time.Since(started)))
	case c.ctx.Err() != nil:
		err = repository.ErrClosing
	case errors.Is(err, context.DeadlineExceeded):
		err = fault.New(fault.Deadline, "model %s: not loaded within %s (load-timeout)", s.model.Ref,
			c.options.LoadTimeout)
	}
	if err != nil {
		var refused *loadError
		if errors.As(err, &refused) {
			err = refused.error
		}
		if errors.Is(err, context.Canceled) {
			c.options.Log.Info("model not loaded", zap.String("model", s.model.Ref),
				zap.String("version", s.model.Version), zap.String("why", "nobody waits for it any more"))
		} else {
			c.options.Log.Warn("model failed", zap.String("model", s.model.Ref), zap.String("version", s.model.Version),
				zap.Error(err))
		}
	}
	c.mu.Lock()
	s.runner, s.err, s.used = runner, err, time.Now()
	if err == nil {
		s.state = StateReady
		if d := s.claim.placement.Device(); d.UUID != "" && !d.Healthy { // drained meanwhile
			c.endLocked(s, outOfService+d.Reason, &c.working)
		}
	} else {
		c.forgetLocked(s) // the next caller tries again
	}
	c.mu.Unlock()
	close(s.loaded)
}

// start waits for memory and runs a runner process until it is ready. Where the device turns out to have no
// memory for the model, others that nobody uses make room and it is tried once more.
func (c *Cache) start(s *slot) (*Runner, error) {
	if err := c.backOff(s); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.waiting, c.options.LoadTimeout)
	digest, err := c.options.Repository.Digest(ctx, s.model)
	cancel()
	if err != nil {
		return nil, err
	}
	known := c.options.Profiles.Read(digest)
	c.mu.Lock()
	s.digest, s.profile = digest, known
	c.mu.Unlock()
	want := newClaim(s.model, s.profile)
	want.target = s.target
	want.need = deviceNeed(s.model, s.profile, s.target.devices)
	runner, err := c.startWith(s, want)
	var refused *loadError
	if !errors.As(err, &refused) || !refused.noMemory {
		return runner, err
	}
	c.pressed(s)
	c.mu.Lock()
	s.state, s.claim, s.uuid = StateQueued, nil, ""
	c.mu.Unlock()
	again := newClaim(s.model, s.profile)
	again.target, again.need = s.target, want.need // was too little, unless it is all that there is
	if more := want.need + want.need/2; more < want.placement.Device().Memory {
		again.need = more
	}
	return c.startWith(s, again)
}

// startWith runs a runner process once its claim is granted.
func (c *Cache) startWith(s *slot, want *claim) (*Runner, error) {
	if err := c.admit(want, func() bool { return s.callers > 0 }); err != nil {
		return nil, err
	}
	release := func() {}
	gone := func() {
		if err := want.placement.Release(c.ctx); err != nil {
			c.options.Log.Warn("device memory", zap.String("model", s.model.Ref), zap.Error(err))
		}
		c.give(want)
		release()
	}
	setup, tuned, err := c.setupOf(s.model, s.profile, want.placement)
	if err == nil {
		var hold func() // before the files are read, until the process is gone
		if hold, err = c.options.Repository.Hold(c.ctx, repository.Model{Ref: s.model.Ref,
			Dir: setup.Dir}); err == nil {
			release = hold
		}
	}
	if err != nil {
		gone()
		return nil, err
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.options.LoadTimeout)
	defer cancel()
	c.mu.Lock()
	s.state, s.claim, s.uuid, s.fellBack = StateLoading, want, want.placement.Device().UUID, want.fellBack
	c.mu.Unlock()
	runner, err := start(ctx, c.options, setup, tuned, want.placement.Env(), events{
		warming:  func() { c.setState(s, StateWarming) },
		moved:    c.wake,
		counted:  c.counted,
		pressed:  func() { c.pressed(s) },
		shrunk:   func(rows int) { c.shrunk(s, rows) },
		answered: func() { c.healthOf(s.model, (*health).answered) },
		ended: func(end end) {
			c.ended(s, end)
			gone()
		},
	})
	if err != nil {
		return nil, c.failed(s, err)
	}
	c.measureDevice(s, runner.PID())
	c.mu.Lock()
	want.need = cmp.Or(max(want.deviceBytes, s.profile.DeviceBytes[want.placement.Device().Name],
		int64(s.model.Settings.DeviceMemory)), want.need)
	c.mu.Unlock()
	want.placement.Settle(want.need)
	c.healthOf(s.model, (*health).loaded)
	return runner, nil
}

// setupOf says how a runner of the model is to run: as its settings say, else as was found by tuning, else
// with the defaults. It returns what goes into the runner's environment besides.
func (c *Cache) setupOf(model repository.Model, known tuning.Profile, placement *gpu.Placement) (
	control.Setup, []string, error,
) {
	libraries, err := c.options.Repository.AllowedLibraries(model)
	if err != nil {
		return control.Setup{}, nil, err
	}
	cores := c.options.Cores
	if own := model.Settings.Cores; own > 0 {
		cores = min(own, max(cores, 1))
	}
	setup := control.Setup{
		Model: model.Ref, Dir: model.Dir, Server: c.options.Server, LogLevel: c.options.LogLevel,
		Cores: cores, Batching: model.Settings.Batching, OpLibraries: libraries,
		WarmUp:         model.Settings.WarmUp != repository.WarmUpOff,
		MaxImagePixels: c.options.MaxImagePixels, MaxImageBytes: c.options.MaxImageBytes,
		Device: placement.Device().UUID, DeviceBytes: int64(model.Settings.DeviceMemory),
	}
	var tuned []string
	if setup.Device == "" {
		if choice, ok := known.Tuned[tuning.Machine()]; ok {
			tuned = c.apply(choice, &setup)
		}
	} else if most := known.DeviceBatch[placement.Device().Name]; most > 0 {
		setup.Batching = setup.Batching.UpTo(most)
	}
	return setup, tuned, nil
}

// apply puts a tuned choice into a setup. What the model's settings say goes over it.
func (c *Cache) apply(choice protocol.Choice, setup *control.Setup) []string {
	setup.Cores = min(cmp.Or(choice.Cores, setup.Cores), max(setup.Cores, 1))
	setup.Batching.NumBatchThreads = cmp.Or(setup.Batching.NumBatchThreads, choice.BatchThreads)
	setup.Batching.MaxBatchSize = cmp.Or(setup.Batching.MaxBatchSize, choice.BatchSize)
	if choice.Frozen != "" && c.options.Repository.Known(choice.Frozen) {
		setup.Dir = c.options.Repository.Place(choice.Frozen)
	}
	return tuning.Environment(choice)
}

// failed remembers of a load that failed what is the model's fault.
func (c *Cache) failed(s *slot, err error) error {
	var refused *loadError
	if errors.As(err, &refused) && !refused.noMemory || errors.Is(err, context.DeadlineExceeded) {
		c.healthOf(s.model, func(h *health) { h.failed(time.Now(), err.Error()) })
	}
	return err
}

func (c *Cache) setState(s *slot, state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.state = state
}

// tend looks after the runners until the Cache closes.
func (c *Cache) tend() {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	polled := time.Now()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-ticker.C:
		}
		c.measure()
		c.endIdle(time.Now())
		c.forgetOld(time.Now())
		if c.options.PollInterval > 0 && time.Since(polled) >= c.options.PollInterval {
			c.poll()
			polled = time.Now()
		}
	}
}

// Loaded returns the live runner of a model, without loading anything.
func (c *Cache) Loaded(model repository.Model, device string) (*Runner, bool) {
	target, err := c.targetOf(model, device)
	if err != nil {
		return nil, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slotLocked(model, target)
	if s == nil || s.runner == nil || !s.runner.Alive() {
		return nil, false
	}
	return s.runner, true
}

// Memory returns how the host's memory stands.
func (c *Cache) Memory() protocol.Memory {
	c.mu.Lock()
	defer c.mu.Unlock()
	return protocol.Memory{Budget: c.memory.total, Reserved: c.memory.held()}
}

// Busy reports whether a model is loading, has an open stream, or an unexpired lease.
func (c *Cache) Busy() bool {
	for _, model := range c.Status() {
		switch model.State {
		case StateQueued, StateLoading, StateWarming:
			return true
		}
		if model.Streams > 0 || model.Leases > 0 {
			return true
		}
	}
	return false
}

// Streams returns how many streams are open at runners.
func (c *Cache) Streams() int {
	n := 0
	for _, model := range c.Status() {
		n += model.Streams
	}
	return n
}

// Close ends all loads and runners and waits until their processes are gone.
func (c *Cache) Close() {
	c.mu.Lock()
	c.stop()
	c.mu.Unlock()
	c.working.Wait() // loads end with c.ctx
	var ending sync.WaitGroup
	c.mu.Lock()
	for _, s := range slices.Clone(c.slots) {
		if s.runner != nil {
			ending.Go(s.runner.Close)
		}
	}
	c.mu.Unlock()
	ending.Wait()
}
