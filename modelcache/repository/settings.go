// Settings: the file flightsvc.json, in which a model's owner says how it is served.

package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"

	"flightsvc/internal/config"
	"flightsvc/internal/control"
	"flightsvc/internal/fault"
	"flightsvc/internal/regular"
	"flightsvc/internal/savedmodel"
)

// Settings are what the owner of a model says about serving it. The zero value is the default of each.
type Settings struct {
	Batching   control.Batching `json:"batching,omitzero"`
	Signatures []string         `json:"signatures,omitempty"` // those that are served; none means all
	// files with custom operations, relative to the settings' folder
	OpLibraries   []string          `json:"op_libraries,omitempty"`
	VersionLabels map[string]uint64 `json:"version_labels,omitempty"` // names of versions
	// bytes of the host that a runner of this model is counted with at least
	Memory config.Bytes `json:"memory,omitzero"`
	// bytes of a GPU that TensorFlow may take, and with which the model is placed
	DeviceMemory config.Bytes `json:"device_memory,omitzero"`
	Cores        int          `json:"cores,omitempty"` // threads; never more than the server's
	// how long a runner without streams is kept; negative is for ever
	KeepAlive config.Duration `json:"keep_alive,omitzero"`
	WarmUp    string          `json:"warm_up,omitempty"` // WarmUpAuto or WarmUpOff
	Form      string          `json:"form,omitempty"`    // FormBest or FormSaved
	// as in a descriptor; replaces "auto" of a request
	Device string `json:"device,omitempty"`
}

// Whether a runner runs a model before it counts as ready.
const (
	WarmUpAuto = "auto" // with the records in assets.extra/tf_serving_warmup_requests, else with zeros
	WarmUpOff  = "off"
)

// In which form a model is served.
const (
	FormBest  = "best"  // frozen and folded, once that is made and its answers agree
	FormSaved = "saved" // as it is
)

// readSettings reads the settings file in a folder; without one it returns the defaults. Its fault is BadRequest for
// what is wrong in the file, which it names, and Precondition for a file that cannot be read.
func readSettings(ctx context.Context, folder string) (Settings, error) {
	path := filepath.Join(folder, control.SettingsFile)
	text, err := regular.Read(ctx, path, maxSettings)
	if errors.Is(err, fs.ErrNotExist) {
		return Settings{}, nil
	}
	if err != nil {
		return Settings{}, fault.New(fault.Precondition, "settings of the model: %w", err)
	}
	return parseSettings(text, path)
}

// parseSettings reads the text of a settings file at path. Relative paths in it begin at its folder.
func parseSettings(text []byte, path string) (Settings, error) {
	var s Settings
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&s); err != nil {
		return Settings{}, fault.New(fault.BadRequest, "%s: %w", path, err)
	}
	if err := s.check(); err != nil {
		return Settings{}, fault.New(fault.BadRequest, "%s: %w", path, err)
	}
	for i, library := range s.OpLibraries {
		if !filepath.IsAbs(library) {
			s.OpLibraries[i] = filepath.Join(filepath.Dir(path), library)
		}
	}
	return s, nil
}

// check refuses settings that cannot be followed. It sets MaxBatchSize to the last of the allowed sizes.
func (s *Settings) check() error {
	b := &s.Batching
	switch {
	case b.MaxBatchSize < 0 || b.BatchTimeoutMicros < 0 || b.MaxEnqueuedBatches < 0 || b.NumBatchThreads < 0:
		return fmt.Errorf("numbers in batching cannot be negative")
	case b.NumBatchThreads > config.MaxThreads || s.Cores > config.MaxThreads:
		return fmt.Errorf("num_batch_threads is %d and cores is %d; each may be %d at most", b.NumBatchThreads, s.Cores,
			config.MaxThreads)
	case s.Cores < 0 || s.Memory < 0:
		return fmt.Errorf("cores and memory cannot be negative")
	case s.WarmUp != "" && s.WarmUp != WarmUpAuto && s.WarmUp != WarmUpOff:
		return fmt.Errorf("warm_up is %q; want %q or %q", s.WarmUp, WarmUpAuto, WarmUpOff)
	case s.Form != "" && s.Form != FormBest && s.Form != FormSaved:
		return fmt.Errorf("form is %q; want %q or %q", s.Form, FormBest, FormSaved)
	}
	for name := range s.VersionLabels {
		if _, err := strconv.ParseUint(name, 10, 64); err == nil || name == Latest || name == "" {
			return fmt.Errorf("version_labels has %q; a label must not be a number or %q", name, Latest)
		}
	}
	sizes := b.AllowedBatchSizes
	if len(sizes) == 0 {
		return nil
	}
	if sizes[0] < 1 || !slices.IsSorted(sizes) || len(slices.Compact(slices.Clone(sizes))) != len(sizes) {
		return fmt.Errorf("allowed_batch_sizes are %v; want them ascending, from 1 or more", sizes)
	}
	if last := sizes[len(sizes)-1]; b.MaxBatchSize == 0 {
		b.MaxBatchSize = last
	} else if last != b.MaxBatchSize {
		return fmt.Errorf("the last of allowed_batch_sizes is %d and max_batch_size is %d; they must be the same",
			last, b.MaxBatchSize)
	}
	return nil
}

// served returns a SavedModel with only those signatures that the settings serve.
func (s *Settings) served(saved *savedmodel.Model) (*savedmodel.Model, error) {
	if len(s.Signatures) == 0 {
		return saved, nil
	}
	left := &savedmodel.Model{Folded: saved.Folded, Signatures: map[string]savedmodel.Signature{}}
	for _, name := range s.Signatures {
		signature, ok := saved.Signatures[name]
		if !ok {
			return nil, fault.New(fault.BadRequest, "%s serves the signature %q, which the model does not have; it "+
				"has %q", control.SettingsFile, name, saved.Names())
		}
		left.Signatures[name] = signature
	}
	return left, nil
}
