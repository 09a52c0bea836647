package modelcache

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// TestRunnerLogIsJSON has a runner write what libjpeg says of 20,001 pictures between two lines of its own log.
func TestRunnerLogIsJSON(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&out),
		zap.InfoLevel))
	written := &runnerLog{out: &out, log: log}
	own := `{"level":"info","msg":"its own"}`
	text := own + "\n"
	for range 20_001 {
		text += "Corrupt JPEG data: premature end of data segment\n"
	}
	text += "\n{\"cut\": " + strings.Repeat("x", 2*maxLine) + "\n" + own + "\npanic: without an end"
	for rest := []byte(text); len(rest) > 0; {
		n := min(len(rest), 999) // lines come in parts
		if _, err := written.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	written.close()
	count := map[string]int{}
	lines := bufio.NewScanner(&out)
	for lines.Scan() {
		var line struct {
			Msg  string
			Left int `json:"lines left out"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%q is no JSON", lines.Text())
		}
		count[line.Msg]++
		count["left out"] += line.Left
	}
	want := map[string]int{"its own": 2, "runner wrote": 200, "runner wrote more than is logged": 1, "left out": 19_803}
	if fmt.Sprint(count) != fmt.Sprint(want) {
		t.Errorf("the log has %v, want %v", count, want)
	}
}
