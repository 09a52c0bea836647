// The pool: all callers of a model share one load, which takes a slot from queued to a ready runner.

package modelcache

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/gpu"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/rundir"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// Options are what a Cache needs.
type Options struct {
	Repository  *repository.Repository // finds models and keeps their files
	Profiles    *tuning.Profiles       // what was measured of models
	Folder      string                 // the front's folder, where runners create their sockets
	Runners     Starter                // starts runner processes
	Build       string                 // of the front; a runner of another build is refused
	Server      string                 // name that runners give in their answers
	Cores       int                    // that a runner may use
	Memory      int64                  // bytes of the host for all runners together; 0 is no bound
	Devices     *gpu.Inventory         // nil means none
	CPUFallback bool                   // a model may run on the CPU where no device has room, or its device is gone
	LogLevel    string                 // of runners
	// Bounds on a picture that a runner decodes: pixels, and bytes of its file.
	MaxImagePixels, MaxImageBytes int64
	KeepAlive                     time.Duration // how long a runner without streams is kept; 0 is for ever
	PollInterval                  time.Duration // how often newer versions of models in use are looked for; 0 is never
	// bounds the wait for memory, and then the start of a runner that loads its model
	LoadTimeout time.Duration
	Fold        bool // runners keep a run of real rows, so that a folded form can be compared
	Log         *zap.Logger
}

// Cache keeps runners: at most one for each model version on each device.
type Cache struct {
	options Options
	ctx     context.Context // ends when the Cache closes
	stop    context.CancelFunc
	working sync.WaitGroup // loads, ends of runners, and the goroutines that New starts

	mu      sync.Mutex // guards the fields below, and those of slots, claims and healths
	slots   []*slot    // in memory or being loaded; a runner that is to end leaves the list at once
	memory  budget
	healths map[string]*health  // by folder
	serving map[string]*serving // by reference: the version that "latest" means
	counts  control.Counts      // of all runners, ended ones included
}

// tick is how often the Cache measures its runners and ends unused ones.
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

// Ready returns a runner that has the model loaded on a device, and starts one if there is none. device is written as
// in a descriptor. Concurrent callers share one load. It goes on when a caller leaves; only a load that still waits for
// memory is dropped when all of them have left.
//
// Faults: those of the load; Precondition for a model in quarantine; Exhausted for one that does not fit into memory;
// Unavailable when the cache closes.
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
			continue // it was dropped because all earlier callers had left, just when this one came
		case err != nil:
			return nil, err
		case ctx.Err() != nil: // the caller has left, perhaps before the load ended
			return nil, ctx.Err()
		case runner.Alive():
			return runner, nil
		}
		c.forget(s)
	}
}

// slotOf returns the slot of a model on a device and counts the caller among its callers. If there is no slot, it makes
// one and begins the load.
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
	s.superseded = false // a caller wants this version, so it is kept like any other
	return s, nil
}

// slotLocked returns the slot of a model on a target, nil if there is none.
func (c *Cache) slotLocked(model repository.Model, target target) *slot {
	for _, s := range c.slots {
		if s.model.Dir == model.Dir && !s.replaced && target.matches(s) {
			return s
		}
	}
	return nil
}

// load makes a slot ready, or forgets it if its load fails.
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
		err = fault.New(fault.Deadline, "model %s: not loaded within %s (load-timeout)",
			s.model.Ref, c.options.LoadTimeout)
	}
	if err != nil {
		if errors.Is(err, context.Canceled) {
			c.options.Log.Info("model not loaded", zap.String("model", s.model.Ref),
				zap.String("version", s.model.Version), zap.String("why", "nobody waits for it any more"))
		} else {
			c.options.Log.Warn("model failed", zap.String("model", s.model.Ref),
				zap.String("version", s.model.Version), zap.Error(err))
		}
	}
	c.mu.Lock()
	s.runner, s.err, s.used = runner, err, time.Now()
	if err == nil {
		s.state = StateReady
		if d := s.claim.placement.Device(); d.UUID != "" && !d.Healthy { // the device was drained during the load
			c.endLocked(s, outOfService+d.Reason, &c.working)
		}
	} else {
		c.forgetLocked(s) // the next caller tries again
	}
	c.mu.Unlock()
	close(s.loaded)
}

// start waits for memory, starts a runner and waits until it is ready. If the device then turns out to have too little
// memory for the model, unused runners on it are ended, and the load is tried once more.
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
	wanted := func() bool { return s.callers > 0 }
	runner, err := c.startWith(c.ctx, s, want, wanted)
	var refused *loadError
	if !errors.As(err, &refused) || !refused.noMemory {
		return runner, err
	}
	c.pressed(s)
	c.mu.Lock()
	s.state, s.claim, s.uuid = StateQueued, nil, ""
	c.mu.Unlock()
	again := newClaim(s.model, s.profile)
	again.target, again.need = s.target, want.need
	// want.need was too little: half as much again, unless the device is smaller
	if more := want.need + want.need/2; more < want.placement.Device().Memory {
		again.need = more
	}
	return c.startWith(c.ctx, s, again, wanted)
}

