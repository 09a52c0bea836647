// The way of one load of a model, as ARCHITECTURE.md lists it.

package front

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"flightsvc/gpu"
	"flightsvc/internal/control"
	"flightsvc/internal/expect"
	"flightsvc/internal/fault"
	"flightsvc/internal/savedmodel"
	"flightsvc/modelcache"
	"flightsvc/modelcache/repository"
	"flightsvc/modelcache/tuning"
)

// way collects the files that lead to where it is asked, the caller's first.
type way struct {
	mu    sync.Mutex
	files []string
}

// mark adds the files on the stack of its caller that are not there yet.
func (w *way) mark() {
	var stack [64]uintptr
	frames := runtime.CallersFrames(stack[:runtime.Callers(2, stack[:])])
	var found []string
	for more := true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		folder, name := path.Split(frame.Function) // of flightsvc/modelcache/repository.(*Repository).Find
		folder, ok := strings.CutPrefix(folder, "flightsvc/")
		if file := filepath.Base(frame.File); ok && !strings.HasSuffix(file, "_test.go") {
			pkg, _, _ := strings.Cut(name, ".")
			found = append(found, folder+pkg+"/"+file)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, file := range slices.Backward(found) {
		if !slices.Contains(w.files, file) {
			w.files = append(w.files, file)
		}
	}
}

// watched is a context that marks where it is waited for.
type watched struct {
	context.Context
	way *way
}

func (w watched) Done() <-chan struct{} {
	w.way.mark()
	return w.Context.Done()
}

// TestTheWayOfOneLoad follows one load, from GetFlightInfo to the start of a runner, by the stacks where it waits for
// its caller, logs that no device has room for it, and asks for TensorFlow's library. ARCHITECTURE.md lists these
// files.
func TestTheWayOfOneLoad(t *testing.T) {
	var taken way
	host := dgxa100.New() // of 40 GiB each
	host.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return nil, nvml.ERROR_NOT_SUPPORTED }
	for _, d := range host.Devices {
		device := d.(*dgxa100.Device)
		device.GetUtilizationRatesFunc = func() (nvml.Utilization, nvml.Return) {
			return nvml.Utilization{}, nvml.SUCCESS
		}
		device.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) { return nil, nvml.SUCCESS }
	}
	devices := gpu.Open(gpu.Options{NVML: host, LockDir: t.TempDir()})
	t.Cleanup(devices.Close)
	root, cacheDir := t.TempDir(), t.TempDir()
	models := repository.New(repository.Options{ModelRoot: root, CacheDir: cacheDir, Quiet: 200 * time.Millisecond,
		Log: zap.NewNop()})
	t.Cleanup(models.Close)
	core, _ := observer.New(zap.WarnLevel)
	cache := modelcache.New(modelcache.Options{
		Repository: models, Profiles: tuning.NewProfiles(cacheDir), Folder: t.TempDir(), Devices: devices,
		CPUFallback: true, LoadTimeout: time.Minute,
		Log: zap.New(core, zap.Hooks(func(zapcore.Entry) error { taken.mark(); return nil })),
		Runners: &modelcache.Programs{Log: zap.NewNop(), Library: func(context.Context) (string, error) {
			taken.mark()
			return "", errors.New("far enough")
		}},
	})
	t.Cleanup(cache.Close)
	front := New(Options{Repository: models, Cache: cache, Log: zap.NewNop()})
	expect.Write(t, filepath.Join(root, "m", control.SettingsFile), `{"device_memory":"41GiB"}`)
	expect.Write(t, filepath.Join(root, "m", "1", savedmodel.File), expect.SavedModel())
	descriptor := command(`{"v":1,"model":"m","device":"gpu","outputs":{"y":{"column":"y","shape":[-1]}}}`)
	if _, err := front.GetSchema(t.Context(), descriptor); err != nil { // reads saved_model.pb, once
		t.Fatal(err)
	}
	expect.Write(t, filepath.Join(root, "m", "1", "assets", "new"), "") // the version has to settle again
	_, err := front.GetFlightInfo(watched{t.Context(), &taken}, descriptor)
	expect.Fault(t, err, fault.Precondition, "model m: far enough")

	text, err := os.ReadFile(filepath.Join("..", "..", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## The way of one load of a model\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var listed []string
	for _, item := range regexp.MustCompile("(?m)^[0-9]+\\. `([a-z/]+\\.go)`").FindAllStringSubmatch(section, -1) {
		listed = append(listed, item[1])
	}
	if !slices.Equal(taken.files, listed) || len(listed) > 8 {
		t.Errorf("a load goes by\n%s\nARCHITECTURE.md lists\n%s", strings.Join(taken.files, "\n"),
			strings.Join(listed, "\n"))
	}
}
