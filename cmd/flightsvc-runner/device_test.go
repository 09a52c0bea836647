// Tests of a runner whose memory is on a device, with the program built for the simulated one.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"flightsvc/internal/control"
	"flightsvc/internal/protocol"
)

// onDevice is a runner process that was built with the tag simulated_device.
type onDevice struct {
	t       *testing.T
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	reports chan control.Report
	client  flight.FlightServiceClient
}

var leaseKey = []byte("key")

// startOnDevice runs the binary on the model ints with the given memory of model and row.
func startOnDevice(t *testing.T, binary, state, folder, name string, change func(*control.Setup),
	environ ...string) *onDevice {
	t.Helper()
	r := &onDevice{t: t, cmd: exec.Command(binary), reports: make(chan control.Report, 100)}
	setup := control.Setup{Model: name, Dir: filepath.Join("..", "..", "build", "models", "ints"),
		Socket: filepath.Join(folder, name+".sock"), Key: leaseKey, LogLevel: "error", Cores: 1, Device: "GPU-1"}
	if change != nil {
		change(&setup)
	}
	r.cmd.Env = append(append(os.Environ(), "TF_CPP_MIN_LOG_LEVEL=2", "FAKENVML_STATE="+state), environ...)
	r.cmd.Stderr = os.Stderr
	var err error
	if r.stdin, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.end)
	if err := json.NewEncoder(r.stdin).Encode(setup); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		defer close(r.reports)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			var report control.Report
			if err := json.Unmarshal(lines.Bytes(), &report); err != nil {
				t.Error(err)
			}
			r.reports <- report
		}
	}()
	conn, err := grpc.NewClient("unix://"+setup.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	r.client = flight.NewFlightServiceClient(conn)
	return r
}

// end ends the process and waits for it.
func (r *onDevice) end() {
	if r.stdin != nil {
		_ = r.stdin.Close()
		for range r.reports {
		}
		_ = r.cmd.Wait()
		r.stdin = nil
	}
}

// await waits for a report.
func (r *onDevice) await(what string, is func(control.Report) bool) control.Report {
	r.t.Helper()
	for late := time.After(30 * time.Second); ; {
		select {
		case report, ok := <-r.reports:
			if !ok {
				r.t.Fatalf("the runner ended without the report %s", what)
			}
			if is(report) {
				return report
			}
		case <-late:
			r.t.Fatalf("no report %s", what)
		}
	}
}

// run sends a record batch of rows 0, 1, 2..., checks the answer and returns its metadata.
func (r *onDevice) run(rows int) (protocol.AnswerMetadata, error) {
	r.t.Helper()
	d, err := protocol.ParseDescriptor([]byte(`{"v":1,"model":"m"}`))
	if err != nil {
		r.t.Fatal(err)
	}
	if err := d.Grant(leaseKey, time.Now()); err != nil {
		r.t.Fatal(err)
	}
	ticket, err := d.Command()
	if err != nil {
		r.t.Fatal(err)
	}
	b := array.NewRecordBuilder(memory.DefaultAllocator,
		arrow.NewSchema([]arrow.Field{{Name: "i", Type: arrow.ListOf(arrow.PrimitiveTypes.Int64), Nullable: true}},
			nil))
	defer b.Release()
	for row := range rows {
		b.Field(0).(*array.ListBuilder).Append(true)
		b.Field(0).(*array.ListBuilder).ValueBuilder().(*array.Int64Builder).AppendValues([]int64{int64(row), 1, 2},
			nil)
	}
	rec := b.NewRecord()
	defer rec.Release()
	stream, err := r.client.DoExchange(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	w := flight.NewRecordWriter(stream, ipc.WithSchema(rec.Schema()))
	w.SetFlightDescriptor(&flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: ticket})
	if err := w.Write(rec); err != nil {
		r.t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		r.t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		r.t.Fatal(err)
	}
	var meta protocol.AnswerMetadata
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return meta, err
	}
	defer reader.Release()
	got := 0
	for reader.Next() {
		if err := json.Unmarshal(reader.LatestAppMetadata(), &meta); err != nil {
			r.t.Fatal(err)
		}
		total := reader.Record().Column(reader.Schema().FieldIndices("total")[0]).(*array.Int64)
		for row := range total.Len() {
			if total.Value(row) != int64(got)+3 {
				r.t.Errorf("row %d became %d", got, total.Value(row))
			}
			got++
		}
	}
	if reader.Err() == nil && got != rows {
		r.t.Errorf("%d rows for %d", got, rows)
	}
	return meta, reader.Err()
}

