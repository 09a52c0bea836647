// Package protocol is the wire contract of docs/protocol.md, as Go types: descriptors, the lease in a ticket, the
// metadata of an answer, bodies and results of actions and puts, and addresses. The server and our own client both
// read and write them here.
//
// What may enter: what JSON on the wire says, how it is read strictly, and which of it no server could do. What a
// request means for one model is package handlers'; Arrow and gRPC stay outside.
package protocol
