// Package client is a Flight client of a front, for our own command line: it asks for actions.
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

// maxAnswerBytes lets any answer through: its size was bounded by the server.
const maxAnswerBytes = 1 << 30

// dialTimeout bounds the look whether anybody listens; a Unix socket answers at once or never.
const dialTimeout = 5 * time.Second

// Client is a connection to one front. Its methods are safe for concurrent use.
type Client struct {
	endpoint string
	conn     *grpc.ClientConn
	front    flight.FlightServiceClient
}

// Dial connects to the front at an endpoint, grpc+unix:///path or a bare absolute path. Its error says that
// the endpoint is not one, or that nobody listens there.
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

// cause leaves away what Go's network errors say of the address, which our sentence has named already.
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

// Close drops the connection; the front stays.
func (c *Client) Close() error { return c.conn.Close() }

// Action asks the front to do something. body is sent as JSON; each result is read into one of T, which need not
// know all its fields, and given to take, whose error ends the call. Errors: what the server said, or that of take.
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

// say turns what gRPC returned into the server's own sentence.
func (c *Client) say(err error) error {
	var told interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &told) { // Arrow puts its own words around it
		return err
	}
	about := told.GRPCStatus()
	text := about.Message()
	if about.Code() == codes.Unavailable && strings.HasPrefix(text, "connection error") {
		text = fmt.Sprintf("no flightsvc answers at %s any longer: %s", c.endpoint, text)
	}
	return errors.New(text)
}
