// Command stargz-serve runs stargz-snapshotter with its default settings on a Unix socket.
//
//	stargz-serve ROOT SOCKET REGISTRY
//
// REGISTRY (host:port) is reached by plain HTTP.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"google.golang.org/grpc"
)

func main() {
	if err := serve(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(root, socket, registry string) error {
	if err := log.SetLevel("warn"); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	config := &service.Config{}
	config.ResolverConfig.Host = map[string]resolver.HostConfig{
		registry: {Mirrors: []resolver.MirrorConfig{{Host: registry, Insecure: true}}},
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, config)
	if err != nil {
		return err
	}
	rpc := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(rpc, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go func() {
		<-ctx.Done()
		rpc.Stop()
	}()
	if err := rpc.Serve(listener); err != nil {
		return err
	}
	return snapshotter.Close()
}
