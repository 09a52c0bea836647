// Tests of the real programs: a front with real runners, and how they end.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/apache/arrow/go/v15/arrow"
	"github.com/apache/arrow/go/v15/arrow/array"
	"github.com/apache/arrow/go/v15/arrow/flight"
	"github.com/apache/arrow/go/v15/arrow/ipc"
	"github.com/apache/arrow/go/v15/arrow/memory"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"flightsvc/internal/expect"
	"flightsvc/internal/protocol"
	"flightsvc/internal/rundir"
)

// These tests run the real programs: a front that is built here without cgo, as for a release, and a runner on the
// real libtensorflow with the models of pyspark-shim/tests/make_models.py.

var (
	binary  string // of the front; the runner lies beside it
	libs    string // folder of libtensorflow
	modelOf func(name string) string
)

func TestMain(m *testing.M) {
	code, err := prepare(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func prepare(m *testing.M) (int, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return 0, err
	}
	libs = filepath.Join(root, "build", "libtensorflow")
	modelOf = func(name string) string { return filepath.Join(root, "build", "models", name) }
	for _, needed := range []string{libs, modelOf("mlp")} {
		if _, err := os.Stat(needed); err != nil {
			return 0, fmt.Errorf("%w; make build build/models/.done makes it", err)
		}
	}
	dir, err := os.MkdirTemp("", "flightsvc-bin-")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	// with the flags of the Makefile, so that little is compiled again
	for _, name := range []string{"flightsvc", "flightsvc-runner"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -extldflags=-Wl,-z,lazy", "-o",
			filepath.Join(dir, name), "flightsvc/cmd/"+name)
		cmd.Env = append(os.Environ(), "CPATH="+filepath.Join(libs, "include"), "LIBRARY_PATH="+libs)
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	binary = filepath.Join(dir, "flightsvc")
	return m.Run(), nil
}

// place is a run-dir with a short path, as sockets need, and a home for logs.
type place struct{ run, home string }

func newPlace(t *testing.T) place {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "fs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return place{run: filepath.Join(dir, "run"), home: filepath.Join(dir, "home")}
}

// command is a flightsvc command in an environment of its own.
func (p place) command(args ...string) *exec.Cmd {
	cmd := exec.Command(binary, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.home, "FLIGHTSVC_RUN_DIR=" + p.run,
		"FLIGHTSVC_LIBTENSORFLOW=" + libs}
	return cmd
}

// empty reports whether fronts have left nothing in the run-dir.
func (p place) empty() bool {
	entries, err := os.ReadDir(p.run)
	return err == nil && len(entries) == 0
}

// process is a front that serves.
type process struct {
	hello
	place  place
	cmd    *exec.Cmd // nil if it runs detached
	stderr *bytes.Buffer
	ended  chan struct{} // closed when cmd has ended
	conn   *grpc.ClientConn
	client flight.FlightServiceClient
}

// serve starts a front in the foreground. It is killed at the end of the test if it still runs.
func (p place) serve(t *testing.T, args ...string) *process {
	t.Helper()
	return p.start(t, p.command(append([]string{"serve"}, args...)...))
}

func (p place) start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	f := &process{place: p, cmd: cmd, stderr: &bytes.Buffer{}, ended: make(chan struct{})}
	cmd.Stderr = f.stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	line, _ := lines.ReadBytes('\n')
	go func() {
		defer close(f.ended)
		if rest, _ := io.ReadAll(lines); len(rest) > 0 {
			t.Errorf("beyond the handshake the front wrote %q", rest)
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-f.ended
	})
	f.greet(t, line)
	if f.PID != cmd.Process.Pid {
		t.Errorf("the front says it is process %d, it is %d", f.PID, cmd.Process.Pid)
	}
	return f
}

// detached starts a front in the background. It is killed at the end of the test if it still runs.
func (p place) detached(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	line, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	f := &process{place: p, stderr: &stderr}
	f.greet(t, line)
	front := processOf(t, f.PID)
	t.Cleanup(func() {
		if front.Alive() {
			_ = syscall.Kill(front.PID, syscall.SIGKILL)
		}
	})
	return f
}

func (f *process) greet(t *testing.T, line []byte) {
	t.Helper()
	if err := json.Unmarshal(line, &f.hello); err != nil {
		t.Fatalf("the handshake is %q; standard error says %s", line, f.stderr)
	}
	f.conn = dial(t, f.Endpoint)
	f.client = flight.NewFlightServiceClient(f.conn)
}

