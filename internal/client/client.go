// Package client is the command line's Flight client of a front: it calls actions.
//
// What may enter: what a caller says to a server. What a server does lives in handlers.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/apache/arrow/go/v15/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"flightsvc/internal/build"
	"flightsvc/internal/protocol"
)

// maxAnswerBytes is more than any answer has; the server bounds them.
const maxAnswerBytes = 1 << 30

// dialTimeout bounds the connection by which Dial checks that somebody listens.
const dialTimeout = 5 * time.Second

// Client is a connection to one front. Its methods are safe for concurrent use.
type Client struct {
	endpoint string
	conn     *grpc.ClientConn
	front    flight.FlightServiceClient
}

// Dial connects to the front at an endpoint, grpc+unix:///path or a bare absolute path. It is an error if the endpoint
// has another form, or if nobody listens there.
func Dial(endpoint string) (*Client, error) {
	if filepath.IsAbs(endpoint) {
		endpoint = protocol.Scheme + endpoint
	}
	path, err := protocol.SocketPath(endpoint)
	if err != nil {
		return nil, err
	}
	probe, err := net.DialTimeout("unix", path, dialTimeout)
	if err != nil {
		return nil, fmt.Errorf("no flightsvc answers at %s: %w", endpoint, cause(err))
	}
	_ = probe.Close()
	conn, err := connect(path)
	if err != nil {
		return nil, err
	}
	return &Client{endpoint: endpoint, conn: conn, front: flight.NewFlightServiceClient(conn)}, nil
}

// cause drops the address from Go's network errors, since Dial's message has the endpoint already.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func connect(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path,
		grpc.WithUserAgent("flightsvc/"+build.Version+" build/"+build.ID()),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswerBytes)))
}

// Endpoint returns where the front is.
func (c *Client) Endpoint() string { return c.endpoint }

// Close closes the connection; the front stays.
func (c *Client) Close() error { return c.conn.Close() }

// Action calls an action. body is sent as JSON. Each result is decoded into a T, which may lack fields of the result,
// and given to take, whose error ends the call. Other errors have the server's message.
func Action[T any](ctx context.Context, c *Client, name string, body any, take func(T) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	results, err := c.front.DoAction(ctx, &flight.Action{Type: name, Body: text})
	if err != nil {
		return c.say(err)
	}
	for {
		result, err := results.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.say(err)
		}
		var answer T
		if err := json.Unmarshal(result.GetBody(), &answer); err != nil {
			return fmt.Errorf("the answer to %s cannot be read: %w", name, err)
		}
		if err := take(answer); err != nil {
			return err
		}
	}
}

// Ask is Action for an action with one result.
func Ask[T any](ctx context.Context, c *Client, name string, body any) (answer T, err error) {
	err = Action(ctx, c, name, body, func(result T) error {
		answer = result
		return nil
	})
	return answer, err
}

// say returns an error with only the server's message of an error of gRPC.
func (c *Client) say(err error) error {
	var told interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &told) { // As, because Arrow wraps gRPC's error
		return err
	}
	about := told.GRPCStatus()
	text := about.Message()
	if about.Code() == codes.Unavailable && strings.HasPrefix(text, "connection error") {
		text = fmt.Sprintf("no flightsvc answers at %s any longer: %s", c.endpoint, text)
	}
	return errors.New(text)
}
