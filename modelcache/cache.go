package modelcache

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
)

// Options are what a Cache needs.
type Options struct {
	ModelRoot string // folder in which names are looked up; "" for none
	CacheDir  string // for pushed models; made when the first arrives
	Folder    string // the front's folder, in which runners make their sockets
	Binary    string // path of flightsvc-runner
	Build     string // of the front; a runner of another build is refused
	Server    string // name under which runners answer
	Cores     int    // threads of a runner's pools; 0 leaves it to TensorFlow
	LogLevel  string // of runners
	// Bounds on a picture that a runner decodes: pixels, and bytes of its file.
	MaxImagePixels, MaxImageBytes int64
	LoadTimeout                   time.Duration // bound on starting a runner and loading its model
	// Library finds the folder that holds libtensorflow_cc.so.2. It is called for each load
	// and its error is a sentence that says what to install.
	Library func(context.Context) (string, error)
	Log     *zap.Logger
}

// The states of a model.
const (
	StateLoading  = "loading"
	StateReady    = "ready"
	StateUnloaded = "unloaded"
)

// Cache holds at most one runner for each model folder.
type Cache struct {
	options Options
	ctx     context.Context // ends when the Cache closes
	stop    context.CancelFunc
	working sync.WaitGroup // loads, unloads and pushes

	mu    sync.Mutex       // guards slots and their fields
	slots map[string]*slot // by folder

	read readings
}

// slot is one model in memory, or on its way there.
type slot struct {
	model  Model
	loaded chan struct{} // closed when runner or err is set
	runner *Runner
	err    error
}

// New returns a cache without a model in memory. It clears away what pushes to dead fronts left.
func New(options Options) *Cache {
	ctx, stop := context.WithCancel(context.Background())
	c := &Cache{options: options, ctx: ctx, stop: stop, slots: map[string]*slot{}}
	c.sweep()
	return c
}

// Ready returns a runner that has the model loaded, and starts one if there is none.
// Concurrent callers share one load, which goes on if a caller leaves.
func (c *Cache) Ready(ctx context.Context, model Model) (*Runner, error) {
	for {
		s, err := c.slotOf(model)
		if err != nil {
			return nil, err
		}
		select {
		case <-s.loaded:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if s.err != nil {
			return nil, s.err
		}
		if s.runner.Alive() {
			return s.runner, nil
		}
		c.forget(s)
	}
}

// Loaded returns the live runner of a model, without loading anything.
func (c *Cache) Loaded(model Model) (*Runner, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.slots[model.Dir]
	if !ok || s.runner == nil || !s.runner.Alive() {
		return nil, false
	}
	return s.runner, true
}

var errClosing = fault.New(fault.Unavailable, "this server is ending; another takes over")

// slotOf returns the model's slot, and begins its load if it has none.
func (c *Cache) slotOf(model Model) (*slot, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, errClosing
	}
	if s, ok := c.slots[model.Dir]; ok {
		return s, nil
	}
	s := &slot{model: model, loaded: make(chan struct{})}
	c.slots[model.Dir] = s
	c.working.Add(1)
	go c.load(s)
	return s, nil
}

func (c *Cache) load(s *slot) {
	defer c.working.Done()
	ctx, cancel := context.WithTimeout(c.ctx, c.options.LoadTimeout)
	defer cancel()
	started := time.Now()
	runner, err := start(ctx, c.options, s.model, func() { c.forget(s) })
	switch {
	case err == nil:
		c.options.Log.Info("model ready", zap.String("model", s.model.Ref), zap.String("version", s.model.Version),
			zap.Int("runner", runner.PID()), zap.Duration("load_time", time.Since(started)))
	case c.ctx.Err() != nil:
		err = errClosing
	case errors.Is(err, context.DeadlineExceeded):
		err = fault.New(fault.Deadline, "model %s: not loaded within %s (load-timeout)", s.model.Ref, c.options.LoadTimeout)
	}
	if err != nil {
		c.options.Log.Warn("model failed", zap.String("model", s.model.Ref), zap.Error(err))
	}
	c.mu.Lock()
	s.runner, s.err = runner, err
	if err != nil {
		c.forgetLocked(s) // the next caller tries again
	}
	c.mu.Unlock()
	close(s.loaded)
}