// startWith waits until the claim is granted, starts a runner and waits until it is ready. The claim's memory is given
// back when the process has ended. When wanted, which is called with mu locked, returns false, the wait ends; when ctx
// ends, so does the start.
func (c *Cache) startWith(ctx context.Context, s *slot, want *claim, wanted func() bool) (*Runner, error) {
	if err := c.admit(want, wanted); err != nil {
		return nil, err
	}
	release := func() {}
	gone := func() {
		if s.sample != "" {
			kept, _ := filepath.Glob(s.sample + "*") // fails only for a malformed pattern
			for _, path := range kept {
				_ = os.Remove(path)
			}
		}
		if err := want.placement.Release(c.ctx); err != nil {
			c.options.Log.Warn("device memory", zap.String("model", s.model.Ref), zap.Error(err))
		}
		c.give(want)
		release()
	}
	setup, tuned, err := c.setupOf(s.model, s.profile, want.placement)
	if err == nil {
		release, err = c.hold(c.ctx, s.model, setup.Dir) // from before the files are read until the process has ended
	}
	if err != nil {
		gone()
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.options.LoadTimeout)
	defer cancel()
	setup.Replay = s.replay
	c.mu.Lock()
	s.state, s.claim, s.uuid, s.fellBack = StateLoading, want, want.placement.Device().UUID, want.fellBack
	s.form = setup.Form
	if c.canFoldLocked(s) {
		setup.Sample = filepath.Join(c.options.Folder, rundir.Sample+rand.Text()[:8])
		s.sample = setup.Sample
	}
	setup.RoomForTwo = c.memory.roomForLocked(want.bytes)
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

// hold keeps the files of a model, and those that are loaded in their place, from being removed until release is
// called.
func (c *Cache) hold(ctx context.Context, model repository.Model, loaded string) (release func(), err error) {
	var holds []func()
	release = func() {
		for _, one := range holds {
			one()
		}
	}
	for _, dir := range slices.Compact([]string{model.Dir, loaded}) {
		one, err := c.options.Repository.Hold(ctx, repository.Model{Ref: model.Ref, Dir: dir})
		if err != nil {
			release()
			return func() {}, err
		}
		holds = append(holds, one)
	}
	return release, nil
}

// setupOf returns how a runner of the model is to run: as the model's settings say, else as tuning has found, else with
// the defaults. The strings are variables for the runner's environment, which tuning has chosen.
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
	folded := ""
	if setup.Device == "" {
		folded = known.Folded
		if choice, ok := known.Tuned[tuning.Machine()]; ok {
			folded, tuned = choice.Frozen, apply(choice, &setup)
		}
	} else if most := known.DeviceBatch[placement.Device().Name]; most > 0 {
		setup.Batching = setup.Batching.UpTo(most)
	}
	setup.Form = protocol.FormSaved
	switch {
	case model.Saved != nil && model.Saved.Folded:
		setup.Form = protocol.FormFolded
	case folded != "" && model.Settings.Form != repository.FormSaved && c.options.Repository.Known(folded):
		setup.Dir, setup.Form = c.options.Repository.Place(folded), protocol.FormFolded
	}
	return setup, tuned, nil
}

// apply puts a tuned choice into a setup, where the model's settings leave it open, and returns the variables for the
// runner's environment.
func apply(choice protocol.Choice, setup *control.Setup) []string {
	setup.Threads = min(choice.Cores, max(setup.Cores, 1))
	setup.Batching.NumBatchThreads = cmp.Or(setup.Batching.NumBatchThreads, choice.BatchThreads)
	setup.Batching.MaxBatchSize = cmp.Or(setup.Batching.MaxBatchSize, choice.BatchSize)
	return tuning.Environment(choice)
}

// failed records a failed load in the model's health if the model may be at fault: the runner has refused it, for
// another reason than a lack of device memory, or has not loaded it in time. It returns err.
func (c *Cache) failed(s *slot, err error) error {
	var refused *loadError
	if s.trial {
		return err
	}
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

// tend measures runners, ends unused ones and looks for newer versions, until the Cache closes.
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

// Loaded returns the live runner of a model on a device, false if there is none. It loads nothing.
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

// Memory returns the bound on host memory for all models, and how much of it is reserved.
func (c *Cache) Memory() protocol.Memory {
	c.mu.Lock()
	defer c.mu.Unlock()
	return protocol.Memory{Budget: c.memory.total, Reserved: c.memory.held()}
}

// Busy reports whether any model is being loaded, has an open stream, or has an unexpired lease.
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
