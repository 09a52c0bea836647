// Package handlers speaks Arrow Flight: the front's service (schemas, redirect, relay,
// actions), the runner's service (inference on a stream), and what both share (the
// descriptor, the lease in a ticket, the table of errors, the listener).
//
// It knows the wire and nothing of TensorFlow: a runner hands in its model as an
// Engine, the front its runners as a Repository.
//
// Memory: a record batch read from a stream lives until the tensors made from it are
// released; the record batches of an answer view the engine's outputs and are written
// before those are freed.
package handlers
