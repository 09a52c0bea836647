// The command tune: it asks a front for a search, and prints the candidates and the result.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"flightsvc/internal/client"
	"flightsvc/internal/protocol"
)

// tuneCommand asks a front to tune a model.
type tuneCommand struct {
	frontFlags
	modelArgument
	Signature string `default:"serving_default" help:"Signature to measure."`
	JSON      bool   `name:"json" help:"Print only the result, as one JSON object."`
}

// Run is called by kong.
func (c *tuneCommand) Run(about *cli) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	front, err := c.started(ctx, string(about.Config))
	if err != nil {
		return err
	}
	defer func() { _ = front.Close() }()
	model, err := c.body()
	if err != nil {
		return err
	}
	body := struct {
		modelBody
		Signature string `json:"signature"`
	}{model, c.Signature}
	tried := 0
	var tuning *protocol.Tuning
	err = client.Action(ctx, front, "model.tune", body, func(told protocol.TuneResult) error {
		tuning = told.Tuning
		if tried++; told.Candidate != nil && !c.JSON {
			fmt.Fprintf(os.Stderr, "%3d  %s\n", tried, line(*told.Candidate))
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case tuning == nil:
		return errors.New("the front ended without an answer")
	case c.JSON:
		return printJSON(tuning)
	}
	return show(os.Stdout, tuning)
}

// line describes a candidate, for the lines that show progress.
func line(c protocol.Candidate) string {
	about := configuration(c.Choice)
	switch {
	case c.Reason != "":
		return about + ": " + c.Reason
	case !c.Agrees:
		return fmt.Sprintf("%s: %s rows/s, but its answers differ", about, rate(c.RowsPerSecond))
	}
	return fmt.Sprintf("%s: %s rows/s", about, rate(c.RowsPerSecond))
}

func configuration(c protocol.Choice) string {
	return fmt.Sprintf("%s, oneDNN %s, %d threads, %d at once, batches of %d", graphOf(c), onOff(c.OneDNN), c.Cores,
		c.BatchThreads, c.BatchSize)
}

func graphOf(c protocol.Choice) string {
	if c.Frozen != "" {
		return "frozen"
	}
	return "as it is"
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// rate formats rows/s: a whole number from 100, else with one decimal.
func rate(rows float64) string {
	if rows >= 100 {
		return fmt.Sprintf("%.0f", rows)
	}
	return fmt.Sprintf("%.1f", rows)
}

// show prints the candidates as a table, then the one that was chosen.
func show(out io.Writer, t *protocol.Tuning) error {
	fmt.Fprintf(out, "\nmodel %s, version %s, signature %s\n\n", t.Model, t.Version, t.Signature)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tgraph\toneDNN\tthreads\tat once\tbatch\trows/s\tto default\tagrees\t")
	for i, c := range t.Candidates {
		mark, agrees := fmt.Sprint(i+1), "yes"
		if c.Choice == t.Chosen.Choice {
			mark = "* " + mark
		}
		if !c.Agrees {
			agrees = "no"
			if c.Difference < math.MaxFloat64 && c.Reason == "" {
				agrees = fmt.Sprintf("no (%.1f times the tolerance)", c.Difference)
			}
		}
		speed, relative := rate(c.RowsPerSecond), fmt.Sprintf("%.2f", c.Relative)
		if c.Reason != "" {
			speed, relative = "-", "-"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\t\n", mark, graphOf(c.Choice), onOff(c.OneDNN), c.Cores,
			c.BatchThreads, c.BatchSize, speed, relative, agrees)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(out)
	if t.NotFrozen != "" {
		fmt.Fprintf(out, "freezing: the graph is served as it is: %s\n", t.NotFrozen)
	}
	if t.Busy > muchBusy {
		fmt.Fprintf(out, "other programs used %.0f %% of this machine's processors, so the speeds may be wrong; tune "+
			"again when it is idle\n", 100*t.Busy)
	}
	name, flags := cpu()
	fmt.Fprintf(out, "CPU: %s, with %s\n", name, strings.Join(flags, " "))
	fmt.Fprintf(out, "chosen: %s: %.2f times the default\n", configuration(t.Chosen.Choice), t.Chosen.Relative)
	_, err := fmt.Fprintf(out, "stored for this kind of machine (%s) in %s; the next load of the model uses it\n",
		t.Machine, t.Stored)
	return err
}

// muchBusy is the share of the processors that others may use without a warning.
const muchBusy = 0.2

// shown are the flags of a CPU that decide which of TensorFlow's kernels it can run.
var shown = []string{"sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16",
	"amx_int8"}

// cpu returns the name of this machine's CPU and which of the shown flags it has.
func cpu() (name string, flags []string) {
	text, _ := os.ReadFile("/proc/cpuinfo") // empty if it cannot be read
	name = "unknown"
	for text := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(text, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			name = strings.TrimSpace(value)
		case "flags":
			for _, flag := range strings.Fields(value) {
				if slices.Contains(shown, flag) {
					flags = append(flags, flag)
				}
			}
			return name, flags
		}
	}
	return name, flags
}
