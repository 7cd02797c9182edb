//go:build tools

// Package stargz pins stargz-snapshotter for `bench --rivals`: built by ../build.sh. Its own commands are a module that the
// module proxy does not have, so these two small ones call the same packages.
package stargz

import (
	_ "drover/integration/tools/stargz/stargz-convert"
	_ "drover/integration/tools/stargz/stargz-serve"
)
