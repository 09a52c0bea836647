// Command echo is the baseline for latency: a Flight server on a Unix socket, with flightsvc's
// listener and gRPC settings, that returns each message of an exchange unchanged.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"go.uber.org/zap"

	"flightsvc/handlers"
)

type echo struct{ flight.BaseFlightServer }

// DoExchange sends back what comes in.
func (*echo) DoExchange(stream flight.FlightService_DoExchangeServer) error {
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(message.DataHeader) == 0 {
			continue // a descriptor of its own message is no record batch
		}
		message.FlightDescriptor = nil
		if err := stream.Send(message); err != nil {
			return err
		}
	}
}

// main serves on the socket named by its one argument until its standard input ends.
func main() {
	listener, err := handlers.Listen(os.Args[1], zap.NewNop())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	server := handlers.NewServer(&echo{}, zap.NewNop())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		server.Stop()
	}()
	fmt.Println("ready")
	if err := server.Serve(listener); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
