// Tests of policy (admission, eviction, versions, quarantine), on a fake clock.

package modelcache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/protobuf/encoding/protowire"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// The models of these tests are counted with 1 GiB each, far more than a fake runner has.
const modelMemory = int64(1 << 30)

// inMemory returns the names of the models that have a runner.
func inMemory(cache *Cache) string {
	var names []string
	for _, m := range cache.Status() {
		if m.PID != 0 {
			names = append(names, m.Model)
		}
	}
	return strings.Join(names, " ")
}

func TestTheLeastRecentlyUsedIsEvicted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 2, 4, nil)
		for _, i := range []int{0, 1, 0, 2} { // b was used before a
			runner, err := cache.Ready(t.Context(), models[i], "")
			if err != nil || !runner.Leased("l", "", time.Now().Add(time.Second)) {
				t.Fatalf("model %s gives no lease, %v", models[i].Ref, err)
			}
			time.Sleep(3 * time.Second) // the lease ends
		}
		if got := inMemory(cache); got != "a c" {
			t.Errorf("in memory are %s", got)
		}
		runner := leaseOf(t, cache, models[0], "l")
		if _, err := cache.Ready(t.Context(), models[3], ""); err != nil {
			t.Fatal(err)
		}
		if got := inMemory(cache); got != "a d" || !runner.Alive() {
			t.Errorf("with a lease on a in memory are %s", got)
		}
		if held := cache.Memory(); held.Reserved > held.Budget {
			t.Errorf("%d bytes are reserved of %d", held.Reserved, held.Budget)
		}
	})
}

func TestWhatDoesNotFitWaitsItsTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 3, nil)
		runner := leaseOf(t, cache, models[0], "s")
		tell(t, runner, "open s")
		expect.Eventually(t, "a stream is open", func() bool { return cache.Streams() == 1 })
		order := make(chan string, 2)
		for _, model := range models[1:] {
			go func() {
				if _, err := cache.Ready(context.Background(), model, ""); err != nil {
					t.Error(err)
				}
				order <- model.Ref
			}()
			expect.Eventually(t, model.Ref+" waits", func() bool {
				cache.mu.Lock()
				defer cache.mu.Unlock()
				return slices.ContainsFunc(cache.memory.waiting,
					func(c *claim) bool { return c.model.Dir == model.Dir })
			})
		}
		if !runner.Alive() {
			t.Fatal("a stream was open")
		}
		tell(t, runner, "rest s") // nothing moves on it
		if first, second := <-order, <-order; first != "b" || second != "c" {
			t.Errorf("the order is %s, %s", first, second)
		}
		if runner.Alive() || inMemory(cache) != "c" {
			t.Errorf("in memory are %s", inMemory(cache))
		}
	})
}

func TestWhoHasTheMemory(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 2, func(o *Options) { o.LoadTimeout = 2 * time.Second })
		runner := leaseOf(t, cache, models[0], "s")
		tell(t, runner, "open s")
		_, err := cache.Ready(t.Context(), models[1], "")
		expect.Fault(t, err, fault.Exhausted, "model b, version 1: it needs 1.0 GiB", "waited 2s",
			"a version 1 (1.0 GiB, 1 streams, 0 leases)", "raise the setting memory")
		if !runner.Alive() {
			t.Error("a stream was open")
		}
		huge := add(t, cache, "huge", `{"memory":"2GiB"}`)
		_, err = cache.Ready(t.Context(), huge, "")
		expect.Fault(t, err, fault.Exhausted, "model huge: it needs 2.0 GiB", "1.0 GiB for all models",
			"raise the setting memory")
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := cache.Ready(ctx, models[1], ""); err != context.DeadlineExceeded {
			t.Errorf("a caller with a deadline gets %v", err)
		}
		expect.Eventually(t, "nobody waits for b any more", func() bool { return len(cache.Status()) == 1 })
	})
}

