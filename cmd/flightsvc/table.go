package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"flightsvc/internal/config"
	"flightsvc/internal/fault"
)

// table prints rows under a header, in columns; an empty cell is a dash.
func table(w io.Writer, header []string, rows [][]string) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(cells []string) {
		for i, cell := range cells {
			if cell = cmp.Or(fault.Printable(cell), "-"); i < len(cells)-1 { // no spaces after the last cell
				cell += "\t"
			}
			fmt.Fprint(out, cell)
		}
		fmt.Fprintln(out)
	}
	line(header)
	for _, row := range rows {
		line(row)
	}
	return out.Flush()
}

// printJSON prints an answer as indented JSON.
func printJSON(answer any) error {
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(answer)
}

// size formats a number of bytes for people; it is empty for 0.
func size(bytes int64) string {
	if bytes <= 0 {
		return ""
	}
	return config.Bytes(bytes).String()
}

// deviceName returns the name of a device to print: its UUID, or cpu.
func deviceName(device string) string { return cmp.Or(device, "cpu") }
