package front

import (
	"context"
	"errors"
	"io"

	"github.com/apache/arrow/go/v15/arrow/flight"
)

// relay copies a stream's messages to a runner and its answers back, without decoding the record batches in them.
// Back-pressure is gRPC's own: relay holds one message in each direction, and a side that does not read stops the other
// side's Send.
func relay(caller flight.FlightService_DoExchangeServer, runner flight.FlightServiceClient,
	first *flight.FlightData) error {
	ctx, cancel := context.WithCancel(caller.Context())
	defer cancel()
	onward, err := runner.DoExchange(ctx)
	if err != nil {
		return err
	}
	forwarded := make(chan struct{})
	go func() { // ends when the caller half-closes or leaves, or the runner's stream is over
		defer close(forwarded)
		for message := first; ; {
			if onward.Send(message) != nil {
				return // Recv below returns the runner's error
			}
			var err error
			if message, err = caller.Recv(); err != nil {
				if errors.Is(err, io.EOF) {
					_ = onward.CloseSend() // never fails, by its documentation
				} else {
					cancel()
				}
				return
			}
		}
	}()
	for {
		message, err := onward.Recv()
		if errors.Is(err, io.EOF) {
			<-forwarded
			return nil
		}
		if err != nil {
			caller.SetTrailer(onward.Trailer())
			return err
		}
		if err := caller.Send(message); err != nil {
			return err
		}
	}
}