func dial(t *testing.T, endpoint string) *grpc.ClientConn {
	t.Helper()
	socket, err := protocol.SocketPath(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// processOf names a process beyond the reuse of its id.
func processOf(t *testing.T, pid int) rundir.Process {
	t.Helper()
	p, err := rundir.Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// wait returns the exit code of a front that ends by itself.
func (f *process) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-f.ended:
		return f.cmd.ProcessState.ExitCode()
	case <-time.After(20 * time.Second):
		t.Fatalf("the front does not end; its log says %s", f.stderr)
		return 0
	}
}

// ends waits for the end of the front, which must have this exit code and leave nothing in the run-dir.
func (f *process) ends(t *testing.T, code int) {
	t.Helper()
	if got := f.wait(t); got != code || !f.place.empty() {
		t.Errorf("ended with %d: %s", got, f.stderr)
	}
}

func (f *process) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := f.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func within(t *testing.T, bound time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	t.Cleanup(cancel)
	return ctx
}

// act runs an action and reads its answer into result.
func (f *process) act(t *testing.T, action, body string, result any) error {
	t.Helper()
	stream, err := f.client.DoAction(within(t, 10*time.Second), &flight.Action{Type: action, Body: []byte(body)})
	if err != nil {
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer.Body, result); err != nil {
		t.Fatalf("%s answers %q: %v", action, answer.Body, err)
	}
	return nil
}

func (f *process) status(t *testing.T) protocol.Status {
	t.Helper()
	var s protocol.Status
	if err := f.act(t, "status", "", &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// mustBeReady fails the test unless the front says that it is ready.
func (f *process) mustBeReady(t *testing.T) {
	t.Helper()
	var ready struct{ Ready bool }
	if err := f.act(t, "server.ready", "", &ready); err != nil || !ready.Ready {
		t.Errorf("ready is %t, %v", ready.Ready, err)
	}
}

// info asks for a stream, with more fields in the descriptor.
func (f *process) info(t *testing.T, model, fields string) (*flight.FlightInfo, error) {
	t.Helper()
	return f.client.GetFlightInfo(within(t, time.Minute), descriptor(model, fields))
}

func descriptor(model, fields string) *flight.FlightDescriptor {
	return &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: fmt.Appendf(nil, `{"v":1,"model":%q%s}`, model,
		fields)}
}

// eventually waits until a condition holds, and fails the test after the bound.
func eventually(t *testing.T, bound time.Duration, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(bound); !holds(); {
		if time.Now().After(deadline) {
			t.Fatalf("after %s it is not so that %s", bound, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func wantStatus(t *testing.T, err error, code codes.Code, parts ...string) {
	t.Helper()
	got := status.Convert(err)
	if got.Code() != code {
		t.Errorf("got %v, want %s", err, code)
	}
	for _, part := range parts {
		if !strings.Contains(got.Message(), part) {
			t.Errorf("%q does not say %q", got.Message(), part)
		}
	}
	if strings.Contains(got.Message(), "\n") {
		t.Errorf("%q is no sentence", got.Message())
	}
}

func TestServe(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t)
	if f.Flightsvc == "" || f.Build == "" || f.hello.Error != "" {
		t.Errorf("the handshake is %+v", f.hello)
	}
	socket, _ := protocol.SocketPath(f.Endpoint)
	if filepath.Dir(filepath.Dir(socket)) != p.run || len(filepath.Base(filepath.Dir(socket))) != 8 {
		t.Errorf("the socket is %s", socket)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket has mode %v, %v", info.Mode(), err)
	}
	healthy, err := healthpb.NewHealthClient(f.conn).Check(within(t, 10*time.Second), &healthpb.HealthCheckRequest{})
	if err != nil || healthy.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health is %v, %v", healthy, err)
	}
	f.mustBeReady(t)
	s := f.status(t)
	if s.Flightsvc != f.Flightsvc || s.Build != f.Build || s.V != 1 || !strings.HasSuffix(s.Server, fmt.Sprint(":",
		f.PID)) || len(s.Models) != 0 {
		t.Errorf("the status is %+v", s)
	}
	wantStatus(t, f.act(t, "nope", "", nil), codes.Unimplemented, `no action "nope"`, "ListActions")
	f.signal(t, syscall.SIGTERM)
	f.ends(t, 0)
}

// TestReflection asks a front and its runner which services they have.
func TestReflection(t *testing.T) {
	f := newPlace(t).serve(t)
	info, err := f.info(t, modelOf("ints"), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range []*grpc.ClientConn{f.conn, dial(t, info.Endpoint[0].Location[0].Uri)} {
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(within(t, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		ask := func(request *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
			if err := stream.Send(request); err != nil {
				t.Fatal(err)
			}
			answer, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			return answer
		}
		const service = "arrow.flight.protocol.FlightService"
		services := ask(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		}).GetListServicesResponse()
		if !strings.Contains(services.String(), service) {
			t.Errorf("the services are %v", services)
		}
		definition := ask(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service},
		}).GetFileDescriptorResponse()
		if len(definition.GetFileDescriptorProto()) == 0 {
			t.Errorf("its definition is %v", definition)
		}
	}
}

func TestWhatAFrontKnowsWithoutLoading(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t, "--model-root", filepath.Dir(modelOf("two")), "--libtensorflow", "/nope")
	var meta protocol.Metadata
	if err := f.act(t, "model.metadata", `{"model":"two"}`, &meta); err != nil {
		t.Fatal(err)
	}
	x := meta.Signatures["serving_default"]
	if got := fmt.Sprintf("%s %s %v %v %d", meta.Model, meta.Version, x.Inputs, x.Outputs,
		len(meta.Signatures)); got != "two 1 [{a float32 [-1 8]} {b float32 [-1 4]}] [{logits float32 [-1 3]} {sum "+
		"float32 [-1 5]}] 2" {
		t.Errorf("the metadata is %s", got)
	}
	wantStatus(t, f.act(t, "model.metadata", `{"model":"nope"}`, &meta), codes.NotFound, "model nope", "no folder")
	wantStatus(t, f.act(t, "model.metadata", `{"model":"."}`, &meta), codes.InvalidArgument,
		"one folder below the model-root")
	wantStatus(t, f.act(t, "model.metadata", `{}`, &meta), codes.InvalidArgument, `{"model":"name"}`)

	result, err := f.client.GetSchema(within(t, 10*time.Second), descriptor("two",
		`,"outputs":{"sum":"s","logits":"l"},"on_error":"column"`))
	if err != nil {
		t.Fatal(err)
	}
	schema, err := flight.DeserializeSchema(result.Schema, memory.DefaultAllocator)
	if err != nil {
		t.Fatal(err)
	}
	list := arrow.ListOf(arrow.PrimitiveTypes.Float32)
	want := arrow.NewSchema([]arrow.Field{{Name: "s", Type: list, Nullable: true}, {Name: "l", Type: list,
		Nullable: true}, {Name: "error", Type: arrow.BinaryTypes.String, Nullable: true}}, nil)
	if !schema.Equal(want) {
		t.Errorf("the schema is %s", schema)
	}
	if s := f.status(t); len(s.Models) != 0 {
		t.Errorf("models were loaded: %+v", s.Models)
	}
}

func TestServeRefuses(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	self := processOf(t, os.Getpid())
	for name, c := range map[string]struct {
		args  []string
		parts []string
		limit string // of the shell that starts it
	}{
		"open files": {limit: "ulimit -n 16", parts: []string{"open files (ulimit -n) is 16"}},
		"address space": {limit: "ulimit -v 3000000", parts: []string{"address space (ulimit -v) is 3072000000 " +
			"bytes"}},
		"dead owner": {args: []string{"--owner", fmt.Sprintf("%d:1", gone.Process.Pid)},
			parts: []string{fmt.Sprint("process ", gone.Process.Pid)}},
		"other owner": {args: []string{"--owner", fmt.Sprintf("%d:%d", self.PID, self.Start+1)},
			parts: []string{"has ended"}},
		"no owner": {args: []string{"--owner", "x"}, parts: []string{`process "x"`, "PID:START"}},
		"long path": {args: []string{"--run-dir", "/tmp/" + strings.Repeat("x", 90)},
			parts: []string{"at most 107 bytes", "shorter run-dir"}},
		"TCP": {args: []string{"--endpoint", "grpc://0.0.0.0:1"}, parts: []string{"want grpc+unix://"}},
		"settings together": {args: []string{"--load-timeout", "0s", "--cores=-1"},
			parts: []string{"load-timeout is 0s", "cores is -1"}},
	} {
		for _, mode := range []string{"foreground", "detached"} {
			t.Run(name+"/"+mode, func(t *testing.T) {
				p := newPlace(t)
				args := append([]string{"serve"}, c.args...)
				if mode == "detached" {
					args = append(args, "--detach")
				}
				cmd := p.command(args...)
				if c.limit != "" {
					cmd.Path = "/bin/sh"
					cmd.Args = append([]string{"sh", "-c", c.limit + ` && exec "$0" "$@"`, binary}, args...)
				}
				var stdout, stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = &stdout, &stderr
				err := cmd.Run()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || stdout.Len() != 0 {
					t.Errorf("it ended with %v and printed %q", err, &stdout)
				}
				for _, part := range append(c.parts, "flightsvc: ") {
					if !strings.Contains(stderr.String(), part) {
						t.Errorf("%q does not say %q", &stderr, part)
					}
				}
				if lines := strings.Count(stderr.String(), "\n"); lines > 2 || lines > 1 &&
					name != "settings together" {
					t.Errorf("more than a sentence: %s", &stderr)
				}
				if entries, err := os.ReadDir(p.run); err == nil && len(entries) != 0 {
					t.Errorf("left behind: %v", entries)
				}
				_ = os.Remove("/tmp/" + strings.Repeat("x", 90))
			})
		}
	}
}

func TestFrontEndsWithItsOwner(t *testing.T) {
	for _, detach := range []bool{false, true} {
		t.Run(fmt.Sprint("detach=", detach), func(t *testing.T) {
			p := newPlace(t)
			owner := exec.Command("sleep", "600")
			if err := owner.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = owner.Wait() }()
			defer func() { _ = owner.Process.Kill() }()
			named := processOf(t, owner.Process.Pid)
			cmd := p.command("serve", "--owner", fmt.Sprintf("%d:%d", named.PID, named.Start))
			var f *process
			if detach {
				fd, err := unix.PidfdOpen(named.PID, 0)
				if err != nil {
					t.Fatal(err)
				}
				pidfd := os.NewFile(uintptr(fd), "pidfd")
				cmd.Args = append(cmd.Args, "--detach", "--owner-fd", "3")
				cmd.ExtraFiles = []*os.File{pidfd}
				f = p.detached(t, cmd)
				_ = pidfd.Close()
			} else {
				f = p.start(t, cmd)
			}
			if _, err := f.info(t, modelOf("mlp"), ""); err != nil { // with a runner
				t.Fatal(err)
			}
			front := processOf(t, f.PID)
			runner := processOf(t, f.status(t).Models[0].PID)
			private, err := os.MkdirTemp("", "flightsvc-driver-"+nameOf(named)+"-")
			if err != nil {
				t.Fatal(err)
			}
			_ = owner.Process.Kill()
			eventually(t, 5*time.Second, "front and runner are gone with the owner and have left nothing", func() bool {
				_, err := os.Stat(private)
				return !front.Alive() && !runner.Alive() && p.empty() && os.IsNotExist(err)
			})
		})
	}
}

// TestChild is a front as Spark's plugin starts it: it says what was done, and ends with its standard input.
func TestChild(t *testing.T) {
	p := newPlace(t)
	cmd := p.command("serve", "--child", "--executor", "3")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	lines := bufio.NewScanner(stdout)
	lines.Scan()
	f := &process{place: p, cmd: cmd, stderr: &stderr}
	f.greet(t, lines.Bytes())
	s := open(t, f.client, descriptor(modelOf("ints"), "").Cmd)
	s.run(1, 2, 3)
	f.signal(t, syscall.SIGINT) // its parent's affair
	s.run(4)
	s.end()
	about := f.status(t)
	if about.Executor != "3" || !strings.HasPrefix(about.Server, "executor 3 ") {
		t.Errorf("the status is %+v", about)
	}
	runner := processOf(t, about.Models[0].PID)
	var total protocol.Totals
	for total.Rows < 4 && lines.Scan() {
		if err := json.Unmarshal(lines.Bytes(), &total); err != nil {
			t.Fatalf("%s: %v", lines.Bytes(), err)
		}
	}
	if total.Rows != 4 || total.Batches != 2 || total.Errors != 0 || total.Models != 1 || total.RunSeconds <= 0 ||
		total.Memory < 1<<20 {
		t.Errorf("after 4 rows in 2 record batches it says %+v", total)
	}
	_ = stdin.Close()
	for lines.Scan() { // until it ends
	}
	if err := cmd.Wait(); err != nil || runner.Alive() || !p.empty() {
		t.Errorf("%v: the front has left something", err)
	}
}

// TestWithoutModelsIsSmall holds a front to 64 MB, of which a proportional part is counted of what it shares.
func TestWithoutModelsIsSmall(t *testing.T) {
	f := newPlace(t).serve(t)
	f.status(t)
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", f.PID))
	if err != nil {
		t.Fatal(err)
	}
	var kib int
	for line := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(line, "Pss: %d kB", &kib); err == nil {
			break
		}
	}
	if t.Logf("%d KiB", kib); kib == 0 || kib > 64_000_000>>10 {
		t.Errorf("the front has %d KiB", kib)
	}
}

func TestDetach(t *testing.T) {
	p := newPlace(t)
	extra, err := os.Create(filepath.Join(t.TempDir(), "open.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = extra.Close() }()
	cmd := p.command("serve", "--detach", "--idle-timeout", "0")
	cmd.Env = append(cmd.Env, "OMP_NUM_THREADS=1", "SPARK_HOME=/spark", "SECRET=1", "TF_ENABLE_ONEDNN_OPTS=0",
		"LC_ALL=C")
	cmd.ExtraFiles = []*os.File{extra}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	f := p.detached(t, cmd)
	// As pyspark's daemon does at its end: the whole process group of the starter goes.
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
	f.mustBeReady(t)
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", f.PID))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for entry := range strings.SplitSeq(strings.TrimRight(string(environ), "\x00"), "\x00") {
		name, _, _ := strings.Cut(entry, "=")
		names = append(names, name)
	}
	slices.Sort(names)
	if got := strings.Join(names, " "); got != "FLIGHTSVC_DETACHED FLIGHTSVC_LIBTENSORFLOW FLIGHTSVC_RUN_DIR HOME "+
		"LC_ALL PATH TF_ENABLE_ONEDNN_OPTS" {
		t.Errorf("the front's environment is %s", got)
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", f.PID))
	if err != nil || len(fds) < 4 {
		t.Fatalf("the front's descriptors are %v, %v", fds, err)
	}
	// dropStartupPages may read the program just now.
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", f.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err != nil {
			continue // closed since
		}
		known := to == "/dev/null" || to == program || strings.HasPrefix(to, "pipe:") ||
			strings.HasPrefix(to, "socket:") || strings.HasPrefix(to, "anon_inode:") ||
			strings.HasPrefix(to, p.home) || strings.HasPrefix(to, "/proc/") || strings.HasPrefix(to, "/sys/")
		if !known || to == extra.Name() {
			t.Errorf("the front holds %s", to)
		}
	}
	if sid, err := unix.Getsid(f.PID); err != nil || sid != f.PID {
		t.Errorf("the front's session is %d, %v", sid, err)
	}
	logs, err := filepath.Glob(filepath.Join(p.home, ".local", "state", "flightsvc", "log", "front-*.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("the logs are %v, %v", logs, err)
	}
	if text, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(text), `"serving"`) {
		t.Errorf("the log is %q, %v", text, err)
	}
	front := processOf(t, f.PID)
	var draining struct{ Draining bool }
	if err := f.act(t, "server.shutdown", "", &draining); err != nil || !draining.Draining {
		t.Errorf("shutting down: %t, %v", draining.Draining, err)
	}
	eventually(t, 5*time.Second, "the front has ended and left nothing",
		func() bool { return !front.Alive() && p.empty() })
}

func TestIdleFrontEnds(t *testing.T) {
	p := newPlace(t)
	started := time.Now()
	f := p.detached(t, p.command("serve", "--detach=true", "--idle-timeout", "1s"))
	front := processOf(t, f.PID)
	_ = f.conn.Close()
	eventually(t, 10*time.Second, "the front has ended and left nothing",
		func() bool { return !front.Alive() && p.empty() })
	if took := time.Since(started); took < time.Second {
		t.Errorf("it ended after %s", took)
	}
}

func TestOldLogsGo(t *testing.T) {
	p := newPlace(t)
	dir := filepath.Join(p.home, ".local", "state", "flightsvc", "log")
	for i := range 25 {
		expect.Write(t, filepath.Join(dir, fmt.Sprintf("front-20200101T0000%02d.000-1.log", i)), "")
	}
	p.detached(t, p.command("serve", "--detach"))
	left, err := filepath.Glob(filepath.Join(dir, "front-*.log"))
	if err != nil || len(left) != keptLogs || !strings.HasSuffix(left[0], "T000006.000-1.log") {
		t.Errorf("%d logs are left, the oldest is %s", len(left), left[0])
	}
}

// TestSettingsPrecedence gives each spelling of model-root its own folder, whose model has a version of its own.
func TestSettingsPrecedence(t *testing.T) {
	p := newPlace(t)
	roots := t.TempDir()
	pb, err := os.ReadFile(filepath.Join(modelOf("mlp"), "saved_model.pb"))
	if err != nil {
		t.Fatal(err)
	}
	root := func(version string) string {
		dir := filepath.Join(roots, version)
		expect.Write(t, filepath.Join(dir, "m", version, "saved_model.pb"), string(pb))
		return dir
	}
	config := filepath.Join(roots, "config.json")
	expect.Write(t, config, fmt.Sprintf(`{"model_root":%q}`, root("2")))
	variable := "FLIGHTSVC_MODEL_ROOT=" + root("3")
	flag, file := []string{"--model-root", root("4")}, []string{"--config", config}
	for _, c := range []struct {
		name string
		args []string
		env  string
		want string
	}{
		{"flag over all", slices.Concat(file, []string{"serve"}, flag), variable, "4"},
		{"flag over file", slices.Concat(file, []string{"serve"}, flag), "A=1", "4"},
		{"environment over file", slices.Concat(file, []string{"serve"}), variable, "3"},
		{"file over default", slices.Concat(file, []string{"serve"}), "A=1", "2"},
		{"default", []string{"serve"}, "A=1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := p.command(c.args...)
			cmd.Env = append(cmd.Env, c.env)
			f := p.start(t, cmd)
			var meta protocol.Metadata
			err := f.act(t, "model.metadata", `{"model":"m"}`, &meta)
			if c.want == "" {
				wantStatus(t, err, codes.NotFound, "no model-root")
			} else if err != nil || meta.Version != c.want {
				t.Errorf("version %s, %v; want %s", meta.Version, err, c.want)
			}
		})
	}
}

