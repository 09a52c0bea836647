// Command flightsvc is the front: the Flight server that callers find, and the command line.
// It never links TensorFlow, so it starts in milliseconds and outlives every model.
package main

import (
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"flightsvc/internal/build"
	"flightsvc/internal/config"
)

// cli is the command line. Its defaults and variables are those of package config.
type cli struct {
	Version kong.VersionFlag `help:"Print version and build, and exit."`
	Config  kong.ConfigFlag  `placeholder:"FILE" help:"JSON file with settings, for instance {\"model_root\": \"/models\"}."`
	Serve   serveCommand     `cmd:"" help:"Serve models on a Unix socket until a signal, the owner's end, or idleness."`
}

type serveCommand struct {
	config.Serve
}

// Run is called by kong.
func (c *serveCommand) Run() error {
	if err := c.Validate(); err != nil {
		return err
	}
	if c.Detach {
		return detach(c.Serve)
	}
	return serve(c.Serve)
}

func main() {
	ctx := kong.Parse(&cli{},
		kong.Name("flightsvc"),
		kong.Description("Deep learning on Spark DataFrames: an Arrow Flight server beside each executor."),
		kong.Configuration(kong.JSON),
		kong.Vars{"version": build.Version + " (" + build.ID() + ")"},
		kong.UsageOnError())
	if err := ctx.Run(); err != nil {
		report(err)
		os.Exit(1)
	}
}

// report says why the command failed: one sentence, to the terminal or, from a detached
// front, to the command that started it.
func report(err error) {
	if os.Getenv(detachedVariable) != "" {
		_ = hello{Error: err.Error()}.print()
	}
	fmt.Fprintln(os.Stderr, "flightsvc: "+err.Error())
}
