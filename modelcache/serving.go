// Versions: which one a reference means, and how a newer one takes over.

package modelcache

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/protocol"
	"flightsvc/modelcache/repository"
)

// serving is the version that a reference means by "latest". The Cache's mu guards it.
type serving struct {
	model      repository.Model
	moving     bool      // a newer version is being looked for, or loaded to take over
	since      time.Time // when it was resolved
	retryAfter time.Time // no newer version is loaded until then, because the last try found no memory
}

// Resolve finds the SavedModel of a reference: a file, s3, gs or azblob URI or an absolute path of a SavedModel or of a
// folder with numbered versions, a name below the model-root, the digest of a pushed model, or Image. version is a
// number, a label of the model's settings, or "latest", for which "" is short. It loads nothing.
//
// "latest" is the highest version. But a version in memory stays "latest" until a higher one is ready to take over, and
// a version that could not be loaded is skipped for five minutes, or until its files change.
//
// Faults: NotFound for an unknown model or version, BadRequest for a reference of no known form or a broken file,
// Unavailable for a version that is being copied or a store that does not answer, Precondition for credentials that a
// store does not accept, Exhausted for a disk that is full.
func (c *Cache) Resolve(ctx context.Context, ref, version string) (repository.Model, error) {
	version = cmp.Or(version, repository.Latest)
	if _, err := strconv.ParseUint(version, 10, 63); ref == protocol.Image || err == nil {
		return c.options.Repository.Find(ctx, ref, version)
	}
	if version == repository.Latest {
		if model, ok := c.serves(ref); ok {
			return model, nil
		}
		model, err := c.newest(ctx, ref)
		if err != nil {
			return repository.Model{}, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if s, ok := c.serving[ref]; !ok || !c.inMemoryLocked(s.model) {
			c.serving[ref] = &serving{model: model, since: time.Now()}
		}
		return c.serving[ref].model, nil
	}
	model, err := c.options.Repository.Find(ctx, ref, repository.Latest)
	if err != nil {
		return repository.Model{}, err
	}
	labels := model.Settings.VersionLabels
	number, ok := labels[version]
	if !ok {
		return repository.Model{}, fault.New(fault.NotFound, "model %s: there is no version %s; a version is a "+
			"number, latest, or a label in its %s, which has %q", ref, version, control.SettingsFile,
			slices.Sorted(maps.Keys(labels)))
	}
	return c.options.Repository.Find(ctx, ref, strconv.FormatUint(number, 10))
}

// serves returns the version that a reference means by "latest", false if that is not in memory.
func (c *Cache) serves(ref string) (repository.Model, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.serving[ref]
	if !ok || !c.inMemoryLocked(s.model) {
		return repository.Model{}, false
	}
	return s.model, true
}

func (c *Cache) inMemoryLocked(model repository.Model) bool {
	return slices.ContainsFunc(c.slots, func(s *slot) bool { return s.model.Dir == model.Dir && s.runner != nil })
}

// newest returns the highest version of a reference that is not known to fail, or else the highest one.
func (c *Cache) newest(ctx context.Context, ref string) (repository.Model, error) {
	model, err := c.options.Repository.Find(ctx, ref, repository.Latest)
	if err != nil || !c.knownToFail(model) {
		return model, err
	}
	numbers, err := c.options.Repository.Settled(ctx, ref)
	if err != nil {
		return repository.Model{}, err
	}
	for _, number := range slices.Backward(numbers) {
		if older, err := c.options.Repository.Find(ctx, ref, number); err == nil && !c.knownToFail(older) {
			return older, nil
		}
	}
	return model, nil // no other version is better
}

func (c *Cache) knownToFail(model repository.Model) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	h, ok := c.healths[model.Dir]
	return ok && h.stamp == stampOf(model) && h.avoided(time.Now())
}

// poll looks for newer versions of the models in memory that were asked for as "latest".
func (c *Cache) poll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for ref, s := range c.serving {
		if s.moving || time.Now().Before(s.retryAfter) || !c.inMemoryLocked(s.model) ||
			strings.HasPrefix(ref, "sha256:") {
			continue
		}
		s.moving = true
		c.working.Go(func() {
			c.advance(ref, s)
			c.mu.Lock()
			defer c.mu.Unlock()
			s.moving = false
		})
	}
}

// A newer version waits only swapPatience for memory beside the old one, and is tried again after swapRest, so that it
// does not hold up other models in the queue for memory.
const (
	swapPatience = 2 * time.Second
	swapRest     = 30 * time.Second
)

// advance loads a newer version on the devices of the one that serves, warms it up, and lets it take over. If it cannot
// be loaded, the old one continues to serve.
func (c *Cache) advance(ref string, s *serving) {
	newer, err := c.newest(c.ctx, ref)
	if err != nil {
		if kind, _ := fault.KindOf(err); kind == fault.NotFound { // the model has been deleted
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.serving, ref)
		}
		return
	}
	c.mu.Lock()
	old := s.model
	devices := map[string]bool{}
	for _, slot := range c.slots {
		if slot.model.Dir == old.Dir {
			devices[slot.target.word] = true
		}
	}
	c.mu.Unlock()
	if newer.Dir == old.Dir {
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, swapPatience)
	defer cancel()
	for device := range devices {
		_, err := c.Ready(ctx, newer, device)
		if err != nil && ctx.Err() != nil { // a load that has begun continues, and a later poll finds it
			c.mu.Lock()
			defer c.mu.Unlock()
			begun := slices.ContainsFunc(c.slots, func(slot *slot) bool {
				return slot.model.Dir == newer.Dir && slot.state != StateQueued
			})
			if !begun {
				s.retryAfter = time.Now().Add(swapRest)
				c.options.Log.Warn("there is no memory for a newer version beside the old one",
					zap.String("model", ref), zap.String("version", newer.Version), zap.String("serving", old.Version))
			}
			return
		}
		if err != nil {
			c.options.Log.Warn("a newer version cannot be loaded, the old one goes on serving",
				zap.String("model", ref), zap.String("version", newer.Version),
				zap.String("serving", old.Version), zap.Error(err))
			return
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.model = newer
	for _, slot := range c.slots {
		slot.superseded = slot.superseded || slot.model.Dir == old.Dir
	}
	c.options.Log.Info("a newer version serves", zap.String("model", ref), zap.String("version", newer.Version),
		zap.String("before", old.Version))
}
