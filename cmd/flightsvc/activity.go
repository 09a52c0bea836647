package main

import (
	"context"
	"time"

	"google.golang.org/grpc/stats"
)

func (a *activity) touch() { a.last.Store(time.Now().UnixNano()) }

// HandleRPC counts calls; it is part of stats.Handler.
func (a *activity) HandleRPC(_ context.Context, event stats.RPCStats) {
	switch event.(type) {
	case *stats.Begin:
		a.open.Add(1)
		a.touch()
	case *stats.End:
		a.open.Add(-1)
		a.touch()
	}
}

// TagRPC is part of stats.Handler.
func (a *activity) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context { return ctx }

// TagConn is part of stats.Handler.
func (a *activity) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn is part of stats.Handler.
func (a *activity) HandleConn(context.Context, stats.ConnStats) {}

// Interface guards.
var _ stats.Handler = (*activity)(nil)
