package modelcache

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"

	"flightsvc/internal/fault"
)

// allowedLibraries returns the files of custom operations that a model loads, without links. They are programs, so
// each has to be one of the files, or below one of the folders, of the setting op-libraries; a model cannot allow
// its own. Its faults are Precondition and name the file and the setting.
func (c *Cache) allowedLibraries(model Model) ([]string, error) {
	var list []string
	for _, path := range model.Settings.OpLibraries {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fault.New(fault.Precondition, "model %s: its op_libraries (%s) name %s: %w", model.Ref, SettingsFile, path, err)
		}
		if !c.allowed(real) {
			return nil, fault.New(fault.Precondition, "model %s: its op_libraries (%s) name %s, which this server does not allow; it allows %s (op-libraries, FLIGHTSVC_OP_LIBRARIES)",
				model.Ref, SettingsFile, real, cmp.Or(strings.Join(c.options.OpLibraries, ", "), "none"))
		}
		list = append(list, real)
	}
	return list, nil
}

func (c *Cache) allowed(path string) bool {
	for _, allowed := range c.options.OpLibraries {
		allowed, err := filepath.Abs(allowed)
		if err == nil {
			allowed, err = filepath.EvalSymlinks(allowed)
		}
		if err != nil {
			continue // what is not there allows nothing
		}
		info, err := os.Stat(allowed)
		if path == allowed || err == nil && info.IsDir() && strings.HasPrefix(path, allowed+string(filepath.Separator)) {
			return true
		}
	}
	return false
}
