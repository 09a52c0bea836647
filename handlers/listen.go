// Listening: Unix sockets that only their own user can use, and gRPC servers on them.

package handlers

import (
	"fmt"
	"net"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"

	"github.com/apache/arrow/go/v15/arrow/flight"

	"flightsvc/internal/protocol"
)

// Listen opens a Unix socket at path with mode 0600, in place of one that lies there already. Only processes of the
// same user can connect: the connections of others are closed at once.
func Listen(path string, log *zap.Logger) (net.Listener, error) {
	if _, err := protocol.SocketPath(protocol.Scheme + path); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and is not a socket; choose another endpoint", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = listener.Close()
		return nil, err
	}
	return &sameUser{Listener: listener, log: log}, nil
}

// sameUser refuses connections from other users, whatever the modes of the folders above the socket allow.
type sameUser struct {
	net.Listener
	log *zap.Logger
}

func (l *sameUser) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn.(*net.UnixConn))
		if err == nil && uid == uint32(os.Geteuid()) {
			return conn, nil
		}
		l.log.Warn("connection of another user refused", zap.Uint32("uid", uid), zap.Error(err))
		_ = conn.Close()
	}
}

func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

// window is the flow-control window of a stream and of a connection: so large that one large record batch does not wait
// for the reader's acknowledgements.
const window = 4 << 20

// NewServer returns a gRPC server for service, with the Interceptors, the bound on messages and reflection (which lists
// the services). more are further options.
func NewServer(service flight.FlightServer, log *zap.Logger, more ...grpc.ServerOption) *grpc.Server {
	options := append(append(Interceptors(log), more...),
		grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
	)
	server := grpc.NewServer(options...)
	flight.RegisterFlightServiceServer(server, service)
	reflection.Register(server)
	return server
}