func TestWithoutLibtensorflow(t *testing.T) {
	p := newPlace(t)
	empty := t.TempDir()
	failing := filepath.Join(t.TempDir(), "python")
	script := []byte("#!/bin/sh\necho MemoryError >&2\nexit 1\n")
	if err := os.WriteFile(failing, script, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		env   []string
		parts []string
	}{
		"nowhere": {[]string{"PATH=" + empty}, []string{"model " + modelOf("mlp"),
			"libtensorflow is not installed", "pip install tensorflow-cpu==", "--libtensorflow"}},
		"no memory": {[]string{"PATH=" + empty, "FLIGHTSVC_PYTHON=" + failing}, []string{"is not known", failing,
			"exit status 1: MemoryError"}},
		"empty folder": {[]string{"PATH=" + empty, "FLIGHTSVC_LIBTENSORFLOW=" + empty}, []string{empty,
			"holds no libtensorflow_cc.so.2"}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := p.command("serve")
			cmd.Env = append([]string{"HOME=" + p.home, "FLIGHTSVC_RUN_DIR=" + p.run}, c.env...)
			f := p.start(t, cmd)
			for range 2 {
				_, err := f.info(t, modelOf("mlp"), "")
				wantStatus(t, err, codes.FailedPrecondition, c.parts...)
			}
			f.mustBeReady(t)
			if s := f.status(t); len(s.Models) != 0 {
				t.Errorf("the models are %+v", s.Models)
			}
		})
	}
}

