// Package config is the one table of the server's settings. Each setting has one name in four spellings: the flag
// --model-root, the variable FLIGHTSVC_MODEL_ROOT, model_root in the configuration file, and spark.flightsvc.modelRoot,
// which the shim turns into the flag. A flag overrides the environment, the environment the file, and the file the
// default.
//
// No other package of the server reads settings from the environment.
package config

import (
	"errors"
	"fmt"
	"time"
)

// Values of the setting tune: what a front does for its models in the background.
const (
	TuneOff   = "off"
	TuneFold  = "fold"  // it makes the folded form of each model that it serves
	TuneQuick = "quick" // that, and when idle it measures which configuration runs a model fastest
)

// MaxThreads is the most threads, or runs at once, that may be asked for: more would cost memory, and no host has use
// for them.
const MaxThreads = 1024

// Serve are the settings of `flightsvc serve`.
type Serve struct {
	Endpoint         string        `env:"FLIGHTSVC_ENDPOINT" placeholder:"grpc+unix:///PATH" help:"Unix socket to serve on. Default: front.sock in a new folder in the run-dir."`
	ModelRoot        string        `env:"FLIGHTSVC_MODEL_ROOT" placeholder:"DIR" help:"Folder or URI (file, s3, gs, azblob) in which model names are looked up."`
	PollInterval     time.Duration `env:"FLIGHTSVC_POLL_INTERVAL" default:"2s" help:"How often models in use are checked for a newer version; 0 is never."`
	CacheDir         string        `env:"FLIGHTSVC_CACHE_DIR" placeholder:"DIR" help:"Folder for fetched and pushed models, and measurements of models. Default: $$XDG_CACHE_HOME/flightsvc, else ~/.cache/flightsvc."`
	CacheSize        Bytes         `env:"FLIGHTSVC_CACHE_SIZE" default:"20GiB" help:"Largest total size of the models in the cache-dir; the least recently used are removed first, those in use never. 0 is no limit."`
	OpLibraries      []string      `env:"FLIGHTSVC_OP_LIBRARIES" placeholder:"PATH" help:"Files with custom operations, or folders of them, that models may load. Default: none."`
	Libtensorflow    string        `env:"FLIGHTSVC_LIBTENSORFLOW" placeholder:"DIR" help:"Folder that holds libtensorflow_cc.so.2. Default: that of the tensorflow package of $$VIRTUAL_ENV or python3, looked up at the first load."`
	RunDir           string        `env:"FLIGHTSVC_RUN_DIR" placeholder:"DIR" help:"Folder for sockets. Default: $$XDG_RUNTIME_DIR/flightsvc, else /tmp/flightsvc-UID."`
	IdleTimeout      time.Duration `env:"FLIGHTSVC_IDLE_TIMEOUT" default:"5m" help:"A detached front ends after this time without a call, a stream or a loading model; 0 is never."`
	Cores            int           `env:"FLIGHTSVC_CORES" default:"0" help:"Threads for each model. Default: the cores that this process may use."`
	Memory           Bytes         `env:"FLIGHTSVC_MEMORY" default:"0" help:"Host memory for all models together. Default: half of the control group's limit, or of the machine's memory."`
	KeepAlive        time.Duration `env:"FLIGHTSVC_KEEP_ALIVE" default:"5m" help:"How long a model stays in memory without a stream; 0 is for ever."`
	AllowCPUFallback bool          `name:"allow-cpu-fallback" env:"FLIGHTSVC_ALLOW_CPU_FALLBACK" help:"Run a model on the CPU if no GPU has room for it, or the requested one is gone."`
	Tune             string        `env:"FLIGHTSVC_TUNE" default:"fold" enum:"off,fold,quick" help:"What to do for models in the background. fold: freeze and fold their graphs, where that is possible. quick: also measure, when idle, which configuration runs a model fastest, and use it from the next load."`
	MaxImagePixels   int64         `env:"FLIGHTSVC_MAX_IMAGE_PIXELS" default:"178956970" help:"Largest number of pixels of a picture; a larger one is refused before it is decoded. Default: 178956970, twice Pillow's limit for a warning."`
	MaxImageBytes    int64         `env:"FLIGHTSVC_MAX_IMAGE_BYTES" default:"67108864" help:"Largest size of a picture's file in bytes; a larger one is refused before it is decoded. Default: 64 MiB."`
	LogLevel         string        `env:"FLIGHTSVC_LOG_LEVEL" default:"info" enum:"debug,info,warn,error" help:"Lowest level to log: debug, info, warn, error."`
	LoadTimeout      time.Duration `env:"FLIGHTSVC_LOAD_TIMEOUT" default:"5m" help:"Time limit for starting a runner and loading its model."`
	DrainTimeout     time.Duration `env:"FLIGHTSVC_DRAIN_TIMEOUT" default:"10s" help:"How long to wait for open streams when shutting down."`

	Python string `env:"FLIGHTSVC_PYTHON" placeholder:"PROGRAM" help:"Python whose tensorflow package is used. Default: that of $$VIRTUAL_ENV, else python3."`

	Child    bool     `help:"For a parent process: end when standard input does, and write counts as a line of JSON to standard output each second."`
	Executor string   `placeholder:"ID" help:"Spark's id of the executor that this server belongs to, shown by status."`
	GPUs     []string `name:"gpus" placeholder:"ADDRESS" help:"Spark's addresses of the executor's GPUs; no other is used."`

	Detach  bool   `help:"Start in the background, in a new process session with a clean environment; print the handshake line and return."`
	Owner   string `placeholder:"PID:START" help:"End with this process; START is its start time in clock ticks, field 22 of /proc/PID/stat."`
	OwnerFD int    `name:"owner-fd" default:"-1" placeholder:"N" help:"An open pidfd of the owner."`
}

// Validate reports all faults of the settings together, always in the same order.
func (s *Serve) Validate() error {
	var faults []error
	refuse := func(is bool, format string, args ...any) {
		if is {
			faults = append(faults, fmt.Errorf(format, args...))
		}
	}
	refuse(s.LoadTimeout <= 0, "load-timeout is %s; want more than 0", s.LoadTimeout)
	refuse(s.DrainTimeout <= 0, "drain-timeout is %s; want more than 0", s.DrainTimeout)
	refuse(s.Child && s.Detach, "child and detach exclude one another: a child runs in the foreground")
	refuse(s.Cores < 0 || s.Cores > MaxThreads, "cores is %d; want 0 for all, or at most %d", s.Cores, MaxThreads)
	refuse(s.IdleTimeout < 0, "idle-timeout is %s; want 0 or more", s.IdleTimeout)
	refuse(s.KeepAlive < 0, "keep-alive is %s; want 0 or more", s.KeepAlive)
	refuse(s.PollInterval < 0, "poll-interval is %s; want 0 or more", s.PollInterval)
	refuse(s.MaxImagePixels < 1, "max-image-pixels is %d; want 1 or more", s.MaxImagePixels)
	refuse(s.MaxImageBytes < 1, "max-image-bytes is %d; want 1 or more", s.MaxImageBytes)
	return errors.Join(faults...)
}
