// Package protocol is the wire contract of docs/protocol.md, as Go types: descriptors, the lease in a ticket, the
// metadata of an answer, bodies and results of actions and puts, and addresses. The server and the command line's
// client both read and write them here.
//
// What may enter: the JSON on the wire, its strict reading, and checks that need no model. What a request means for one
// model is package handlers'; Arrow and gRPC stay outside.
package protocol