// ints is the schema of the model ints: i int64 [-1,3] -> doubled int64 [-1,3], total int64 [-1].
var ints = arrow.NewSchema([]arrow.Field{{Name: "i", Type: arrow.ListOf(arrow.PrimitiveTypes.Int64), Nullable: true}},
	nil)

// stream is an open exchange with the model ints.
type stream struct {
	t      *testing.T
	wire   flight.FlightService_DoExchangeClient
	writer *flight.Writer
	reader *flight.Reader
}

// open opens a stream with a command; its first batch sends that and the schema.
func open(t *testing.T, client flight.FlightServiceClient, cmd []byte) *stream {
	t.Helper()
	s := &stream{t: t}
	var err error
	if s.wire, err = client.DoExchange(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	s.writer = flight.NewRecordWriter(s, ipc.WithSchema(ints))
	s.writer.SetFlightDescriptor(&flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: cmd})
	return s
}

// openAtRunner opens a stream with the model ints at its runner, and runs a row there.
func (f *process) openAtRunner(t *testing.T) *stream {
	t.Helper()
	info, err := f.info(t, modelOf("ints"), "")
	if err != nil {
		t.Fatal(err)
	}
	endpoint := info.Endpoint[0]
	s := open(t, flight.NewFlightServiceClient(dial(t, endpoint.Location[0].Uri)), endpoint.Ticket.Ticket)
	s.run(1)
	f.knowsStreams(t, 1)
	return s
}

