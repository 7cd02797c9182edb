//go:build tools

// Package soci pins soci-snapshotter for `bench --rivals`: built by ../build.sh. Its own commands are a module that the
// module proxy does not have, so these two small ones call the same packages.
package soci

import (
	_ "drover/integration/tools/soci/soci-convert"
	_ "drover/integration/tools/soci/soci-serve"
)
