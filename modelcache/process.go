// Processes: how flightsvc-runner is started, how its reports are read, and how it is ended.

package modelcache

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"flightsvc/internal/control"
	"flightsvc/internal/fault"
)

// Starter starts runners. Tests have one that starts them within the test's own process.
type Starter interface {
	// Start starts a runner with its setup. defaults are environment variables that the front's own environment
	// overrides; those in fixed override it. ctx bounds the start, not the life of the runner.
	Start(ctx context.Context, setup control.Setup, defaults, fixed []string) (Process, error)
}

// Process is a runner that has been started.
type Process interface {
	PID() int
	// Report returns the next report, io.EOF when there will be no more. Only one goroutine may call it.
	Report() (control.Report, error)
	// Wait waits until the process has ended and says how, such as "exit status 1". Call it after the last Report.
	Wait() string
	// Stop closes the runner's standard input, which asks the runner to end.
	Stop()
	Kill()
	// Memory returns the bytes of the host that belong to this runner alone.
	Memory() (int64, error)
}

// Programs starts runners as processes of this host.
type Programs struct {
	Binary string // path of flightsvc-runner
	// Library finds the folder that holds libtensorflow_cc.so.2. It is called for each start. Its error is a sentence
	// that says what to install.
	Library func(context.Context) (string, error)
	Log     *zap.Logger
}

// Start is part of Starter. Its faults are Precondition.
func (p *Programs) Start(ctx context.Context, setup control.Setup, defaults, fixed []string) (Process, error) {
	library, err := p.Library(ctx)
	if err != nil {
		return nil, fault.New(fault.Precondition, "model %s: %w", setup.Model, err)
	}
	line, err := json.Marshal(setup)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(p.Binary) //nolint:gosec // the binary lies beside the front's
	log := p.Log.With(zap.String("model", setup.Model))
	said := &runnerLog{out: os.Stderr, log: log}
	cmd.Env, cmd.Stderr = runnerEnv(os.Environ(), library, defaults, fixed), said
	cmd.WaitDelay = runnerGrace // a child of the runner may keep its standard error open
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fault.New(fault.Precondition, "model %s: start %s: %w", setup.Model, p.Binary, err)
	}
	_, _ = stdin.Write(append(line, '\n')) // Report tells if the runner has ended already
	return &program{cmd: cmd, stdin: stdin, lines: bufio.NewReaderSize(stdout, maxReport), said: said, log: log}, nil
}

// maxReport bounds a line that a runner writes; a longer one is not a report.
const maxReport = 1 << 20

// program is a runner in a process of its own.
type program struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Reader
	said  *runnerLog
	log   *zap.Logger
}

func (p *program) PID() int { return p.cmd.Process.Pid }

func (p *program) Report() (report control.Report, err error) {
	for {
		line, err := p.lines.ReadSlice('\n')
		fits := !errors.Is(err, bufio.ErrBufferFull)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = p.lines.ReadSlice('\n')
		}
		if fits && json.Unmarshal(line, &report) == nil {
			return report, nil
		}
		if err != nil {
			return control.Report{}, io.EOF // after any error the pipe gives nothing more
		}
		report = control.Report{}
		p.log.Warn("runner wrote a line that is not a report") // some library may print
	}
}

func (p *program) Wait() string {
	_ = p.cmd.Wait() // ProcessState says how it ended
	p.said.close()
	return p.cmd.ProcessState.String()
}

func (p *program) Stop()                  { _ = p.stdin.Close() }      // fails if it is closed already
func (p *program) Kill()                  { _ = p.cmd.Process.Kill() } // fails if it has ended
func (p *program) Memory() (int64, error) { return OwnMemory(p.PID()) }

// runnerEnv returns the environment of a runner: our settings of TensorFlow and the defaults, then environ, then fixed.
// Of two entries for one variable the last counts. The search path for libraries begins with the library's folders.
func runnerEnv(environ []string, library string, defaults, fixed []string) []string {
	env := append([]string{
		"TF_CPP_MIN_LOG_LEVEL=2",  // errors only: libpng warns about many pictures
		"TF_ENABLE_ONEDNN_OPTS=1", // measured: EfficientNet-Lite0 runs 1.7 times as fast with AVX2
	}, defaults...)
	env = append(append(env, environ...), fixed...)
	// A model is a program, so it must not see the credentials for stores.
	env = slices.DeleteFunc(env, func(entry string) bool {
		return strings.HasPrefix(entry, "AWS_") || strings.HasPrefix(entry, "GOOGLE_") ||
			strings.HasPrefix(entry, "AZURE_")
	})
	search := libraryFolders(library)
	for _, entry := range environ {
		if path, ok := strings.CutPrefix(entry, "LD_LIBRARY_PATH="); ok {
			search = append(search, path)
		}
	}
	return append(env, "LD_LIBRARY_PATH="+strings.Join(search, ":"))
}

// LibraryFile is the library with TensorFlow's C API, by which its folder is recognized.
const LibraryFile = "libtensorflow_cc.so.2"

// libraryFolders returns the folders in which a runner finds libraries: that of libtensorflow, and those of NVIDIA's
// Python packages beside it (tensorflow[and-cuda] installs nvidia/cudnn/lib and others). If libtensorflow is a link,
// the packages beside the file it leads to are taken.
func libraryFolders(library string) []string {
	folders := []string{library}
	if file, err := filepath.EvalSymlinks(filepath.Join(library, LibraryFile)); err == nil {
		site := filepath.Dir(filepath.Dir(file))
		beside, _ := fs.Glob(os.DirFS(site), "nvidia/*/lib")
		for _, folder := range beside {
			folders = append(folders, filepath.Join(site, folder))
		}
	}
	return folders
}

// OwnMemory returns the resident bytes of a process that are not pages of files. TensorFlow's library is such a file:
// all runners share its pages, and the kernel may drop them.
func OwnMemory(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	total := int64(0)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "RssAnon" && name != "RssShmem" {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/status: %s is %q", pid, name, value)
		}
		total += kib << 10
	}
	if total == 0 {
		return 0, fmt.Errorf("process %d has ended", pid)
	}
	return total, nil
}

// Interface guards.
var (
	_ Starter = (*Programs)(nil)
	_ Process = (*program)(nil)
)
