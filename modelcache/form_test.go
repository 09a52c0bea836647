// Tests of forms: when the folded one takes over, and when it does not.

package modelcache

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// newSampled returns a pool whose model m has an open stream, "s", and has kept a run; and the digest of another model,
// which stands for its folded form.
func newSampled(t *testing.T, change func(*Options)) (*Cache, *Runner, tuning.Sampled, string) {
	t.Helper()
	cache, model := newPool(t, "good", func(o *Options) {
		o.Fold = true
		if change != nil {
			change(o)
		}
	})
	saved := leaseOf(t, cache, model, "s")
	tell(t, saved, "open s")
	if got := cache.Sampled(); len(got) != 0 {
		t.Fatalf("%v have kept a run before there was one", got)
	}
	if err := sampleOf(1).Write(saved.setup.Sample); err != nil {
		t.Fatal(err)
	}
	list := cache.Sampled()
	if len(list) != 1 || list[0].Model.Dir != model.Dir {
		t.Fatalf("%v have kept a run", list)
	}
	folded, err := cache.options.Repository.Add(t.Context(), "m", func(folder string) error {
		expect.Write(t, filepath.Join(folder, savedmodel.File), expect.SavedModel())
		expect.Write(t, filepath.Join(folder, "folded"), "")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return cache, saved, list[0], folded
}

// formsOf returns the forms of the runners in memory; those that drain are in parentheses.
func formsOf(cache *Cache) (forms []string) {
	for _, m := range cache.Status() {
		form := m.Form
		if m.State == StateDraining {
			form = "(" + form + ")"
		}
		forms = append(forms, form)
	}
	slices.Sort(forms)
	return forms
}

func TestTheFoldedFormTakesOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, saved, sampled, folded := newSampled(t, nil)
		if err := cache.Replace(t.Context(), sampled, folded); err != nil {
			t.Fatal(err)
		}
		runner, err := cache.Ready(t.Context(), sampled.Model, "")
		if err != nil || runner == saved {
			t.Fatalf("new streams go to the saved form (%v)", err)
		}
		if setup := runner.setup; setup.Dir != cache.options.Repository.Place(folded) ||
			setup.Form != protocol.FormFolded || setup.Sample != "" || saved.setup.Form != protocol.FormSaved {
			t.Errorf("its setup is %+v", setup)
		}
		if got := formsOf(cache); !slices.Equal(got, []string{"(saved)", "folded"}) || !saved.Alive() {
			t.Errorf("in memory are %v", got)
		}
		if err := cache.Replace(t.Context(), sampled, folded); err == nil {
			t.Error("it takes over twice")
		}
		tell(t, saved, "rest s")
		time.Sleep(time.Minute)
		if !saved.Alive() {
			t.Error("a stream that rests was ended for the folded form")
		}
		tell(t, saved, "close s")
		time.Sleep(2 * tick)
		if got := formsOf(cache); !slices.Equal(got, []string{"folded"}) || saved.Alive() {
			t.Errorf("in memory are %v", got)
		}
		if _, err := os.Stat(saved.setup.Sample); !os.IsNotExist(err) {
			t.Errorf("the rows that it has kept are still there (%v)", err)
		}

		// The next load begins with it, once the profile has it; not if the model's owner pins the saved form.
		learnt := func(p *tuning.Profile) { p.Folded = folded }
		if err := cache.options.Profiles.Change(sampled.Digest, learnt); err != nil {
			t.Fatal(err)
		}
		for form, want := range map[string]string{"": protocol.FormFolded, repository.FormSaved: protocol.FormSaved} {
			if _, err := cache.Unload(t.Context(), "m", ""); err != nil {
				t.Fatal(err)
			}
			model := sampled.Model
			model.Settings.Form = form
			if runner, err = cache.Ready(t.Context(), model, ""); err != nil || runner.setup.Form != want ||
				runner.setup.Sample != "" {
				t.Errorf("with the setting %q: %+v, %v", form, runner.setup, err)
			}
		}
	})
}

func TestTheSavedFormStays(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		mode   string
		memory int64
		kind   fault.Kind
		say    string
	}{
		"other answers":          {mode: "other answers", kind: fault.Precondition, say: "with other values"},
		"it ends while it loads": {mode: "dies", kind: fault.Internal, say: "ended while loading"},
		"it cannot be loaded":    {mode: "refuses", kind: fault.BadRequest, say: "truncated"},
		"no memory for both":     {mode: "good", memory: 400 << 20, kind: fault.Exhausted, say: "there is no memory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				cache, saved, sampled, folded := newSampled(t, func(o *Options) { o.Memory = test.memory })
				before := cache.Memory().Reserved
				behave(cache, test.mode)
				expect.Fault(t, cache.Replace(t.Context(), sampled, folded), test.kind, test.say)
				runner, err := cache.Ready(t.Context(), sampled.Model, "")
				if err != nil || runner != saved {
					t.Errorf("new streams do not go to the saved form (%v)", err)
				}
				if got := cache.Status(); len(got) != 1 || got[0].Reason != "" || cache.Memory().Reserved != before {
					t.Errorf("%+v; %d bytes are reserved, were %d", got, cache.Memory().Reserved, before)
				}
				cache.KeepSaved(sampled.Digest, "because")
				if got := cache.Status()[0].NotFrozen; got != "because" || len(cache.Sampled()) > 0 {
					t.Errorf("the status says %q", got)
				}
			})
		})
	}
}

// TestTheSavedFormEndsMeanwhile has nothing take over from a runner that has crashed.
func TestTheSavedFormEndsMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cache, saved, sampled, folded := newSampled(t, nil)
		behave(cache, "gated")
		replaced := make(chan error, 1)
		go func() { replaced <- cache.Replace(t.Context(), sampled, folded) }()
		synctest.Wait()
		saved.process.Kill()
		synctest.Wait()
		started(cache)[1].ready()
		expect.Fault(t, <-replaced, fault.Unavailable, "has ended")
		synctest.Wait()
		if got := formsOf(cache); len(got) > 0 {
			t.Errorf("in memory are %v", got)
		}
	})
}

func TestSpare(t *testing.T) {
	t.Parallel()
	cache, _ := newPool(t, "good", func(o *Options) { o.Memory = 1000 })
	release, ok := cache.Spare(600)
	if _, more := cache.Spare(600); !ok || more {
		t.Errorf("600 of 1000 bytes: %t, and again: %t", ok, more)
	}
	release()
	if _, ok := cache.Spare(600); !ok {
		t.Error("they were not given back")
	}
}