// knowsStreams waits until the front knows how many streams its model has.
func (f *process) knowsStreams(t *testing.T, streams int) {
	t.Helper()
	eventually(t, 5*time.Second, fmt.Sprintf("the front knows of %d streams", streams),
		func() bool { return f.status(t).Models[0].Streams == streams })
}

// Send is part of flight.DataStreamWriter.
func (s *stream) Send(data *flight.FlightData) error { return s.wire.Send(data) }

// run sends rows of three numbers each and checks the answer, which TensorFlow must give exactly.
func (s *stream) run(rows ...int64) {
	s.t.Helper()
	b := array.NewRecordBuilder(memory.DefaultAllocator, ints)
	defer b.Release()
	lists := b.Field(0).(*array.ListBuilder)
	for _, row := range rows {
		lists.Append(true)
		lists.ValueBuilder().(*array.Int64Builder).AppendValues([]int64{row, row + 1, row + 2}, nil)
	}
	rec := b.NewRecord()
	defer rec.Release()
	if err := s.writer.Write(rec); err != nil {
		s.t.Fatal(err)
	}
	if s.reader == nil {
		var err error
		if s.reader, err = flight.NewRecordReader(s.wire); err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(s.reader.Release)
	}
	if !s.reader.Next() {
		s.t.Fatalf("no answer: %v", s.reader.Err())
	}
	answer := s.reader.Record()
	doubled, total := answer.Column(0).(*array.List), answer.Column(1).(*array.Int64)
	for i, row := range rows {
		lo, _ := doubled.ValueOffsets(i)
		if first := doubled.ListValues().(*array.Int64).Value(int(lo)); first != 2*row || total.Value(i) != 3*row+3 {
			s.t.Errorf("row %d is doubled to %d and has the total %d", row, first, total.Value(i))
		}
	}
}

