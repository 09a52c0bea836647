// Package control defines the messages between a front and its runners, one line of JSON each.
//
// What may enter: the messages, and what both ends need to write and read them.
package control
