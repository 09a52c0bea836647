// Tests of measuring: speeds, compared outputs, and signatures that random rows cannot feed.

package main

import (
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

func measurement(t *testing.T, sizes ...int) control.Setup {
	t.Helper()
	return control.Setup{Model: "m", Cores: 2, Batching: control.Batching{NumBatchThreads: 2},
		Measure: &control.Measurement{
			Signature: savedmodel.DefaultSignature, BatchSizes: sizes, Window: 10 * time.Millisecond, Windows: 3,
			Seed:   7,
			Folder: t.TempDir(),
		}}
}

func TestMeasure(t *testing.T) {
	e, live := loadModel(t, "ints"), tensorflow.Live()
	setup := measurement(t, 1, 8, 1<<30) // the last one does not fit into a run
	found, err := measured(setup, e, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 2 || found[0].BatchSize != 1 || found[1].BatchSize != 8 {
		t.Fatalf("found %+v", found)
	}
	for _, m := range found {
		if m.Median <= 0 || m.Best < m.Median {
			t.Errorf("%+v", m)
		}
	}
	answers, err := control.ReadAnswers(setup.Measure.Folder)
	if err != nil || len(answers) != 2 || answers[0].Name != "doubled" ||
		!slices.Equal(answers[0].Shape, []int64{answerRows, 3}) {
		t.Fatalf("answers %+v, %v", answers, err)
	}
	total := make([]int64, answerRows) // of rows of zeros and ones, each doubled in the first output
	for i := range total {
		for j := range 3 {
			n := int64(binary.LittleEndian.Uint64(answers[0].Data[8*(3*i+j):]))
			if n != 0 && n != 2 {
				t.Errorf("a doubled number is %d", n)
			}
			total[i] += n / 2
		}
		if got := int64(binary.LittleEndian.Uint64(answers[1].Data[8*i:])); got != total[i] {
			t.Errorf("row %d has the total %d, want %d", i, got, total[i])
		}
	}
	again := measurement(t, 1)
	if _, err := measured(again, e, zap.NewNop()); err != nil {
		t.Fatal(err)
	}
	if same, err := control.ReadAnswers(again.Measure.Folder); err != nil ||
		!slices.Equal(same[0].Data, answers[0].Data) {
		t.Errorf("one seed gives two answers, %v", err)
	}
	if n := tensorflow.Live() - live; n != 0 {
		t.Errorf("%d tensors are left", n)
	}
}

// TestMeasureStopsAtLongRuns leaves out a batch that would take too long, as the time of the one before predicts.
func TestMeasureStopsAtLongRuns(t *testing.T) {
	setup := measurement(t, 1, 2, 64)
	setup.Measure.LongestRun = time.Nanosecond
	found, err := measured(setup, loadModel(t, "mlp"), zap.NewNop())
	if err != nil || len(found) != 1 {
		t.Errorf("found %+v, %v", found, err)
	}
}

func TestNotMeasurable(t *testing.T) {
	for model, text := range map[string]string{"strings": `input "s" takes strings`,
		"sums": "an unknown dimension other than the rows", "echo": "an unknown dimension"} {
		_, err := measured(measurement(t, 1), loadModel(t, model), zap.NewNop())
		expect.Fault(t, err, fault.BadRequest, "model m, signature serving_default", text)
	}
}

func TestMadeUpRows(t *testing.T) {
	for _, dtype := range []savedmodel.DType{savedmodel.Float32, savedmodel.Float64, savedmodel.Float16,
		savedmodel.Bfloat16, savedmodel.Int8, savedmodel.Uint64, savedmodel.Bool} {
		data := make([]byte, 64*dtype.Size())
		fill(data, dtype, random(1))
		kinds := map[string]bool{}
		for at := 0; at < len(data); at += dtype.Size() {
			kinds[string(data[at:at+dtype.Size()])] = true
		}
		if len(kinds) < 2 {
			t.Errorf("%s: all elements are the same", dtype)
		}
	}
}
