package gpu

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every row of the table in docs/gpu.md names a test that is there.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../docs/gpu.md")
	if err != nil {
		t.Fatal(err)
	}
	defined := map[string]bool{}
	functions := regexp.MustCompile(`(?m)^(?:func |def )([Tt]est\w+)\(`)
	for _, folder := range []string{".", "../cmd", "../handlers", "../internal", "../modelcache",
		"../pyspark-shim/tests"} {
		err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			name := entry.Name()
			if err != nil || entry.IsDir() || !strings.HasSuffix(name, "_test.go") &&
				!(strings.HasPrefix(name, "test_") && strings.HasSuffix(name, ".py")) {
				return err
			}
			source, err := os.ReadFile(path)
			for _, match := range functions.FindAllSubmatch(source, -1) {
				defined[string(match[1])] = true
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	_, table, found := strings.Cut(string(text), "| behaviour | test | on |\n| --- | --- | --- |\n")
	rows := strings.Split(strings.TrimRight(table, "\n"), "\n")
	if !found || len(rows) < 20 {
		t.Fatalf("the table of tests has %d rows", len(rows))
	}
	named := regexp.MustCompile("`([Tt]est\\w+)`")
	for _, row := range rows {
		cells := strings.Split(row, " | ")
		if len(cells) != 3 || !named.MatchString(cells[1]) {
			t.Errorf("no test in the row %q", row)
			continue
		}
		for _, match := range named.FindAllStringSubmatch(cells[1], -1) {
			if !defined[match[1]] {
				t.Errorf("docs/gpu.md names %s, which is not there", match[1])
			}
		}
	}
}
