// Package config is the one table of the server's settings. Each has one name in four
// spellings: the flag --model-root, the variable FLIGHTSVC_MODEL_ROOT, model_root in the
// configuration file, and spark.flightsvc.modelRoot, which the shim turns into the flag. A flag
// goes over the environment, the environment over the file, the file over the default.
//
// No other package of the server reads its environment for settings.
package config

import (
	"errors"
	"fmt"
	"time"
)

// TuneQuick is the value of the setting tune that lets an idle front measure models.
const TuneQuick = "quick"

// Serve are the settings of `flightsvc serve`.
type Serve struct {
	Endpoint         string        `env:"FLIGHTSVC_ENDPOINT" placeholder:"grpc+unix:///PATH" help:"Unix socket to serve on. Default: front.sock in a new folder of the run-dir."`
	ModelRoot        string        `env:"FLIGHTSVC_MODEL_ROOT" placeholder:"DIR" help:"Folder or URI (file, s3, gs, azblob) in which model names are looked up."`
	PollInterval     time.Duration `env:"FLIGHTSVC_POLL_INTERVAL" default:"2s" help:"How often models in use are looked up again for a newer version; 0 is never."`
	CacheDir         string        `env:"FLIGHTSVC_CACHE_DIR" placeholder:"DIR" help:"Folder that keeps fetched and pushed models, and what was measured of models. Default: $$XDG_CACHE_HOME/flightsvc, else ~/.cache/flightsvc."`
	CacheSize        Bytes         `env:"FLIGHTSVC_CACHE_SIZE" default:"20GiB" help:"Most bytes of fetched and pushed models in the cache-dir; those used longest ago go first, those in use never. 0 is no bound."`
	OpLibraries      []string      `env:"FLIGHTSVC_OP_LIBRARIES" placeholder:"PATH" help:"Files with custom operations, or folders of them, that models may load. Default: none."`
	Libtensorflow    string        `env:"FLIGHTSVC_LIBTENSORFLOW" placeholder:"DIR" help:"Folder that holds libtensorflow_cc.so.2. Default: that of the tensorflow package of $$VIRTUAL_ENV or python3, asked at the first load."`
	RunDir           string        `env:"FLIGHTSVC_RUN_DIR" placeholder:"DIR" help:"Folder for sockets. Default: $$XDG_RUNTIME_DIR/flightsvc, else /tmp/flightsvc-UID."`
	IdleTimeout      time.Duration `env:"FLIGHTSVC_IDLE_TIMEOUT" default:"5m" help:"A detached front ends after this long without a call, a stream or a loading model; 0 is never."`
	Cores            int           `env:"FLIGHTSVC_CORES" default:"0" help:"Threads for each model. Default: the cores that this process may use."`
	Memory           Bytes         `env:"FLIGHTSVC_MEMORY" default:"0" help:"Memory of this host for all models together. Default: half of what the control group, or the machine, has."`
	KeepAlive        time.Duration `env:"FLIGHTSVC_KEEP_ALIVE" default:"5m" help:"How long a model stays in memory without a stream; 0 is for ever."`
	AllowCPUFallback bool          `name:"allow-cpu-fallback" env:"FLIGHTSVC_ALLOW_CPU_FALLBACK" help:"Run a model on the processor where no GPU has room for it, or the one that was asked for is gone."`
	Tune             string        `env:"FLIGHTSVC_TUNE" default:"off" enum:"off,quick" help:"quick: when idle, measure which configuration runs a model fastest, and use that from its next load."`
	MaxImagePixels   int64         `env:"FLIGHTSVC_MAX_IMAGE_PIXELS" default:"178956970" help:"Most pixels of a picture; a larger one is refused before it is decoded. Default: 178956970, twice Pillow's limit for a warning."`
	MaxImageBytes    int64         `env:"FLIGHTSVC_MAX_IMAGE_BYTES" default:"67108864" help:"Most bytes of a picture's file; a larger one is refused before it is decoded. Default: 64 MiB."`
	LogLevel         string        `env:"FLIGHTSVC_LOG_LEVEL" default:"info" enum:"debug,info,warn,error" help:"Least level to log: debug, info, warn, error."`
	LoadTimeout      time.Duration `env:"FLIGHTSVC_LOAD_TIMEOUT" default:"5m" help:"Bound on starting a runner and loading its model."`
	DrainTimeout     time.Duration `env:"FLIGHTSVC_DRAIN_TIMEOUT" default:"10s" help:"Bound on waiting for open streams when asked to end."`

	Python string `env:"FLIGHTSVC_PYTHON" placeholder:"PROGRAM" help:"Python that is asked where its tensorflow package is. Default: that of $$VIRTUAL_ENV, else python3."`

	Child    bool     `help:"Serve the process that started this one: end when standard input does, and write what was done as a line of JSON on standard output each second."`
	Executor string   `placeholder:"ID" help:"Spark's id of the executor that this server belongs to; status has it."`
	GPUs     []string `name:"gpus" placeholder:"ADDRESS" help:"Spark's addresses of the executor's GPUs; no other is used."`

	Detach  bool   `help:"Start in the background, in a session of its own with a clean environment; print its handshake line and return."`
	Owner   string `placeholder:"PID:START" help:"End with this process; START is its start time in clock ticks, field 22 of /proc/PID/stat."`
	OwnerFD int    `name:"owner-fd" default:"-1" placeholder:"N" help:"An open pidfd of the owner."`
}

// Validate reports all faults of the settings together.
func (s *Serve) Validate() error {
	var faults []error
	for name, value := range map[string]time.Duration{"load-timeout": s.LoadTimeout, "drain-timeout": s.DrainTimeout} {
		if value <= 0 {
			faults = append(faults, fmt.Errorf("%s is %s; want more than 0", name, value))
		}
	}
	if s.Child && s.Detach {
		faults = append(faults, errors.New("child and detach exclude one another: a child runs in the foreground"))
	}
	if s.Cores < 0 {
		faults = append(faults, fmt.Errorf("cores is %d; want 0 for all, or more", s.Cores))
	}
	for name, value := range map[string]time.Duration{"idle-timeout": s.IdleTimeout, "keep-alive": s.KeepAlive, "poll-interval": s.PollInterval} {
		if value < 0 {
			faults = append(faults, fmt.Errorf("%s is %s; want 0 or more", name, value))
		}
	}
	for name, value := range map[string]int64{"max-image-pixels": s.MaxImagePixels, "max-image-bytes": s.MaxImageBytes} {
		if value < 1 {
			faults = append(faults, fmt.Errorf("%s is %d; want 1 or more", name, value))
		}
	}
	return errors.Join(faults...)
}
