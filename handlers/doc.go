// Package handlers serves Arrow Flight: the runner's service, which is inference on a stream, and what that shares with
// the front's service in handlers/front: the listener, checked reading of Arrow messages, the plan of a request, and
// the table of errors. The front is a package of its own because it links model stores and NVML, which no runner needs.
//
// This package knows the wire format and nothing of TensorFlow: a runner gives it the model as an Engine.
//
// Memory: a record batch read from a stream lives until the tensors made from it are released; the record batches of an
// answer view the engine's outputs and are written before those are freed.
package handlers
