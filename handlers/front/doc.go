// Package front is the Flight service that callers find first: schemas, tickets, relayed streams, actions, lists of
// models, and models that are pushed. It keeps no model itself: package modelcache does, and runners run them.
package front
