// Commands about models, the status of a front, and devices.

package main

import (
	"context"
	"fmt"
	"os"

	"flightsvc/internal/client"
	"flightsvc/internal/protocol"
)

type modelsCommand struct {
	frontFlags
	JSON bool `name:"json" help:"Print JSON for scripts."`
}

// listed is a model as flightsvc models --json prints it.
type listed struct {
	protocol.IndexEntry
	Memory int64  `json:"memory"` // bytes, 0 where it is not in memory
	Device string `json:"device"` // UUID of a GPU, "" for the CPU
}

// Run is called by kong.
func (c *modelsCommand) Run(line *cli) error {
	ctx := context.Background()
	front, err := c.started(ctx, string(line.Config))
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	index, err := client.Ask[protocol.Index](ctx, front, "repository.index", struct{}{})
	if err != nil {
		return err
	}
	status, err := client.Ask[protocol.Status](ctx, front, "status", struct{}{})
	if err != nil {
		return err
	}
	list := make([]listed, 0, len(index.Models))
	rows := make([][]string, 0, len(index.Models))
	for _, entry := range index.Models {
		about, device := listed{IndexEntry: entry}, ""
		for _, model := range status.Models {
			if model.Model == entry.Name && model.Version == entry.Version {
				about.Memory, about.Device, device = model.Memory, model.Device, deviceName(model.Device)
			}
		}
		list = append(list, about)
		rows = append(rows, []string{entry.Name, entry.Version, entry.State, size(about.Memory), device, entry.Reason})
	}
	if c.JSON {
		return printJSON(list)
	}
	return table(os.Stdout, []string{"MODEL", "VERSION", "STATE", "MEMORY", "DEVICE", "REASON"}, rows)
}

// modelArgument are the arguments of a command that name a model.
type modelArgument struct {
	Model        string `arg:"" help:"${model_help}"`
	ModelVersion string `placeholder:"VERSION" help:"A number, a label, or latest. Default: latest."`
}

// modelBody is the body of an action on one model.
type modelBody struct {
	Model   string `json:"model"`
	Version string `json:"version,omitempty"`
	Device  string `json:"device,omitempty"`
}

func (m modelArgument) body() (modelBody, error) {
	model, err := reference(m.Model)
	return modelBody{Model: model, Version: m.ModelVersion}, err
}

type loadCommand struct {
	frontFlags
	modelArgument
	Device string `placeholder:"DEVICE" help:"${device_help}"`
}

// Run is called by kong.
func (c *loadCommand) Run(line *cli) error {
	body, err := c.body()
	if err != nil {
		return err
	}
	ctx := context.Background()
	front, err := c.started(ctx, string(line.Config))
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	body.Device = c.Device
	return say(ctx, front, "model.load", body)
}

type unloadCommand struct {
	frontFlags
	modelArgument
}

// Run is called by kong.
func (c *unloadCommand) Run() error {
	body, err := c.body()
	if err != nil {
		return err
	}
	ctx := context.Background()
	front, err := c.running(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	return say(ctx, front, "model.unload", body)
}

// say sends an action on a model and prints the state that the model is in afterwards.
func say(ctx context.Context, front *client.Client, action string, body modelBody) error {
	state, err := client.Ask[protocol.ModelState](ctx, front, action, body)
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%s version %s: %s\n", state.Model, state.Version, state.State)
	return err
}

type statusCommand struct {
	frontFlags
	JSON bool `name:"json" help:"Print the front's whole answer as JSON."`
}

// Run is called by kong.
func (c *statusCommand) Run() error {
	ctx := context.Background()
	front, err := c.running(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	if c.JSON {
		whole, err := client.Ask[map[string]any](ctx, front, "status", struct{}{})
		if err != nil {
			return err
		}
		return printJSON(whole)
	}
	status, err := client.Ask[protocol.Status](ctx, front, "status", struct{}{})
	if err != nil {
		return err
	}
	fmt.Printf("flightsvc %s (%s), %s, at %s\n", status.Flightsvc, status.Build, status.Server, front.Endpoint())
	if status.Memory.Budget > 0 {
		fmt.Printf("memory for models: %s, of which %s are reserved\n", size(status.Memory.Budget),
			orNone(size(status.Memory.Reserved)))
	}
	if len(status.Models) == 0 {
		fmt.Println("no model is in memory")
		return nil
	}
	rows := make([][]string, len(status.Models))
	for i, m := range status.Models {
		rows[i] = []string{m.Model, m.Version, m.State, fmt.Sprint(m.Streams), size(m.Memory), size(m.Reserved),
			deviceName(m.Device), m.Form, tuned(m.Tuned), m.Reason}
	}
	fmt.Println()
	err = table(os.Stdout, []string{"MODEL", "VERSION", "STATE", "STREAMS", "MEMORY", "RESERVED", "DEVICE", "FORM",
		"TUNED", "REASON"}, rows)
	for _, m := range status.Models {
		if m.NotFrozen != "" && m.Form == protocol.FormSaved {
			fmt.Printf("\n%s version %s is served as it was saved: %s\n", m.Model, m.Version, m.NotFrozen)
		}
	}
	return err
}

func orNone(text string) string {
	if text == "" {
		return "none"
	}
	return text
}

// tuned describes a configuration that tuning found, for the table of status.
func tuned(choice *protocol.Choice) string {
	if choice == nil {
		return ""
	}
	text := ""
	if choice.Frozen != "" {
		text += "frozen, "
	}
	if choice.OneDNN {
		text += "oneDNN, "
	}
	return text + fmt.Sprintf("%d x %d threads, batch %d", choice.BatchThreads, choice.Cores, choice.BatchSize)
}

type devicesCommand struct {
	frontFlags
	JSON bool `name:"json" help:"Print JSON for scripts."`
}

// Run is called by kong.
func (c *devicesCommand) Run(line *cli) error {
	ctx := context.Background()
	front, err := c.started(ctx, string(line.Config))
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	status, err := client.Ask[protocol.Status](ctx, front, "status", struct{}{})
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(append([]protocol.Device{}, status.Devices...))
	}
	if len(status.Devices) == 0 {
		fmt.Println("no GPU; models run on the CPU")
		return nil
	}
	rows := make([][]string, len(status.Devices))
	for i, d := range status.Devices {
		state, busy := "healthy", ""
		if !d.Healthy {
			state = "not healthy: " + d.Reason
		}
		if d.Utilisation >= 0 {
			busy = fmt.Sprintf("%d %%", d.Utilisation)
		}
		rows[i] = []string{d.Index, d.UUID, d.Name, size(d.Memory), size(d.Free), busy, d.Compute, state}
	}
	return table(os.Stdout, []string{"INDEX", "UUID", "NAME", "MEMORY", "FREE", "BUSY", "COMPUTE", "STATE"}, rows)
}
