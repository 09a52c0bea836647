// Libraries: where libtensorflow is, and a Python that can freeze models.

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"flightsvc/modelcache"
)

// findPackage is asked of a Python interpreter; it finds the package without importing it.
const findPackage = `import importlib.util as u; s = u.find_spec("tensorflow")
print(s.submodule_search_locations[0] if s else "")`

// library returns how the cache finds libtensorflow: the folder that was set, else that of the
// tensorflow package of the Python that was set, or of the active virtual environment, or of python3. Its errors say
// what to install.
func library(setting, interpreter string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		if setting != "" {
			if _, err := os.Stat(filepath.Join(setting, modelcache.LibraryFile)); err != nil {
				return "", fmt.Errorf("libtensorflow is set to %s, which holds no %s; run %s and remove the setting, "+
					"or set it to a folder that holds the file", setting, modelcache.LibraryFile, install)
			}
			return setting, nil
		}
		var failed error
		for _, python := range pythons(interpreter) {
			out, err := ask(ctx, python, findPackage)
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, exec.ErrNotFound) {
				failed = fmt.Errorf("whether libtensorflow is installed is not known, since %s could not be asked: "+
					"%w; "+
					"set --libtensorflow (FLIGHTSVC_LIBTENSORFLOW) to a folder that holds "+
					"%s", python, err, modelcache.LibraryFile)
			}
			if err != nil || out == "" {
				continue
			}
			if _, err := os.Stat(filepath.Join(out, modelcache.LibraryFile)); err == nil {
				return out, nil
			}
		}
		return "", cmp.Or(failed, errNoLibrary)
	}
}

// ask runs a line of Python and returns what it prints. Its error has the last line that Python said.
func ask(ctx context.Context, python, line string) (string, error) {
	cmd := exec.CommandContext(ctx, python, "-c", line) //nolint:gosec // the user's own interpreter
	cmd.WaitDelay = askGrace
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		said := strings.Split(strings.TrimSpace(string(exit.Stderr)), "\n")
		err = fmt.Errorf("%w: %s", err, said[len(said)-1])
	}
	return strings.TrimSpace(string(out)), err
}

// askGrace is how long an interpreter that was ended may leave its output open: its children may have it, too.
const askGrace = time.Second

// pythons returns the interpreters to ask: the one that was set alone, else that of the active virtual environment, and
// python3.
func pythons(interpreter string) []string {
	if interpreter != "" {
		return []string{interpreter}
	}
	if env := os.Getenv("VIRTUAL_ENV"); env != "" {
		return []string{filepath.Join(env, "bin", "python"), "python3"}
	}
	return []string{"python3"}
}

// install is how a person gets the library.
const install = "pip install tensorflow-cpu==2.21.0"

var errNoLibrary = errors.New("libtensorflow is not installed here; run " + install + " in the Python environment in " +
	"use, or set --libtensorflow (FLIGHTSVC_LIBTENSORFLOW) to a folder that holds " + modelcache.LibraryFile)

// findFreezing is asked of a Python interpreter; it finds the packages without importing them.
const findFreezing = `import importlib.util as u, sys
sys.exit(not (u.find_spec("tensorflow") and u.find_spec("flightsvc")))`

// freezer returns how the cache finds an interpreter that has both TensorFlow and flightsvc: that of the environment
// which the folder of libtensorflow belongs to, else as library does.
func freezer(interpreter string) func(context.Context, string) (string, error) {
	return func(ctx context.Context, library string) (string, error) {
		// of ENV/lib/python3.X/site-packages/tensorflow
		own := filepath.Join(library, "..", "..", "..", "..", "bin", "python")
		for _, python := range append([]string{own}, pythons(interpreter)...) {
			if _, err := ask(ctx, python, findFreezing); err == nil {
				return python, nil
			}
		}
		return "", errors.New("no Python here has both TensorFlow and flightsvc, which freezing needs; install both " +
			"into one environment and set --python (FLIGHTSVC_PYTHON) to it")
	}
}
