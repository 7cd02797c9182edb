// Command soci-convert adds a SOCI index to the image of an OCI image layout, as `soci convert` does (index version 2).
//
//	soci-convert LAYOUT NEW
//
// LAYOUT holds one image manifest with gzip layers; NEW is made and holds an image index.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	if err := convert(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func convert(ctx context.Context, layout, target string) error {
	var index ocispec.Index
	bytes, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(bytes, &index); err != nil {
		return err
	}
	// Indexes are written into the store that the image is read from: its blobs are linked into the new one.
	blobs := filepath.Join(target, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	from := filepath.Join(layout, "blobs", "sha256")
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.Link(filepath.Join(from, entry.Name()), filepath.Join(blobs, entry.Name())); err != nil {
			return err
		}
	}
	readable, err := local.NewStore(target)
	if err != nil {
		return err
	}
	writable, err := store.NewSociStore(target)
	if err != nil {
		return err
	}
	database, err := soci.NewDB(filepath.Join(target, "artifacts.db"))
	if err != nil {
		return err
	}
	builder, err := soci.NewIndexBuilder(readable, writable, soci.WithArtifactsDb(database))
	if err != nil {
		return err
	}
	if len(index.Manifests) != 1 {
		return errors.New("the layout must hold one image")
	}
	described, err := builder.Convert(ctx, images.Image{Name: "subject", Target: index.Manifests[0]})
	if err != nil {
		return err
	}
	index.Manifests = []ocispec.Descriptor{*described}
	if bytes, err = json.Marshal(index); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(target, "index.json"), bytes, 0o644)
}
