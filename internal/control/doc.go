// Package control is what a front and its runners say to each other, a line of JSON each, and what both know of the
// model that is built in.
//
// What may enter: the messages, and what both ends need to write and read them.
package control
