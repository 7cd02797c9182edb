//go:build tools

// Package unpack pins containerd's layer unpacker: built by ../build.sh, run by ../../tests/unpack.rs.
package unpack

import _ "drover/integration/tools/unpack/containerd-unpack"
