// Folding in the background: a model that can be frozen is served frozen and folded.

package tuning

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache/repository"
)

// The memory that Python is given to freeze a model: bareFreezing with TensorFlow but without a model (230 MiB were
// measured), and timesFrozen times the size of the model's files, for the graph in several copies (10.5 times the
// variables of EfficientNet-Lite0 and of ResNet50).
const (
	bareFreezing = 300 << 20
	timesFrozen  = 12
)

// foldRest is how long a model waits that could not be folded for a reason that may pass.
const foldRest = 30 * time.Second

// folds is what is known of models that are to be folded. It is safe for concurrent use.
type folds struct {
	mu     sync.Mutex
	made   map[string]string    // digest of a folded form that does not serve yet, by that of the model
	rested map[string]time.Time // not to be tried before, by digest
	tries  map[string]int       // in which Python or a runner ended by itself, by digest
}

// mostTries is how often Python, or a runner of the folded form, may end by itself for one model: somebody may have
// killed it, but there may be too little memory as well.
const mostTries = 3

// again counts a try and reports whether there may be another one.
func (f *folds) again(digest string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tries == nil {
		f.tries = map[string]int{}
	}
	f.tries[digest]++
	return f.tries[digest] < mostTries
}

// due reports whether a model may be tried now.
func (f *folds) due(digest string, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !now.Before(f.rested[digest])
}

func (f *folds) rest(digest string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rested == nil {
		f.rested = map[string]time.Time{}
	}
	f.rested[digest] = time.Now().Add(foldRest)
}

func (f *folds) form(digest string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.made[digest]
}

func (f *folds) keep(digest, form string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.made == nil {
		f.made = map[string]string{}
	}
	f.made[digest] = form
}

// fold freezes and folds a model, and lets that form serve. What the model is to blame for is recorded in its profile,
// what this host is, in the pool; after anything else, and when ctx ends, it is tried another time.
func (t *Tuner) fold(ctx context.Context, model Sampled) {
	unlock, ok := t.options.Profiles.lock()
	if !ok { // one at a time on this host; what the other one finds out counts here, too
		t.folds.rest(model.Digest)
		return
	}
	defer unlock()
	form, err := t.foldedForm(ctx, model)
	if err == nil {
		err = t.options.Pool.Replace(ctx, model, form)
	}
	log := t.options.Log.With(zap.String("model", model.Model.Ref), zap.String("version", model.Model.Version))
	var cannot notFrozen
	var signal ended
	kind, known := fault.KindOf(err)
	switch {
	case err == nil:
		t.learn(model, func(p *Profile) { p.Folded = form })
	case ctx.Err() != nil || known && (kind == fault.Exhausted || kind == fault.Unavailable),
		(errors.As(err, &signal) || known && kind == fault.Internal) && t.folds.again(model.Digest):
		t.folds.rest(model.Digest)
		log.Info("the model is not folded yet", zap.Error(err))
	case errors.As(err, &cannot) || known: // the model's own
		t.learn(model, func(p *Profile) { p.NotFrozen = err.Error() })
		t.options.Pool.KeepSaved(model.Digest, err.Error())
		log.Info("the model is served in its saved form", zap.Error(err))
	default: // this host's
		t.options.Pool.KeepSaved(model.Digest, err.Error())
		log.Info("the model is served in its saved form", zap.Error(err))
	}
}

func (t *Tuner) learn(model Sampled, change func(*Profile)) {
	if err := t.options.Profiles.Change(model.Digest, change); err != nil {
		t.options.Log.Warn("the model's profile cannot be stored", zap.String("model", model.Model.Ref), zap.Error(err))
	}
}

// foldedForm returns the digest of a model's folded form, which it makes if there is none.
func (t *Tuner) foldedForm(ctx context.Context, model Sampled) (string, error) {
	known := t.options.Profiles.Read(model.Digest)
	if known.NotFrozen != "" {
		return "", notFrozen(known.NotFrozen)
	}
	if form := cmp.Or(known.Folded, t.folds.form(model.Digest)); form != "" && t.options.Repository.Known(form) {
		return form, nil
	}
	if t.options.Repository.Changed(model.Model) { // its runner goes on with what it has loaded
		return "", errChanged
	}
	library, err := t.options.Library(ctx)
	if err != nil {
		return "", err
	}
	most := bareFreezing + timesFrozen*sizeOf(model.Model)
	release, ok := t.options.Pool.Spare(most)
	if !ok {
		return "", errNoSpare
	}
	defer release()
	form, err := t.freeze(ctx, model.Model, library, most)
	if err == nil && t.options.Repository.Changed(model.Model) {
		err = errChanged
	}
	if err == nil {
		t.folds.keep(model.Digest, form)
	}
	return form, err
}

var errChanged = fault.New(fault.Unavailable, "its files have changed since it was loaded")

var errNoSpare = fault.New(fault.Exhausted, "there is no memory to freeze it in beside the models that are served")

// sizeOf returns the bytes of a model's graph and variables.
func sizeOf(model repository.Model) int64 {
	return repository.Size(filepath.Join(model.Dir, savedmodel.File)) +
		repository.Size(filepath.Join(model.Dir, "variables"))
}