// TestRandomWork lets many callers use 8 models with room for 3: nobody's runner goes while it has a
// lease or a stream, the budget holds, and all get what they ask for.
func TestRandomWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 3, 8, nil)
		over := time.Now().Add(4 * time.Second)
		var served atomic.Int64
		var work sync.WaitGroup
		for w := range 12 {
			work.Go(func() {
				random := rand.New(rand.NewPCG(1, uint64(w)))
				for n := 0; time.Now().Before(over); n++ {
					id := fmt.Sprintf("%d-%d", w, n)
					runner, err := cache.Ready(context.Background(), models[random.IntN(len(models))], "")
					if err != nil {
						t.Error(err)
						return
					}
					if !runner.Leased(id, id, time.Now().Add(time.Minute)) {
						continue
					}
					for _, line := range []string{"open ", "", "close "} {
						if !runner.Alive() {
							t.Error("a runner with a lease or a stream has ended")
						}
						if line != "" {
							report(runner, line+id)
						}
						time.Sleep(time.Duration(random.IntN(5)) * time.Millisecond) // the work
					}
					served.Add(1)
				}
			})
		}
		for time.Now().Before(over) {
			if held := cache.Memory(); held.Reserved > held.Budget {
				t.Errorf("%d bytes are reserved of %d", held.Reserved, held.Budget)
			}
			time.Sleep(time.Millisecond)
		}
		work.Wait()
		if served.Load() < 50 {
			t.Errorf("only %d streams were served", served.Load())
		}
		t.Logf("%d streams", served.Load())
	})
}

func TestKeepAlive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 3, 2, func(o *Options) { o.KeepAlive = time.Hour })
		for _, m := range models {
			if _, err := cache.Ready(t.Context(), m, ""); err != nil {
				t.Fatal(err)
			}
		}
		runner := leaseOf(t, cache, models[0], "l")
		cache.endIdle(time.Now().Add(30 * time.Minute))
		if got := inMemory(cache); got != "a b" {
			t.Errorf("before its time is over in memory are %s", got)
		}
		cache.endIdle(time.Now().Add(61 * time.Minute)) // the lease ended a minute before
		cache.endIdle(time.Now().Add(3 * time.Hour))
		expect.Eventually(t, "both have ended", func() bool { return inMemory(cache) == "" && !runner.Alive() })
		brief := add(t, cache, "brief", `{"keep_alive":"1m"}`)
		forever := add(t, cache, "forever", `{"keep_alive":"-1s"}`)
		for _, m := range []repository.Model{brief, forever} {
			if _, err := cache.Ready(t.Context(), m, ""); err != nil {
				t.Fatal(err)
			}
		}
		cache.endIdle(time.Now().Add(2 * time.Minute))
		cache.endIdle(time.Now().Add(1000 * time.Hour))
		if got := inMemory(cache); got != "forever" {
			t.Errorf("in memory are %s", got)
		}
	})
}