func (s *stream) end() {
	s.t.Helper()
	if err := s.wire.CloseSend(); err != nil {
		s.t.Fatal(err)
	}
	if s.reader.Next() || s.reader.Err() != nil {
		s.t.Errorf("the stream ended with %v", s.reader.Err())
	}
}

func TestRedirectAndRelay(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t)
	model := modelOf("ints")
	info, err := f.info(t, model, `,"request_id":"r1"`)
	if err != nil {
		t.Fatal(err)
	}
	endpoint := info.Endpoint[0]
	if len(info.Endpoint) != 1 || len(endpoint.Location) != 1 ||
		filepath.Dir(endpoint.Location[0].Uri) != filepath.Dir(f.Endpoint) {
		t.Fatalf("the endpoints are %v", info.Endpoint)
	}
	runner := flight.NewFlightServiceClient(dial(t, endpoint.Location[0].Uri))
	s := open(t, runner, endpoint.Ticket.Ticket)
	s.run(1, 2, 3)
	s.run(math.MaxInt32)
	f.knowsStreams(t, 1)
	s.end()
	f.knowsStreams(t, 0)

	again := open(t, runner, endpoint.Ticket.Ticket)
	if err := again.writer.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = again.wire.Recv()
	wantStatus(t, err, codes.Unavailable, "opened a stream already")

	relayed, err := f.info(t, model, `,"redirect":false`)
	if err != nil || len(relayed.Endpoint[0].Location) != 0 {
		t.Fatalf("the endpoints are %v, %v", relayed.GetEndpoint(), err)
	}
	for name, command := range map[string][]byte{"a ticket": relayed.Endpoint[0].Ticket.Ticket,
		"a plain descriptor": descriptor(model, "").Cmd} {
		t.Run("relay of "+name, func(t *testing.T) {
			s := open(t, f.client, command)
			s.run(5, 6)
			s.run(7)
			s.end()
		})
	}
	if models := f.status(t).Models; len(models) != 1 || models[0].State != "ready" {
		t.Errorf("the models are %+v", models)
	}
}

