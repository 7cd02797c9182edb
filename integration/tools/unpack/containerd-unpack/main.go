// Command containerd-unpack applies a layer's tar to a directory exactly as containerd does on an overlayfs snapshot.
//
//	containerd-unpack < LIST
//
// LIST has a line per layer: the tar, the directory to unpack into (made here), and the directories of the layers below
// it, the uppermost first, all separated by tabs. For each line "ok" or "error: ..." is printed.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
)

func main() {
	if err := log.SetLevel("error"); err != nil {
		panic(err)
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), "\t")
		if err := unpack(fields[0], fields[1], fields[2:]); err != nil {
			fmt.Printf("error: %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
		} else {
			fmt.Println("ok")
		}
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func unpack(layer, root string, parents []string) error {
	file, err := os.Open(layer)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	options := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
	if len(parents) > 0 {
		options = append(options, archive.WithParents(parents))
	}
	_, err = archive.Apply(context.Background(), root, file, options...)
	return err
}
