package repository

import (
	"cmp"
	"os"
	"path/filepath"
	"strings"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
)

// AllowedLibraries returns the files of custom operations that a model loads, with links resolved. They are programs,
// so each has to be one of the files, or below one of the folders, of the server's setting op-libraries; a model cannot
// allow its own. Its faults are Precondition and name the file and the setting.
func (r *Repository) AllowedLibraries(model Model) ([]string, error) {
	var list []string
	for _, path := range model.Settings.OpLibraries {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fault.New(fault.Precondition, "model %s: its op_libraries (%s) name %s: %w", model.Ref,
				control.SettingsFile, path, err)
		}
		if !r.allowed(real) {
			return nil, fault.New(fault.Precondition, "model %s: its op_libraries (%s) name %s, which this server "+
				"does not allow; it allows %s (op-libraries, FLIGHTSVC_OP_LIBRARIES)",
				model.Ref, control.SettingsFile, real, cmp.Or(strings.Join(r.options.OpLibraries, ", "), "none"))
		}
		list = append(list, real)
	}
	return list, nil
}

func (r *Repository) allowed(path string) bool {
	for _, allowed := range r.options.OpLibraries {
		allowed, err := filepath.Abs(allowed)
		if err == nil {
			allowed, err = filepath.EvalSymlinks(allowed)
		}
		if err != nil {
			continue // a file that does not exist allows nothing
		}
		info, err := os.Stat(allowed)
		below := strings.HasPrefix(path, allowed+string(filepath.Separator))
		if path == allowed || err == nil && info.IsDir() && below {
			return true
		}
	}
	return false
}
