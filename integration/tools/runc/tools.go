//go:build tools

// Package tools names the commands that ../build.sh builds from the versions in go.mod and go.sum.
package tools

import (
	_ "github.com/opencontainers/runc"
)
