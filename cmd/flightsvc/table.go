package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"flightsvc/internal/fault"
)

// table prints rows under a header, in columns; an empty cell is a dash.
func table(w io.Writer, header []string, rows [][]string) error {
	out := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(cells []string) {
		for i, cell := range cells {
			if cell = cmp.Or(fault.Printable(cell), "-"); i < len(cells)-1 { // no spaces after the last
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

// printJSON prints an answer for scripts.
func printJSON(answer any) error {
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(answer)
}

// size returns bytes for people; nothing is nothing.
func size(bytes int64) string {
	if bytes <= 0 {
		return ""
	}
	const unit = 1024
	value, units := float64(bytes), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for len(units) > 1 && value >= 999.5 { // four digits would be too many
		value, units = value/unit, units[1:]
	}
	return fmt.Sprintf("%.3g %s", value, units[0])
}

// deviceName returns a device for people.
func deviceName(device string) string { return cmp.Or(device, "cpu") }

// near returns those of names that may have been meant, as the end of a sentence.
func near(name string, names []string) string {
	var similar []string
	for _, other := range names {
		if distance(strings.ToLower(name), strings.ToLower(other)) <= max(1, len(name)/3) {
			similar = append(similar, other)
		}
	}
	if len(similar) > 0 {
		return fmt.Sprintf("did you mean %q?", similar)
	}
	const most = 20
	if len(names) > most {
		return fmt.Sprintf("there are %q and %d more", names[:most], len(names)-most)
	}
	return fmt.Sprintf("there are %q", names)
}

// distance is Levenshtein's: how many bytes to insert, remove or change.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
