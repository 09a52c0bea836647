// Package logging makes the logger of fronts and runners: JSON lines on standard error. Keys are snake case; durations
// are seconds.
package logging

import (
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// New returns a logger that writes lines of at least the given level (debug, info, warn,
// error), each with the name and id of the process.
func New(level, name string) (*zap.Logger, error) {
	least, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, err
	}
	settings := zap.NewProductionConfig()
	settings.Level = zap.NewAtomicLevelAt(least)
	settings.Sampling = nil
	settings.DisableStacktrace = true
	settings.EncoderConfig.TimeKey = "time"
	settings.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	log, err := settings.Build()
	if err != nil {
		return nil, err
	}
	return log.Named(name), nil
}
