package client

import "flightsvc/modelcache/tuning"

// Status is the answer of the action status, as far as people are shown it. Sizes are bytes.
type Status struct {
	Flightsvc string        `json:"flightsvc"`
	Build     string        `json:"build"`
	Server    string        `json:"server"`
	PID       int           `json:"pid"`
	Models    []ModelStatus `json:"models"`
	Memory    Memory        `json:"memory"`
	Devices   []Device      `json:"devices"`
}

// Memory is what a front has of its host's memory for models, and what of it models have.
type Memory struct {
	Budget   int64 `json:"budget"`
	Reserved int64 `json:"reserved"`
}

// ModelStatus is a model in memory or on its way there. Device is the UUID of a GPU, or "" for the processor.
type ModelStatus struct {
	Model     string         `json:"model"`
	Version   string         `json:"version"`
	State     string         `json:"state"`
	Reason    string         `json:"reason"`
	Device    string         `json:"device"`
	Streams   int            `json:"streams"`
	Memory    int64          `json:"memory"`
	Reserved  int64          `json:"reserved"`
	Tuned     *tuning.Choice `json:"tuned"`
	NotFrozen string         `json:"not_frozen"`
}

// Device is a GPU, or an instance of one, whose UUID Parent is then.
type Device struct {
	UUID        string `json:"uuid"`
	Name        string `json:"name"`
	Index       string `json:"index"`
	Parent      string `json:"parent"`
	Memory      int64  `json:"memory"`
	Free        int64  `json:"free"`
	Compute     string `json:"compute"`
	Utilisation int    `json:"utilisation"` // percent, -1 where it is not known
	Healthy     bool   `json:"healthy"`
	Reason      string `json:"reason"`
}
