// Command flightsvc is the front: the Flight server that callers find, and the command line.
// It does not link TensorFlow, so it starts in some tens of milliseconds and survives the crash of any model.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"

	"flightsvc/internal/build"
	"flightsvc/internal/config"
)

// cli is the command line. Package config defines the settings of serve.
type cli struct {
	Version kong.VersionFlag `help:"Print version and build, and exit."`
	Config  kong.ConfigFlag  `placeholder:"FILE" help:"${config_help}"`
	Serve   serveCommand     `cmd:"" help:"${serve_help}"`
	Models  modelsCommand    `cmd:"" help:"List the models that the front knows."`
	Load    loadCommand      `cmd:"" help:"Load a model into memory."`
	Unload  unloadCommand    `cmd:"" help:"Unload a model from memory."`
	Status  statusCommand    `cmd:"" help:"Show which models are in memory."`
	Devices devicesCommand   `cmd:"" help:"List the GPUs that the front sees."`
	Tune    tuneCommand      `cmd:"" help:"${tune_help}"`
	Predict pythonCommand    `cmd:"" passthrough:"" help:"Run a model over the rows of files."`
	Freeze  pythonCommand    `cmd:"" passthrough:"" help:"Replace a model's variables by constants."`
	Conf    pythonCommand    `cmd:"" passthrough:"" help:"Print the configuration of the Spark plugin."`
}

type serveCommand struct {
	config.Serve
}

// Run is called by kong.
func (c *serveCommand) Run() error {
	if err := c.Validate(); err != nil {
		return err
	}
	if err := checkLimits(); err != nil {
		return err
	}
	if c.Detach && os.Getenv(detachedVariable) == "" {
		return detach(c.Serve)
	}
	return serve(c.Serve)
}

// Exit codes, besides 0.
const (
	exitFailed = 1
	exitUsage  = 2
)

// helps are the values of ${...} in help tags, for texts that are too long for a tag, and the version.
var helps = kong.Vars{
	"version":       build.Version + " (" + build.ID() + ")",
	"config_help":   `JSON file with settings, for instance {"model_root": "/models"}.`,
	"tune_help":     "Measure which configuration runs a model fastest, and use it from the next load.",
	"serve_help":    "Serve models on a Unix socket until a signal arrives, the owner ends, or the server is idle.",
	"endpoint_help": "The front to connect to. Default: this user's own, in the folder user of the run-dir.",
	"run_dir_help":  "Folder for sockets. Default: $XDG_RUNTIME_DIR/flightsvc, else /tmp/flightsvc-UID.",
	"model_help": "A name in the front's repository, a folder with a SavedModel or with its numbered versions, " +
		"a URI, or a digest.",
	"device_help": "auto, cpu, gpu, a UUID, or numbers as nvidia-smi prints them. Default: auto.",
}

func main() {
	var line cli
	parser := kong.Must(&line,
		kong.Name("flightsvc"),
		kong.Description("Deep learning on Spark DataFrames: an Arrow Flight server beside each executor."),
		kong.Configuration(fileSettings),
		// kong passes 0 after help, and 1 for a wrong command line
		kong.Exit(func(code int) { os.Exit(code * exitUsage) }),
		helps)
	args := os.Args[1:]
	if len(args) == 0 {
		args = []string{"--help"}
	}
	ctx, err := parser.Parse(args)
	parser.FatalIfErrorf(err)
	if err := ctx.Run(&line); err != nil {
		complain(err)
		os.Exit(exitFailed)
	}
}

// settingsFile reads the configuration file. kong's own reader lets the file override the environment and ignores
// unknown keys; this one lets the environment override the file, and refuses unknown keys.
type settingsFile struct {
	kong.Resolver
	keys map[string]any
}

func fileSettings(r io.Reader) (kong.Resolver, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	file := settingsFile{}
	if err := json.Unmarshal(text, &file.keys); err != nil {
		return nil, fmt.Errorf("the file must hold one JSON object: %w", err)
	}
	file.Resolver, err = kong.JSON(bytes.NewReader(text))
	return file, err
}

// Resolve is part of kong.Resolver.
func (f settingsFile) Resolve(ctx *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	for _, name := range flag.Envs {
		if _, set := os.LookupEnv(name); set {
			return nil, nil
		}
	}
	value, err := f.Resolver.Resolve(ctx, parent, flag)
	if number, ok := value.(float64); ok { // kong parses text, as from the command line
		return strconv.FormatFloat(number, 'f', -1, 64), err
	}
	return value, err
}

// Validate is part of kong.Resolver.
func (f settingsFile) Validate(app *kong.Application) error {
	known := map[string]bool{}
	for _, command := range app.Children {
		for _, flag := range command.Flags {
			if len(flag.Envs) > 0 {
				known[strings.ReplaceAll(flag.Name, "-", "_")] = true
			}
		}
	}
	for key := range f.keys {
		if !known[key] {
			return fmt.Errorf("the configuration file has an unknown setting %q; the settings are %s", key,
				strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
	}
	return nil
}

// complain prints why the command failed on standard error. A detached front also reports it to the command that
// started it.
func complain(err error) {
	if os.Getenv(detachedVariable) != "" {
		_ = hello{Error: err.Error()}.print()
	}
	fmt.Fprintln(os.Stderr, "flightsvc: "+err.Error())
}
