// Package suite runs containerd's own snapshotter suite against a Snapshots service on a socket.
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	_ "github.com/containerd/containerd/v2/pkg/testutil" // registers -test.root
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// commandVariable holds the server's command line, separated by newlines; {root} and {socket} are filled in per test.
const commandVariable = "SNAPSHOTS_SERVER"

// TestSnapshotter runs the suite. Its name argument must be "overlayfs": under any other name the suite expects directory
// renames that overlayfs cannot do without redirect_dir.
func TestSnapshotter(t *testing.T) {
	command := strings.Split(os.Getenv(commandVariable), "\n")
	if command[0] == "" {
		t.Fatalf("%s is not set: it must hold the command line of a Snapshots server", commandVariable)
	}
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		return start(ctx, command, root)
	})
}

// start runs a server of its own for one test: against a shared one the suite's tests see each other's snapshots.
func start(ctx context.Context, command []string, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(filepath.Dir(root), "snapshots.sock")
	fill := strings.NewReplacer("{root}", root, "{socket}", socket)
	arguments := make([]string, len(command))
	for i, argument := range command {
		arguments[i] = fill.Replace(argument)
	}
	server := exec.Command(arguments[0], arguments[1:]...)
	server.Stdout, server.Stderr = os.Stderr, os.Stderr
	// No Pdeathsig: it fires when the starting thread ends, which containerd's mount code does to threads. Whoever runs this
	// program puts it into a process namespace, which ends servers too.
	if err := server.Start(); err != nil {
		return nil, nil, err
	}
	exited := make(chan error, 1)
	go func() { exited <- server.Wait() }()
	stop := func() error {
		_ = server.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-exited:
			return err
		case <-time.After(20 * time.Second):
			_ = server.Process.Kill()
			<-exited
			return fmt.Errorf("%s did not end within 20 s of SIGTERM", arguments[0])
		}
	}

	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		_ = stop()
		return nil, nil, err
	}
	cleanup := func() error {
		_ = connection.Close()
		return stop()
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "overlayfs")

	deadline := time.After(30 * time.Second)
	for {
		// Not before the socket is there: gRPC waits a second after a failed dial.
		_, err := os.Stat(socket)
		if err == nil {
			attempt, cancel := context.WithTimeout(ctx, time.Second)
			err = snapshotter.Walk(attempt, func(context.Context, snapshots.Info) error { return nil })
			cancel()
		}
		if err == nil {
			return snapshotter, cleanup, nil
		}
		select {
		case exit := <-exited:
			exited <- exit
			_ = cleanup()
			return nil, nil, fmt.Errorf("the server ended before it served: %v", exit)
		case <-deadline:
			_ = cleanup()
			return nil, nil, fmt.Errorf("the server did not serve within 30 s: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