func TestQuarantine(t *testing.T) {
	t.Parallel()
	crash := func(t *testing.T, runner *Runner) {
		t.Helper()
		runner.process.(*fakeProcess).end("signal: killed")
		expect.Eventually(t, "the end is known", func() bool { return !runner.Alive() })
	}
	open := func(t *testing.T, cache *Cache, model repository.Model, requests ...string) *Runner {
		t.Helper()
		var runner *Runner
		for _, request := range requests {
			runner = leaseOf(t, cache, model, request)
			tell(t, runner, "open "+request)
		}
		expect.Eventually(t, "the streams are open", func() bool { return cache.Streams() == len(requests) })
		return runner
	}
	t.Run("two crashes", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			cache, models := poolOf(t, 3, 1, nil)
			crash(t, open(t, cache, models[0], "x", "y"))
			crash(t, open(t, cache, models[0], "x", "y"))
			_, err := cache.Ready(t.Context(), models[0], "")
			expect.Fault(t, err, fault.Precondition, "model a, version 1 is in quarantine", "2 runners in a row",
				"signal: killed", "model.load")
			if status := cache.Status(); len(status) != 1 || status[0].State != StateQuarantined ||
				status[0].Reason == "" {
				t.Errorf("the status is %+v", status)
			}
			cache.Pardon(models[0])
			if _, err := cache.Ready(t.Context(), models[0], ""); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("an answer in between", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			cache, models := poolOf(t, 3, 1, nil)
			for range 3 {
				runner := open(t, cache, models[0], "x", "y")
				tell(t, runner, "answer -")
				expect.Eventually(t, "the answer is known", func() bool {
					cache.mu.Lock()
					defer cache.mu.Unlock()
					return cache.healthLocked(models[0]).strikes == 0
				})
				crash(t, runner)
			}
		})
	})
	t.Run("one request alone", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			cache, models := poolOf(t, 3, 1, nil)
			for range 3 {
				crash(t, open(t, cache, models[0], "poison"))
			}
			crash(t, open(t, cache, models[0], "another"))
			_, err := cache.Ready(t.Context(), models[0], "")
			expect.Fault(t, err, fault.Precondition, "is in quarantine")
		})
	})
	t.Run("while loading", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			cache, models := poolOf(t, 3, 1, nil)
			behave(cache, "dies")
			for range 2 {
				_, err := cache.Ready(t.Context(), models[0], "")
				expect.Fault(t, err, fault.Internal, "ended while loading")
			}
			_, err := cache.Ready(t.Context(), models[0], "")
			expect.Fault(t, err, fault.Precondition, "is in quarantine", "while it loaded", "exit status 3")
		})
	})
}

// TestNobodyIsKilledForTheDevice lets a runner end at once whose device gives its memory back late.
func TestNobodyIsKilledForTheDevice(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		core, log := observer.New(zap.WarnLevel)
		runner, err := start(t.Context(), Options{Runners: &fakeRunners{}, Build: testBuild, Log: zap.New(core)},
			control.Setup{}, nil, nil, events{
				counted: func(control.Counts) {}, moved: func() {}, ended: func(end) { time.Sleep(2 * runnerGrace) },
			})
		if err != nil {
			t.Fatal(err)
		}
		runner.Close()
		if lines := log.All(); len(lines) != 0 {
			t.Errorf("the log says %v", lines)
		}
	})
}

// TestAClosedPoolAdmitsNothing comes for memory when the pool has closed.
func TestAClosedPoolAdmitsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 1, nil)
		cache.Close()
		expect.Fault(t, cache.admit(newClaim(models[0], tuning.Profile{}), func() bool { return true }),
			fault.Unavailable, "this server is ending")
		if held := cache.Memory().Reserved; held != 0 {
			t.Errorf("%d bytes are reserved", held)
		}
	})
}

// TestQuarantineGoesByTheFiles finds one model of the cache-dir under two names: their stamps differ, the files do not.
func TestQuarantineGoesByTheFiles(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "dies", nil)
		fetched, pushed := model, model
		fetched.Ref, fetched.Stamp, fetched.Digest = "s3://models/m", "of the listing", "sha256:feed"
		pushed.Ref, pushed.Stamp, pushed.Digest = "sha256:feed", "of the folder", "sha256:feed"
		for _, one := range []repository.Model{fetched, pushed} {
			_, err := cache.Ready(t.Context(), one, "")
			expect.Fault(t, err, fault.Internal, "ended while loading")
		}
		_, err := cache.Ready(t.Context(), fetched, "")
		expect.Fault(t, err, fault.Precondition, "is in quarantine")
	})
}