func TestDrain(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t, "--drain-timeout", "30s")
	s := f.openAtRunner(t)
	f.signal(t, syscall.SIGTERM)
	eventually(t, 5*time.Second, "the front takes no more requests", func() bool {
		_, err := f.info(t, modelOf("ints"), "")
		return status.Code(err) == codes.Unavailable
	})
	for since := time.Now(); time.Since(since) < 500*time.Millisecond; time.Sleep(20 * time.Millisecond) {
		s.run(2) // the stream goes on
	}
	s.end()
	f.ends(t, 0)
}

func TestDrainIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		bound   string
		signals []os.Signal
	}{
		"by the timeout":       {"300ms", []os.Signal{syscall.SIGTERM}},
		"by the second signal": {"1h", []os.Signal{syscall.SIGINT, syscall.SIGTERM}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newPlace(t).serve(t, "--drain-timeout", c.bound)
			f.openAtRunner(t)
			for _, signal := range c.signals {
				f.signal(t, signal)
			}
			f.ends(t, 0)
		})
	}
}

// TestFrontEndsWhateverHangs stops a front whose runner leaves a child that keeps the runner's output open, so that the
// end of it never comes.
func TestFrontEndsWhateverHangs(t *testing.T) {
	p := newPlace(t)
	programs := t.TempDir()
	child := filepath.Join(programs, "child")
	script := fmt.Sprintf("#!/bin/sh\nsleep 600 2>/dev/null &\necho $! > %s.new\nmv %s.new %s\nread line\n", child,
		child, child)
	err := errors.Join(
		os.Link(binary, filepath.Join(programs, "flightsvc")),
		os.WriteFile(filepath.Join(programs, "flightsvc-runner"), []byte(script), 0o700), //nolint:gosec // a program
	)
	if err != nil {
		t.Fatal(err)
	}
	cmd := p.command("serve", "--drain-timeout", "300ms")
	cmd.Path = filepath.Join(programs, "flightsvc")
	f := p.start(t, cmd)
	go func() { _, _ = f.info(t, modelOf("ints"), "") }() // ends with the front
	var pid int
	eventually(t, 5*time.Second, "the runner's child runs", func() bool {
		text, err := os.ReadFile(child)
		_, scanErr := fmt.Sscan(string(text), &pid)
		return err == nil && scanErr == nil
	})
	defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
	f.signal(t, syscall.SIGTERM)
	if code := f.wait(t); code != exitFailed || !p.empty() || !strings.Contains(f.stderr.String(),
		"the shutdown hangs") {
		t.Errorf("ended with %d: %s", code, f.stderr)
	}
}

