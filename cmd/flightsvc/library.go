// The search for libtensorflow, and for a Python that can freeze models.

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

// findPackage is Python code that prints the folder of the package tensorflow. It does not import the package, which
// would take seconds.
const findPackage = `import importlib.util as u; s = u.find_spec("tensorflow")
print(s.submodule_search_locations[0] if s else "")`

// library returns a function that finds the folder of libtensorflow: the folder that is set, else that of the package
// tensorflow in the Python that is set, or in that of the active virtual environment, or in python3. Its errors say
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
					"%w; set --libtensorflow (FLIGHTSVC_LIBTENSORFLOW) to a folder that holds %s",
					python, err, modelcache.LibraryFile)
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

// ask runs Python code and returns what it prints. Its error includes the last line that Python wrote on standard
// error.
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

// askGrace bounds how long the output of a killed interpreter is waited for: its children may keep it open.
const askGrace = time.Second

// pythons returns the interpreters to ask, in order: only the one that is set, else that of the active virtual
// environment, and python3.
func pythons(interpreter string) []string {
	if interpreter != "" {
		return []string{interpreter}
	}
	if env := os.Getenv("VIRTUAL_ENV"); env != "" {
		return []string{filepath.Join(env, "bin", "python"), "python3"}
	}
	return []string{"python3"}
}

// install is the command that installs libtensorflow.
const install = "pip install tensorflow-cpu==2.21.0"

var errNoLibrary = errors.New("libtensorflow is not installed here; run " + install + " in the Python environment in " +
	"use, or set --libtensorflow (FLIGHTSVC_LIBTENSORFLOW) to a folder that holds " + modelcache.LibraryFile)

// findFreezing is Python code that exits with 0 if the packages tensorflow and flightsvc are installed. It imports
// neither.
const findFreezing = `import importlib.util as u, sys
sys.exit(not (u.find_spec("tensorflow") and u.find_spec("flightsvc")))`

// freezer returns a function that finds a Python with both TensorFlow and flightsvc: that of the environment to which
// the folder of libtensorflow belongs, else one of those that library asks.
func freezer(interpreter string) func(context.Context, string) (string, error) {
	return func(ctx context.Context, library string) (string, error) {
		// library is ENV/lib/python3.X/site-packages/tensorflow
		own := filepath.Join(library, "..", "..", "..", "..", "bin", "python")
		for _, python := range append([]string{own}, pythons(interpreter)...) {
			if _, err := ask(ctx, python, findFreezing); err == nil {
				return python, nil
			}
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "", errors.New("no Python here has both TensorFlow and flightsvc, which freezing needs; install both " +
			"into one environment and set --python (FLIGHTSVC_PYTHON) to it")
	}
}
