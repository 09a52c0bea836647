//go:build !simulated_device

package main

import (
	"flightsvc/internal/control"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

// openSession loads the SavedModel of a setup into TensorFlow.
func openSession(setup control.Setup, options tensorflow.Options) (session, error) {
	opened, err := tensorflow.Load(setup.Dir, []string{savedmodel.ServeTag}, options)
	if err != nil {
		return nil, err // not opened: a nil *tensorflow.Session in an interface is not nil
	}
	return opened, nil
}
