// Command soci-serve runs soci-snapshotter with its default settings on a Unix socket.
//
//	soci-serve ROOT SOCKET REGISTRY CONTAINERD
//
// REGISTRY (host:port) is reached by plain HTTP; CONTAINERD is containerd's socket.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/awslabs/soci-snapshotter/config"
	"github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/metadata"
	"github.com/awslabs/soci-snapshotter/service"
	"github.com/awslabs/soci-snapshotter/ztoc"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

func main() {
	if err := serve(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(root, socket, registry, containerd string) error {
	if err := log.SetLevel("warn"); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	settings := config.NewConfig()
	if settings == nil {
		return errors.New("soci-snapshotter has no default configuration")
	}
	settings.ResolverConfig.Host = map[string]config.HostConfig{
		registry: {Mirrors: []config.MirrorConfig{{Host: "http://" + registry, Insecure: true}}},
	}
	settings.FSConfig.ContentStoreConfig.ContainerdAddress = containerd
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	// As its own command does by default: the file trees of all layers in one database on disk.
	database, err := bbolt.Open(filepath.Join(root, "metadata.db"), 0o600, &bbolt.Options{
		NoFreelistSync: true, InitialMmapSize: 64 << 20, FreelistType: bbolt.FreelistMapType,
	})
	if err != nil {
		return err
	}
	defer database.Close()
	trees := func(toc *io.SectionReader, table ztoc.TOC, options ...metadata.Option) (metadata.Reader, error) {
		return metadata.NewReader(database, toc, table, options...)
	}
	snapshotter, err := service.NewSociSnapshotterService(
		ctx, root, &settings.ServiceConfig, service.WithFilesystemOptions(fs.WithMetadataStore(trees)),
	)
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
