// Command stargz-convert makes an eStargz image of an OCI image layout, as `ctr-remote image convert --estargz --oci` does.
//
//	stargz-convert LAYOUT NEW
//
// LAYOUT holds one image manifest with gzip layers; NEW is made.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/stargz-snapshotter/estargz"
	nativeestargz "github.com/containerd/stargz-snapshotter/nativeconverter/estargz"
	"github.com/opencontainers/go-digest"
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
	if err := readJSON(filepath.Join(layout, "index.json"), &index); err != nil {
		return err
	}
	// The converter writes into the store that it reads from: the blobs are linked into the new one.
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
	store, err := local.NewLabeledStore(target, memoryLabels{})
	if err != nil {
		return err
	}
	var manifest ocispec.Manifest
	if err := readBlob(ctx, store, index.Manifests[0], &manifest); err != nil {
		return err
	}
	// The configuration has keys that the specification's type does not know: only the diffIDs are replaced.
	var config map[string]any
	if err := readBlob(ctx, store, manifest.Config, &config); err != nil {
		return err
	}
	convertLayer := nativeestargz.LayerConvertFunc(estargz.WithCompressionLevel(9))
	var diffIDs []any
	for i, layer := range manifest.Layers {
		converted, err := convertLayer(ctx, store, layer)
		if err != nil {
			return fmt.Errorf("layer %s: %w", layer.Digest, err)
		}
		info, err := store.Info(ctx, converted.Digest)
		if err != nil {
			return err
		}
		diffIDs = append(diffIDs, info.Labels["containerd.io/uncompressed"])
		if err := os.Remove(filepath.Join(blobs, layer.Digest.Encoded())); err != nil {
			return err
		}
		manifest.Layers[i] = *converted
	}
	config["rootfs"] = map[string]any{"type": "layers", "diff_ids": diffIDs}
	if manifest.Config, err = writeBlob(blobs, manifest.Config.MediaType, config); err != nil {
		return err
	}
	described, err := writeBlob(blobs, ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	index.Manifests = []ocispec.Descriptor{described}
	if err := os.WriteFile(filepath.Join(target, "oci-layout"), []byte(`{"imageLayoutVersion": "1.0.0"}`), 0o644); err != nil {
		return err
	}
	return writeJSON(filepath.Join(target, "index.json"), index)
}

// memoryLabels keeps the labels of blobs, which a folder has no place for.
type memoryLabels map[digest.Digest]map[string]string

func (labels memoryLabels) Get(blob digest.Digest) (map[string]string, error) {
	return labels[blob], nil
}

func (labels memoryLabels) Set(blob digest.Digest, values map[string]string) error {
	labels[blob] = values
	return nil
}

func (labels memoryLabels) Update(blob digest.Digest, values map[string]string) (map[string]string, error) {
	labels[blob] = values
	return values, nil
}

func readJSON(path string, value any) error {
	bytes, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(bytes, value)
}

func writeJSON(path string, value any) error {
	bytes, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return os.WriteFile(path, bytes, 0o644)
}

func readBlob(ctx context.Context, store content.Provider, blob ocispec.Descriptor, value any) error {
	bytes, err := content.ReadBlob(ctx, store, blob)
	if err != nil {
		return err
	}
	return json.Unmarshal(bytes, value)
}

func writeBlob(blobs, mediaType string, value any) (ocispec.Descriptor, error) {
	bytes, err := json.Marshal(value)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	described := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(bytes), Size: int64(len(bytes))}
	return described, os.WriteFile(filepath.Join(blobs, described.Digest.Encoded()), bytes, 0o644)
}
