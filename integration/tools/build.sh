#!/usr/bin/env bash
# Build pinned Go programs for the tests: integration/tools/build.sh NAME...
#
# NAME is a directory beside this script: a small Go module whose go.mod and go.sum pin everything. The commands that its
# tools.go imports (or its test binary, where it has *_test.go) are written to TARGET/tools/bin/NAME, TARGET being
# CARGO_TARGET_DIR or target/. A build that is up to date is skipped. Prints the directory of each NAME on stdout.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
mkdir -p "$target/tools/bin"
target=$(cd "$target" && pwd)

[ $# -gt 0 ] || { echo "usage: $0 NAME...   (one of: $(cd "$here" && ls -d -- */ | tr -d / | tr '\n' ' '))" >&2; exit 2; }
command -v go >/dev/null || { echo "$0: Go is not installed: install Go as named in integration/tools/*/go.mod" >&2; exit 1; }

for name in "$@"; do
    module=$here/$name
    [ -f "$module/go.mod" ] || { echo "$0: no module $name in $here" >&2; exit 2; }
    out=$target/tools/bin/$name
    stamp=$target/tools/$name.stamp
    # One build at a time: it uses all processors, and the next one reuses packages that both compile.
    exec 9>"$target/tools/build.lock"
    flock 9
    want=$( (cd "$module" && go version && find . -name "*.go" -o -name "go.*" | LC_ALL=C sort | xargs sha256sum --) | sha256sum)
    if [ ! -d "$out" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "building $name" >&2
        rm -rf "$out.new" "$stamp"
        mkdir -p "$out.new"
        (
            cd "$module"
            # SOCI inflates with zlib (package zlib1g-dev), runc enters namespaces in C; everything else is plain Go.
            case $name in soci | runc) export CGO_ENABLED=1 ;; *) export CGO_ENABLED=0 ;; esac
            export GOFLAGS="-mod=readonly -buildvcs=false -trimpath"
            if compgen -G '*_test.go' >/dev/null; then
                go test -c -o "$out.new/$name.test" .
            else
                go list -e -tags tools -f '{{join .Imports "\n"}}' . | xargs go build -o "$out.new/"
            fi
        ) >&2
        rm -rf "$out"
        mv "$out.new" "$out"
        echo "$want" >"$stamp"
    fi
    exec 9>&-
    echo "$out"
done