// TestWhatIsKnownOfModelsIsForgotten asks for a model and leaves, and lets another one crash once.
func TestWhatIsKnownOfModelsIsForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 1, nil) // resolves m and a
		runner, err := cache.Ready(t.Context(), models[0], "")
		if err != nil {
			t.Fatal(err)
		}
		runner.process.(*fakeProcess).end("signal: killed")
		known := func() string {
			cache.mu.Lock()
			defer cache.mu.Unlock()
			return fmt.Sprint(len(cache.serving), len(cache.healths))
		}
		synctest.Wait()
		if got := known(); got != "2 1" {
			t.Errorf("known networks: %s", got)
		}
		time.Sleep(2 * time.Minute)
		if got := known(); got != "0 1" {
			t.Errorf("after two minutes known networks: %s", got)
		}
		time.Sleep(2 * strikeMemory)
		if got := known(); got != "0 0" {
			t.Errorf("in the end known networks: %s", got)
		}
	})
}

func TestBackOff(t *testing.T) {
	h, now := &health{}, time.Now()
	var waits []time.Duration
	for range 9 {
		h.answered()
		h.crashed(now, false, nil, "signal")
		waits = append(waits, h.backOff(now))
	}
	want := "[0s 200ms 400ms 800ms 1.6s 3.2s 6.4s 10s 10s]"
	if fmt.Sprint(waits) != want {
		t.Errorf("the waits are %s, want %s", waits, want)
	}
	if wait := h.backOff(now.Add(2 * crashMemory)); wait != 0 {
		t.Errorf("long after it is %s", wait)
	}
}

func TestLabelsAndSignatures(t *testing.T) {
	cache, _ := newPool(t, "good", nil)
	base := filepath.Join(rootOf(t, cache), "many")
	for _, version := range []string{"1", "2", "3"} {
		expect.Write(t, filepath.Join(filepath.Join(base, version), savedmodel.File), expect.SavedModel())
	}
	set := func(text string) { expect.Write(t, filepath.Join(base, control.SettingsFile), text) }
	set(`{"version_labels":{"stable":2},"signatures":["serving_default"]}`)
	model, err := cache.Resolve(t.Context(), "many", "stable")
	if err != nil || model.Version != "2" {
		t.Errorf("stable is version %q, %v", model.Version, err)
	}
	_, err = cache.Resolve(t.Context(), "many", "canary")
	expect.Fault(t, err, fault.NotFound, "no version canary", control.SettingsFile, "stable")
	for text, say := range map[string]string{
		`{"batchin":{}}`:                             `unknown field "batchin"`,
		`{"memory":"lots"}`:                          `"lots" is not an amount of memory`,
		`{"keep_alive":"long"}`:                      `"long" is not a duration`,
		`{"warm_up":"hot"}`:                          `warm_up is "hot"`,
		`{"batching":{"num_batch_threads":1025}}`:    "each may be 1024 at most",
		`{"cores":5000}`:                             "each may be 1024 at most",
		`{"version_labels":{"latest":1}}`:            `version_labels has "latest"`,
		`{"batching":{"allowed_batch_sizes":[4,2]}}`: "ascending",
		`{"form":"fast"}`:                            `form is "fast"; want "best" or "saved"`,
		`{"batching":{"max_batch_size":8,"allowed_batch_sizes":[4]}}`: "must be the same",
		`{"signatures":["nope"]}`:                                     `the signature "nope", which the model`,
	} {
		set(text)
		_, err := cache.Resolve(t.Context(), "many", "1")
		expect.Fault(t, err, fault.BadRequest, say)
	}
}