// Unload ends the runner of a model and returns the version that it had. Nothing happens where there is
// no runner. A model whose files have gone is found by the reference with which it was loaded.
// Faults: Precondition while the model loads, or has open streams or leases; those of Resolve.
func (c *Cache) Unload(ctx context.Context, ref, version string) (string, error) {
	model, err := c.Resolve(ctx, ref, version)
	c.mu.Lock()
	s, ok := c.slots[model.Dir]
	if err != nil {
		s, ok = c.loadedAsLocked(ref, cmp.Or(version, latest))
		if !ok {
			c.mu.Unlock()
			return "", err
		}
		model, err = s.model, nil
	}
	switch {
	case c.ctx.Err() != nil:
		err = errClosing
	case !ok:
	case s.runner == nil:
		err = fault.New(fault.Precondition, "model %s, version %s: it is being loaded; unload it when it is ready", ref, model.Version)
	default:
		if streams, leases := s.runner.retire(time.Now()); streams+leases > 0 {
			err = fault.New(fault.Precondition, "model %s, version %s: it is in use by %d open streams and %d leases for streams that may open; unload it when they have ended", ref, model.Version, streams, leases)
			break
		}
		c.forgetLocked(s) // whoever asks from now on gets a fresh runner
		c.working.Add(1)
		defer c.working.Done()
	}
	c.mu.Unlock()
	if err != nil || !ok {
		return model.Version, err
	}
	s.runner.Close()
	return model.Version, nil
}

// loadedAsLocked returns the only slot whose model was loaded under a reference.
func (c *Cache) loadedAsLocked(ref, version string) (found *slot, ok bool) {
	for _, s := range c.slots {
		if s.model.Ref == ref && (version == latest || version == s.model.Version) {
			if ok {
				return nil, false
			}
			found, ok = s, true
		}
	}
	return found, ok
}

// forget drops a slot whose runner has ended, so that the next caller starts another.
func (c *Cache) forget(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetLocked(s)
}

func (c *Cache) forgetLocked(s *slot) {
	if c.slots[s.model.Dir] == s {
		delete(c.slots, s.model.Dir)
	}
}

// ModelStatus says what is known of a model in memory.
type ModelStatus struct {
	Model   string `json:"model"`
	Version string `json:"version"`
	Dir     string `json:"dir"`
	State   string `json:"state"`
	PID     int    `json:"pid,omitempty"`
	Streams int    `json:"streams"`
	Leases  int    `json:"leases"` // granted, not yet used nor expired

	Runs       int64 `json:"runs"`        // TensorFlow runs of the streams that have closed
	JoinedRuns int64 `json:"joined_runs"` // those of them that served more than one stream
}

// Status lists the models in memory, by folder.
func (c *Cache) Status() []ModelStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]ModelStatus, 0, len(c.slots))
	for _, s := range c.slots {
		status := ModelStatus{Model: s.model.Ref, Version: s.model.Version, Dir: s.model.Dir, State: StateLoading}
		if s.runner != nil {
			status.State, status.PID = StateReady, s.runner.PID()
			status.Streams, status.Leases = s.runner.Pins(time.Now())
			status.Runs, status.JoinedRuns = s.runner.Runs()
		}
		list = append(list, status)
	}
	slices.SortFunc(list, func(a, b ModelStatus) int { return cmp.Compare(a.Dir, b.Dir) })
	return list
}

// Busy reports whether a model is loading, has an open stream, or an unexpired lease.
func (c *Cache) Busy() bool {
	for _, model := range c.Status() {
		if model.State == StateLoading || model.Streams > 0 || model.Leases > 0 {
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

// Close ends all loads and runners and waits until their processes are gone, and until pushes have
// ended, which their callers' streams must.
func (c *Cache) Close() {
	c.mu.Lock()
	c.stop()
	list := make([]*slot, 0, len(c.slots))
	for _, s := range c.slots {
		list = append(list, s)
	}
	c.mu.Unlock()
	c.working.Wait()
	var ending sync.WaitGroup
	for _, s := range list {
		if s.runner != nil {
			ending.Go(s.runner.Close)
		}
	}
	ending.Wait()
}
