//go:build tools

// Package hello pins the program of the tests' static Go image.
package hello

import _ "drover/integration/tools/hello/hello"