// TestSimulatedDevice runs runners whose memory is on a simulated device of 42 MiB.
func TestSimulatedDevice(t *testing.T) {
	folder, err := os.MkdirTemp("/tmp", "fs-") // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	binary := filepath.Join(folder, "runner")
	if text, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-tags", "simulated_device", "-o",
		binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	state := t.TempDir()
	if err := os.WriteFile(filepath.Join(state, "devices"),
		fmt.Appendf(nil, "GPU-0 Any 1 8.0 -\nGPU-1 Some_GPU %d 8.0 -\n", 42<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ready := func(r control.Report) bool { return r.Ready }
	taken := func(r *onDevice) string {
		text, err := os.ReadFile(filepath.Join(state, "GPU-1", fmt.Sprint(r.cmd.Process.Pid)))
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	first := startOnDevice(t, binary, state, folder, "first", func(s *control.Setup) { s.WarmUp = true },
		"SIMULATED_MODEL_BYTES=10485760")
	first.await("warming", func(r control.Report) bool { return r.Warming })
	first.await("ready", ready)
	if got := taken(first); got != fmt.Sprint(11<<20) { // warmed up with one row
		t.Errorf("it has %s bytes", got)
	}
	meta, err := first.run(100)
	if err != nil || meta.TFRows != 100+50+100 { // both halves of the first half fit, and two more
		t.Errorf("%d rows of runs, %v", meta.TFRows, err)
	}
	if report := first.await("of the rows that fit",
		func(r control.Report) bool { return r.DeviceBatch != 0 }); report.DeviceBatch != 25 {
		t.Errorf("%d rows fit", report.DeviceBatch)
	}
	first.await("answered", func(r control.Report) bool { return r.Answered })
	if meta, err = first.run(100); err != nil || meta.TFRows != 100 {
		t.Errorf("%d rows of runs though it knows what fits, %v", meta.TFRows, err)
	}
	if got := taken(first); got != fmt.Sprint(35<<20) {
		t.Errorf("it has %s bytes", got)
	}

	second := startOnDevice(t, binary, state, folder, "second", nil, "SIMULATED_MODEL_BYTES=8388608")
	if report := second.await("of an error",
		func(r control.Report) bool { return r.Error != "" }); !report.NoMemory ||
		!strings.Contains(report.Error, "model second does not fit into the memory of the device GPU-1: OOM") {
		t.Errorf("reported %+v", report)
	}
	second.end()

	// Not even one row of the third fits until the first has ended.
	third := startOnDevice(t, binary, state, folder, "third", nil, "SIMULATED_MODEL_BYTES=1048576",
		"SIMULATED_ROW_BYTES=10485760")
	third.await("ready", ready)
	done := make(chan error, 1)
	go func() {
		_, err := third.run(1)
		done <- err
	}()
	third.await("that it is pressed", func(r control.Report) bool { return r.Pressed })
	first.end()
	if err := <-done; err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	third.end()

	// The bound of the setup holds as well; the error of a stream says what to do.
	fourth := startOnDevice(t, binary, state, folder, "fourth", func(s *control.Setup) { s.DeviceBytes = 2 << 20 },
		"SIMULATED_MODEL_BYTES=1500000")
	fourth.await("ready", ready)
	if _, err := fourth.run(2); err == nil || !strings.Contains(err.Error(), "ResourceExhausted") ||
		!strings.Contains(err.Error(),
			"record batch 0: a run of 1 rows, the smallest possible, failed twice: the device GPU-1 has no memory") {
		t.Errorf("got %v", err)
	}
}