// TestSwap puts versions beside one that serves.
func TestSwap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, _ := newPool(t, "good", func(o *Options) { o.PollInterval = 50 * time.Millisecond })
		base := filepath.Join(rootOf(t, cache), "many")
		expect.Write(t, filepath.Join(filepath.Join(base, "1"), savedmodel.File), expect.SavedModel())
		resolve := func() repository.Model {
			t.Helper()
			model, err := cache.Resolve(t.Context(), "many", "")
			if err != nil {
				t.Fatal(err)
			}
			return model
		}
		first := resolve()
		old := leaseOf(t, cache, first, "s")
		tell(t, old, "open s")
		expect.Eventually(t, "a stream is open", func() bool { return cache.Streams() == 1 })

		behave(cache, "refuses")
		expect.Write(t, filepath.Join(filepath.Join(base, "2"), savedmodel.File), expect.SavedModel())
		expect.Eventually(t, "version 2 has failed", func() bool {
			return slices.ContainsFunc(cache.Status(), func(m protocol.ModelStatus) bool {
				return m.Version == "2" && m.State == StateFailed
			})
		})
		if got := resolve(); got.Version != "1" || !old.Alive() {
			t.Errorf("after a version that fails %s serves", got.Version)
		}
		behave(cache, "good")
		expect.Write(t, filepath.Join(filepath.Join(base, "3"), savedmodel.File), expect.SavedModel())
		expect.Eventually(t, "version 3 serves", func() bool { return resolve().Version == "3" })
		if _, ok := cache.Loaded(resolve(), ""); !ok {
			t.Error("it serves before it is in memory")
		}
		if !old.Alive() || cache.Streams() != 1 {
			t.Error("the old version has a stream")
		}
		tell(t, old, "close s")
		expect.Eventually(t, "the old version has ended", func() bool { return !old.Alive() })

		if err := os.RemoveAll(filepath.Join(base, "3")); err != nil {
			t.Fatal(err)
		}
		expect.Eventually(t, "a lower version serves when the highest is deleted",
			func() bool { return resolve().Version != "3" })
	})
}

// TestTheHeadroomAloneRefusesNothing loads a model once more that ran and was measured at nearly all of the memory.
func TestTheHeadroomAloneRefusesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "good", func(o *Options) { o.Memory = modelMemory })
		digest, err := cache.options.Repository.Digest(t.Context(), model)
		if err != nil {
			t.Fatal(err)
		}
		measured := func(bytes int64) {
			t.Helper()
			if err := cache.options.Profiles.Change(digest,
				func(p *tuning.Profile) { p.HostBytes = bytes }); err != nil {
				t.Fatal(err)
			}
		}
		measured(modelMemory - 1<<20)
		if _, err := cache.Ready(t.Context(), model, ""); err != nil {
			t.Fatal(err)
		}
		cache.measure()
		if held := cache.Memory(); held.Reserved != held.Budget {
			t.Errorf("%d bytes are reserved of %d", held.Reserved, held.Budget)
		}
		if _, err := cache.Unload(t.Context(), "m", ""); err != nil {
			t.Fatal(err)
		}
		measured(modelMemory + 100<<20)
		_, err = cache.Ready(t.Context(), model, "")
		expect.Fault(t, err, fault.Exhausted, "model m: it needs 1.1 GiB", "raise the setting memory")
	})
}

// TestWhatIsIdleGoesFirstAboveTheBudget has runners in use that alone are more than the budget.
func TestWhatIsIdleGoesFirstAboveTheBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 2, 2, nil)
		leaseOf(t, cache, models[0], "l")
		if _, err := cache.Ready(t.Context(), models[1], ""); err != nil {
			t.Fatal(err)
		}
		cache.mu.Lock()
		cache.memory.total = modelMemory / 2
		cache.mu.Unlock()
		expect.Eventually(t, "the idle one has ended", func() bool { return inMemory(cache) == "a" })
	})
}

// TestWhoHasLeftGetsNoRunner comes for a model in memory and has left already: a lease would keep it there for nobody.
func TestWhoHasLeftGetsNoRunner(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 1, nil)
		ctx, leave := context.WithCancel(t.Context())
		if _, err := cache.Ready(ctx, models[0], ""); err != nil {
			t.Fatal(err)
		}
		leave()
		if runner, err := cache.Ready(ctx, models[0], ""); runner != nil || err != context.Canceled {
			t.Errorf("%v, %v", runner, err)
		}
	})
}

