package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// TestDocumented holds docs/settings.md to this table: a row with all four spellings, and a word on each.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "settings.md"))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	table := reflect.TypeFor[Serve]()
	for i := range table.NumField() {
		variable, ok := table.Field(i).Tag.Lookup("env")
		if !ok {
			continue // of one start, not a setting
		}
		key := strings.ToLower(strings.TrimPrefix(variable, "FLIGHTSVC_"))
		flag := strings.ReplaceAll(key, "_", "-")
		known[variable] = true
		spark := regexp.MustCompile("_[a-z]").ReplaceAllStringFunc(key,
			func(s string) string { return strings.ToUpper(s[1:]) })
		row := "| `--" + flag + "` | `" + variable + "` | `" + key + "` | `spark.flightsvc." + spark + "` | "
		if !strings.Contains(string(text), row) {
			t.Errorf("docs/settings.md has no row %s", row)
		}
		if !strings.Contains(string(text), "**"+flag+"**") {
			t.Errorf("docs/settings.md does not say what **%s** means", flag)
		}
	}
	for _, variable := range regexp.MustCompile(`\bFLIGHTSVC_[A-Z_]+`).FindAllString(string(text), -1) {
		ofTheShim := variable == "FLIGHTSVC_BINARY" || variable == "FLIGHTSVC_RETRY_TIMEOUT"
		if !known[variable] && !ofTheShim {
			t.Errorf("docs/settings.md has %s, which is no setting", variable)
		}
	}
}
