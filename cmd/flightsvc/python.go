package main

import (
	"fmt"

	"github.com/alecthomas/kong"
)

// pythonCommand is a command of the Python package; it is declared here so that --help lists it.
type pythonCommand struct {
	Arguments []string `arg:"" optional:""`
}

// Run is called by kong.
func (pythonCommand) Run(ctx *kong.Context) error {
	name := ctx.Selected().Name
	return fmt.Errorf("%s is a command of the Python package, and this is the program alone: pip install the wheel "+
		"of flightsvc, then run flightsvc %s", name, name)
}