// TestASwapWithoutMemoryStepsAside lets a newer version find no memory beside the old one.
func TestASwapWithoutMemoryStepsAside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 1, func(o *Options) { o.PollInterval = 50 * time.Millisecond })
		runner := leaseOf(t, cache, models[0], "s")
		tell(t, runner, "open s")
		expect.Eventually(t, "a stream is open", func() bool { return cache.Streams() == 1 })
		expect.Write(t, filepath.Join(filepath.Join(rootOf(t, cache), "a", "2"), savedmodel.File), expect.SavedModel())
		expect.Eventually(t, "the newer version rests", func() bool {
			cache.mu.Lock()
			defer cache.mu.Unlock()
			return !cache.serving["a"].retryAfter.IsZero() && !cache.serving["a"].moving &&
				len(cache.memory.waiting) == 0 && len(cache.slots) == 1
		})
		if got, err := cache.Resolve(t.Context(), "a", ""); err != nil || got.Version != "1" || !runner.Alive() {
			t.Errorf("version %s serves, %v", got.Version, err)
		}
	})
}

func TestOneLoadForAllCallers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "gated", nil)
		first, leave := context.WithCancel(context.Background())
		left := make(chan error, 1)
		go func() {
			_, err := cache.Ready(first, model, "")
			left <- err
		}()
		expect.Eventually(t, "the load has begun", func() bool { return len(started(cache)) == 1 })
		runners := make(chan *Runner, 50)
		var working sync.WaitGroup
		for range cap(runners) {
			working.Go(func() {
				runner, err := cache.Ready(context.Background(), model, "")
				if err != nil {
					t.Error(err)
				}
				runners <- runner
			})
		}
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("the caller that left got %v", err)
		}
		if _, ok := cache.Loaded(model, ""); ok || !cache.Busy() || cache.Status()[0].State != StateLoading {
			t.Errorf("while it loads the status is %+v", cache.Status())
		}
		started(cache)[0].ready()
		working.Wait()
		one := <-runners
		for range cap(runners) - 1 {
			if other := <-runners; other != one {
				t.Fatal("two callers have two runners")
			}
		}
		if all := started(cache); len(all) != 1 || all[0].pid != one.PID() || !one.Alive() {
			t.Errorf("%d runners were started, this one is %d", len(all), one.PID())
		}
		if got, ok := cache.Loaded(model, ""); !ok || got != one || cache.Busy() {
			t.Errorf("loaded %v, %t; the status is %+v", got, ok, cache.Status())
		}
		want := protocol.ModelStatus{Model: "m", Version: "1", Dir: model.Dir, State: StateReady, PID: one.PID(),
			Form: protocol.FormSaved}
		got := cache.Status()
		if len(got) == 1 { // what depends on the machine
			want.Memory, want.Reserved, want.Digest = got[0].Memory, got[0].Reserved, got[0].Digest
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("the status is %+v, want %+v", got, want)
		}
	})
}

func TestPins(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "good", nil)
		runner, err := cache.Ready(context.Background(), model, "")
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		pins := func(at time.Time) string { return fmt.Sprint(runner.Pins(at)) }
		runner.Leased("a", "", now.Add(time.Minute))
		runner.Leased("b", "", now.Add(time.Second))
		if got := pins(now); got != "0 2" || !cache.Busy() {
			t.Errorf("two leases are %s", got)
		}
		if got := pins(now.Add(3 * time.Second)); got != "0 1" {
			t.Errorf("with one expired they are %s", got)
		}
		tell(t, runner, "open a")
		expect.Eventually(t, "a stream is open", func() bool { return pins(now) == "1 0" })
		if !cache.Busy() || cache.Streams() != 1 || cache.Status()[0].Streams != 1 {
			t.Errorf("with a stream the status is %+v", cache.Status())
		}
		tell(t, runner, "open x") // a lease that the front has not noted yet
		expect.Eventually(t, "two streams are open", func() bool { return pins(now) == "2 0" })
		tell(t, runner, "close a")
		tell(t, runner, "close x")
		expect.Eventually(t, "the streams are closed", func() bool { return pins(now) == "0 0" })
		if cache.Busy() || cache.Streams() != 0 {
			t.Errorf("at rest the status is %+v", cache.Status())
		}
		if string(runner.Key()) == "" || len(runner.Key()) < 32 {
			t.Errorf("a key of %d bytes", len(runner.Key()))
		}
	})
}