// TestEndingFrontLeavesNoHalfPush ends a front while a model arrives.
func TestEndingFrontLeavesNoHalfPush(t *testing.T) {
	p := newPlace(t)
	cache := filepath.Join(p.home, "pushed")
	f := p.serve(t, "--drain-timeout", "100ms", "--cache-dir", cache)
	wire, err := f.client.DoPut(within(t, 20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	schema := arrow.NewSchema([]arrow.Field{{Name: "chunk", Type: arrow.BinaryTypes.Binary}}, nil)
	writer := flight.NewRecordWriter(wire, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(&flight.FlightDescriptor{Type: flight.DescriptorCMD,
		Cmd: []byte(`{"v":1,"put":"model"}`)})
	var archive bytes.Buffer
	if err := tar.NewWriter(&archive).WriteHeader(&tar.Header{Name: "saved_model.pb", Size: 1 << 20,
		Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer b.Release()
	b.Field(0).(*array.BinaryBuilder).Append(archive.Bytes())
	rec := b.NewRecord()
	defer rec.Release()
	if err := writer.Write(rec); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the model arrives", func() bool {
		list, err := filepath.Glob(filepath.Join(cache, "models", ".*", "saved_model.pb"))
		return err == nil && len(list) == 1
	})
	f.signal(t, syscall.SIGTERM)
	if code := f.wait(t); code != 0 {
		t.Errorf("exit code %d: %s", code, f.stderr)
	}
	if entries, err := os.ReadDir(filepath.Join(cache, "models")); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	_, err = wire.Recv()
	wantStatus(t, err, codes.Unavailable)
}

func TestKilledFrontTakesItsRunnersAlong(t *testing.T) {
	p := newPlace(t)
	f := p.serve(t)
	if _, err := f.info(t, modelOf("mlp"), ""); err != nil {
		t.Fatal(err)
	}
	runner := processOf(t, f.status(t).Models[0].PID)
	f.signal(t, syscall.SIGKILL)
	f.wait(t)
	eventually(t, 5*time.Second, "the runner is gone", func() bool { return !runner.Alive() })
	// What a killed front leaves, the next one sweeps.
	next := p.serve(t)
	entries, err := os.ReadDir(p.run)
	socket, _ := protocol.SocketPath(next.Endpoint)
	if err != nil || len(entries) != 1 || entries[0].Name() != filepath.Base(filepath.Dir(socket)) {
		t.Errorf("the run-dir holds %v, %v", entries, err)
	}
}

// TestSharedFolder serves in a folder that others use too.
func TestSharedFolder(t *testing.T) {
	p, shared := newPlace(t), newPlace(t)
	if err := os.MkdirAll(shared.run, 0o755); err != nil { //nolint:gosec // on purpose
		t.Fatal(err)
	}
	foreign, err := net.Listen("unix", filepath.Join(shared.run, "docker.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = foreign.Close() }()
	endpoint := protocol.Scheme + filepath.Join(shared.run, "front.sock")
	f := p.serve(t, "--endpoint", endpoint)
	if f.Endpoint != endpoint {
		t.Errorf("the endpoint is %s", f.Endpoint)
	}
	if _, err := f.info(t, modelOf("mlp"), ""); err != nil {
		t.Fatal(err)
	}
	second := p.command("serve", "--endpoint", endpoint)
	out, err := second.CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("serves in %s already (process %d)", shared.run,
		f.PID)) {
		t.Errorf("a second front there: %s, %v", out, err)
	}
	f.signal(t, syscall.SIGINT)
	if code := f.wait(t); code != 0 {
		t.Errorf("ended with %d: %s", code, f.stderr)
	}
	entries, err := os.ReadDir(shared.run)
	if err != nil || len(entries) != 1 || entries[0].Name() != "docker.sock" {
		t.Errorf("the folder holds %v, %v", entries, err)
	}
}