func TestUnload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "good", nil)
		unload := func() error {
			version, err := cache.Unload(t.Context(), "m", "")
			if version != "1" {
				t.Errorf("the version is %q", version)
			}
			return err
		}
		if err := unload(); err != nil {
			t.Errorf("a model that is not in memory: %v", err)
		}
		_, err := cache.Unload(t.Context(), "nope", "")
		expect.Fault(t, err, fault.NotFound, "model nope")

		runner, err := cache.Ready(context.Background(), model, "")
		if err != nil {
			t.Fatal(err)
		}
		runner.Leased("a", "", time.Now().Add(time.Hour))
		expect.Fault(t, unload(), fault.Precondition, "model m, version 1", "0 open streams and 1 leases")
		tell(t, runner, "open a")
		expect.Eventually(t, "a stream is open", func() bool {
			streams, _ := runner.Pins(time.Now())
			return streams == 1
		})
		expect.Fault(t, unload(), fault.Precondition, "1 open streams and 0 leases", "when they have ended")
		tell(t, runner, "close a")
		expect.Eventually(t, "the stream is closed", func() bool {
			streams, _ := runner.Pins(time.Now())
			return streams == 0
		})
		if s := cache.Status()[0]; s.Runs != 7 || s.JoinedRuns != 3 {
			t.Errorf("the runner reported 7 runs, 3 of them joined; the status is %+v", s)
		}
		if total := cache.Totals(); total.Rows != 70 || total.Batches != 7 || total.Queued != 5 || total.Models != 1 ||
			total.Memory == 0 {
			t.Errorf("the runner reported 70 rows, 7 runs and 5 rows that wait; the totals are %+v", total)
		}
		if err := unload(); err != nil || runner.Alive() || len(cache.Status()) != 0 {
			t.Errorf("%v; the status is %+v", err, cache.Status())
		}
		if total := cache.Totals(); total.Rows != 70 || total.Batches != 7 || total.Queued != 0 || total.Models != 0 {
			t.Errorf("what was done stays done when the runner has ended, and nothing waits; the totals are %+v", total)
		}
		if runner.Leased("b", "", time.Now().Add(time.Hour)) {
			t.Error("a runner that has ended takes a lease")
		}

		// A model whose folder has gone is still known by the name it was loaded with.
		if _, err := cache.Ready(context.Background(), model, ""); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(model.Dir, savedmodel.File)); err != nil {
			t.Fatal(err)
		}
		if err := unload(); err != nil || len(cache.Status()) != 0 {
			t.Errorf("%v; the status is %+v", err, cache.Status())
		}
	})
}

func TestUnloadWhileLoading(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "gated", nil)
		loaded := make(chan error, 1)
		go func() {
			_, err := cache.Ready(context.Background(), model, "")
			loaded <- err
		}()
		expect.Eventually(t, "the load has begun", func() bool { return len(started(cache)) == 1 })
		_, err := cache.Unload(t.Context(), "m", "1")
		expect.Fault(t, err, fault.Precondition, "it is being loaded")
		started(cache)[0].ready()
		if err := <-loaded; err != nil {
			t.Error(err)
		}
	})
}

// TestUnloadGrantsNoLeaseOnTheWayOut races callers with unloads: whoever gets a lease has a runner that lives.
func TestUnloadGrantsNoLeaseOnTheWayOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, model := newPool(t, "good", nil)
		var working sync.WaitGroup
		for caller := range 4 {
			working.Go(func() {
				for turn := range 10 {
					runner, err := cache.Ready(context.Background(), model, "")
					if err != nil {
						t.Error(err)
						return
					}
					id := fmt.Sprint(caller, "-", turn)
					if !runner.Leased(id, "", time.Now().Add(time.Hour)) {
						continue
					}
					if !runner.Alive() {
						t.Error("a lease was granted for a runner that has ended")
					}
					runner.note(control.Report{Opened: id})
					if _, err := cache.Unload(t.Context(), "m", ""); err == nil {
						t.Error("unloaded under an open stream")
					}
					runner.note(control.Report{Closed: id})
					if _, err := cache.Unload(t.Context(), "m", ""); err != nil {
						expect.Fault(t, err, fault.Precondition)
					}
				}
			})
		}
		working.Wait()
	})
}

// TestHashingIsPartOfALoad loads a model with a sparse file of 4 TB, whose digest is not there for a long time.
func TestHashingIsPartOfALoad(t *testing.T) {
	for name, c := range map[string]struct {
		timeout, patience time.Duration
		ends              func(error) bool
	}{
		"the load times out": {50 * time.Millisecond, time.Minute, func(err error) bool {
			kind, _ := fault.KindOf(err)
			return kind == fault.Deadline && strings.Contains(err.Error(), "not loaded within 50ms (load-timeout)")
		}},
		"its caller leaves": {time.Minute, 50 * time.Millisecond,
			func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
	} {
		t.Run(name, func(t *testing.T) {
			cache, model := newPool(t, "good", func(o *Options) { o.LoadTimeout = c.timeout })
			weights := filepath.Join(model.Dir, "weights")
			expect.Write(t, weights, "")
			if err := os.Truncate(weights, 4<<40); err != nil {
				t.Fatal(err)
			}
			model, err := cache.Resolve(t.Context(), "m", "")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), c.patience)
			defer cancel()
			if _, err := cache.Ready(ctx, model, ""); !c.ends(err) {
				t.Error(err)
			}
			expect.Eventually(t, "nothing is loaded any more", func() bool {
				return !cache.Busy() &&
					len(started(cache)) == 0
			})
		})
	}
}

// TestReadingTakesMemory reads a graph that needs more than 1 MiB of memory beside a runner that nobody uses, then one
// that is in use.
func TestReadingTakesMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache, models := poolOf(t, 1, 2, func(o *Options) { o.LoadTimeout = 2 * time.Second })
		nodes := ""
		for i := range 20_000 { // GraphDef.node, NodeDef.name
			nodes += fmt.Sprintf("\x0a\x08\x0a\x06%06d", i)
		}
		// MetaGraphDef.graph_def
		graph := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), []byte(nodes))
		// SavedModel.meta_graphs
		meta := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), graph)
		path := filepath.Join(rootOf(t, cache), "large", savedmodel.File)
		expect.Write(t, path, string(meta)+expect.SavedModel())

		if _, err := cache.Ready(t.Context(), models[0], ""); err != nil {
			t.Fatal(err)
		}
		if _, err := cache.Resolve(t.Context(), "large", ""); err != nil {
			t.Errorf("beside a runner that nobody uses: %v", err)
		}
		if held := cache.Memory().Reserved; held != 0 {
			t.Errorf("%d bytes are reserved when it has been read", held)
		}
		leaseOf(t, cache, models[1], "lease")
		expect.Write(t, path, string(meta)+string(meta)+expect.SavedModel()) // another one
		_, err := cache.Resolve(t.Context(), "large", "")
		expect.Fault(t, err, fault.Exhausted, "reading its saved_model.pb needs 1.0 MiB", "raise the setting memory")
	})
}
