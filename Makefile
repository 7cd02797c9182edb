# Drover: what people and CI run. Tests are plain `cargo test`; see README.md for what each target needs.
#
#   make demo           the demonstration (IMAGE=... CMD=... for another image, SPEED=... Mbit/s)
#   make demo-mesh      the demonstration on several nodes at once (NODES=..., SPEED=..., REGISTRY_SPEED=... Mbit/s)
#   make test           everything that must pass; installs what it needs
#   make test-mesh      of that: nodes that give each other chunks, and machines of the mesh that fail
#   make test-faults    of that: kill -9 of every process at random moments (FAULTS=N times as often)
#   make check          format, lints, licences, documentation
#   make fuzz           every fuzz target for FUZZ_SECONDS
#   make bench-single   one node, timed (RUNS=..., SPEEDS="200 1000", IMAGE=torch, RIVALS=1)
#   make bench-files    a complete image against overlayfs: find, tar, imports, reads, a compiler (RUNS=...)
#   make bench-footprint  memory and processor time of an idle node
#   make bench-mesh     several nodes start an image at once (NODES="4 8", RUNS=..., SPEED=..., REGISTRY_SPEED=...)
#   make bench-fetch    one node: blobs that nobody knows against the registry itself, single chunks of a neighbour (SPEED=..., REGISTRY_SPEED=...)
#   make bench-swarm    a thousand nodes and more, simulated (SEED=..., ONLY="1000, 1 GiB")
#   make bench-kernels  ingest (BLOBS="FILE..." for layers of an image), scanning, the wire form
#   make test-address   unit tests with the address sanitizer, where nightly Rust is
#   make nightly        what takes too long for every change
#   make soak           make test-faults alone, with release builds and a hundred times as often

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
, := ,
# Mounts and namespaces need root; building does not.
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo --preserve-env=PATH$(,)HOME$(,)CARGO_HOME$(,)RUSTUP_HOME$(,)GOCACHE$(,)GOMODCACHE)

SPEED ?= 1000
REGISTRY_SPEED ?= 200
NODES ?= 8
FUZZ_SECONDS ?= 30
RUNS ?= 3
SPEEDS ?= 200 1000

DENY_VERSION := 0.20.2
DENY := $(TARGET)/tools/cargo-deny/bin/cargo-deny

# Program and the Debian or Ubuntu package that has it.
NEEDS_BUILD := cc:gcc make:make git:git
NEEDS_TEST := $(NEEDS_BUILD) ip:iproute2 tc:iproute2 bridge:iproute2 curl:curl tar:tar gzip:gzip zstd:zstd unshare:util-linux nsenter:util-linux \
    setpriv:util-linux mkfs.ext4:e2fsprogs fsck.erofs:erofs-utils dpkg-deb:dpkg
NEEDS_FUZZ := $(NEEDS_BUILD) c++:g++
NEEDS_DEMO := $(NEEDS_TEST) python3:python3 pip3:python3-pip npm:npm

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

# setup-KIND installs the packages that are missing. Nothing is started.
define install_missing
	@missing=""; \
	for need in $(1); do command -v "$${need%%:*}" >/dev/null || PATH="$$PATH:/usr/sbin:/sbin" command -v "$${need%%:*}" >/dev/null || missing="$$missing $${need#*:}"; done; \
	missing=$$(printf '%s\n' $$missing | sort -u | tr '\n' ' '); \
	if [ -n "$${missing// /}" ]; then echo "installing: $$missing"; $(SUDO) apt-get -qq update; $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $$missing; fi; \
	for need in cargo:Rust go:Go; do command -v $${need%%:*} >/dev/null || { echo "$${need#*:} is not installed or not in PATH: see README.md"; exit 1; }; done
endef

.PHONY: setup setup-fuzz setup-demo
setup:
	$(call install_missing,$(NEEDS_TEST))
setup-fuzz:
	$(call install_missing,$(NEEDS_FUZZ))
setup-demo:
	$(call install_missing,$(NEEDS_DEMO))

.PHONY: demo
demo: setup-demo
	@echo "building (release)"
	@$(CARGO) build --quiet --release -p drover-snapshotter -p drover-seeder -p integration --bins
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/demo --speed $(SPEED) $(if $(IMAGE),--image '$(IMAGE)') $(if $(CMD),--cmd $(call quoted,$(CMD)))

.PHONY: demo-mesh
demo-mesh: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/demo_mesh --nodes $(NODES) --speed $(SPEED) --registry-speed $(REGISTRY_SPEED)

# A text as one word of the shell.
quoted = '$(subst ','\'',$(1))'

.PHONY: test test-programs test-unit test-fuse test-containerd test-mesh test-faults
# Each tier says how long it took: all of CI has 45 minutes on two cold processors, of which the build may take 12, and the tiers 3,
# 4, 10, 6 and 5.
test: setup
	@for tier in test-programs test-unit test-fuse test-containerd test-mesh test-faults; do \
	    start=$$SECONDS; $(MAKE) --no-print-directory $$tier; echo "=== $$tier: $$((SECONDS - start)) s"; done

# All tests are built with the packages of the whole workspace, the daemons too: with a selection of packages some dependencies
# would have other features, and most would be built again for each selection.
test-programs: setup
	$(CARGO) build --workspace --bins --tests

# No root, no network, seconds.
test-unit:
	$(CARGO) test --workspace --lib --bins
	$(CARGO) test --workspace --exclude integration --test '*'

# The FUSE session, the keeper and EROFS on the real kernel, and all of them with an image of 128 layers.
test-fuse: setup
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) $(CARGO) test --workspace --test fuse --test erofs --test layers

# containerd's own snapshotter suite, everything end to end on the real containerd, every client with every containerd, and the
# client of registries on a real one.
test-containerd: test-programs
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_LAB_BUILT=1 $(CARGO) test --workspace --test snapshots --test containerd --test pull --test trouble --test clients --test registries

# The mesh on the real programs: every test has a registry, a seeder and some nodes with a containerd each, so that more than two
# tests at once take more memory than time.
test-mesh: test-programs
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_LAB_BUILT=1 $(CARGO) test --workspace --test mesh -- --test-threads=2

# Kills at moments that follow from a seed; see docs/RELIABILITY.md. Reads are timed, so no two at once.
FAULTS ?= 1
test-faults: test-programs
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_LAB_BUILT=1 DROVER_FAULTS=$(FAULTS) $(CARGO) test --workspace --test faults -- --test-threads=1 --nocapture

.PHONY: check fmt clippy deny doc
check: fmt clippy deny doc
fmt:
	$(CARGO) fmt --all --check
clippy:
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
# Module maps name private modules as well: whoever reads them has the source.
doc:
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --quiet

# Advisories are left out: their database is fetched from a git host that not every CI machine reaches.
deny: $(DENY)
	$(DENY) --log-level error check bans licenses sources
$(DENY):
	$(CARGO) install cargo-deny --locked --version $(DENY_VERSION) --root $(TARGET)/tools/cargo-deny --quiet

.PHONY: fuzz
# Every parser of what comes from elsewhere. The committed corpus is where it begins, and the unit tests replay it.
fuzz: setup-fuzz
	@CARGO=$(CARGO) CARGO_TARGET_DIR=$(TARGET) fuzz/run $(FUZZ_SECONDS)

.PHONY: bench-single bench-files bench-footprint bench-kernels bench-swarm bench-mesh bench-fetch
# The cores of many nodes on a modelled network. Without ONLY it takes hours, and the largest needs gigabytes of memory.
bench-swarm:
	@SEED=$(SEED) $(CARGO) bench --quiet -p swarm --bench mesh -- $(if $(ONLY),$(call quoted,$(ONLY)))

# Tables of ingest, of layers made from /usr or those in BLOBS; then scanning, inflating and the wire form, with criterion.
bench-kernels:
	$(CARGO) bench -p node --bench ingest -- $(BLOBS)
	$(CARGO) bench -p layer

.PHONY: bench-programs
bench-programs: setup-demo
	@$(CARGO) build --quiet --release -p drover-snapshotter -p drover-seeder -p integration --bins

bench-single: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/bench --runs $(RUNS) $(foreach speed,$(SPEEDS),--speed $(speed)) \
	    $(if $(IMAGE),--image $(IMAGE)) $(if $(RIVALS),--rivals) $(if $(COMPLETE),--complete)

bench-mesh: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/bench_mesh --runs $(RUNS) $(foreach nodes,$(NODES),--nodes $(nodes)) \
	    --speed $(SPEED) --registry-speed $(REGISTRY_SPEED)

bench-fetch: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/bench_fetch --speed $(SPEED) --registry-speed $(REGISTRY_SPEED)

bench-files: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/files --runs $(RUNS)

bench-footprint: bench-programs
	@$(SUDO) env DROVER_LAB_BUILT=1 $(TARGET)/release/footprint

# What takes too long for every change: large images compared file by file, more releases of containerd, more rounds of kills, and
# longer fuzzing, also with the address sanitizer where nightly Rust and cargo-fuzz are.
NIGHTLY_FUZZ_SECONDS ?= 600
NIGHTLY_KILLS ?= 200
# 1020 kills of the daemon under load, 544 of any process while images come and go.
NIGHTLY_FAULTS ?= 34
SOAK_FAULTS ?= 100
.PHONY: nightly soak
nightly: setup-demo setup-fuzz
	$(CARGO) build --release -p drover-snapshotter -p drover-seeder
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) $(CARGO) test --release -p integration -- --ignored --test-threads=1
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_KILLS=$(NIGHTLY_KILLS) $(CARGO) test --release -p integration --test fuse -- kills_of
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_FAULTS=$(NIGHTLY_FAULTS) $(CARGO) test --release -p integration --test faults -- --test-threads=1 --nocapture
	CARGO=$(CARGO) CARGO_TARGET_DIR=$(TARGET) fuzz/run $(NIGHTLY_FUZZ_SECONDS)
	CARGO=$(CARGO) CARGO_TARGET_DIR=$(TARGET) fuzz/run --address $(NIGHTLY_FUZZ_SECONDS)
	$(MAKE) test-address

# The unit tests of the crate whose unsafe code handles what comes from elsewhere, with the address sanitizer where nightly Rust is.
.PHONY: test-address
test-address:
	@if $(CARGO) +nightly --version >/dev/null 2>&1; then \
	    RUSTFLAGS=-Zsanitizer=address $(CARGO) +nightly test --quiet --package layer --lib --target-dir $(TARGET)/address \
	        --target "$$(rustc -vV | sed -n 's/^host: //p')"; \
	else echo "skipped: the address sanitizer needs nightly Rust (rustup toolchain install nightly)"; fi

soak: setup
	$(CARGO) build --release -p drover-snapshotter -p drover-seeder -p integration --bins
	$(SUDO) env CARGO_TARGET_DIR=$(TARGET) DROVER_LAB_BUILT=1 DROVER_FAULTS=$(SOAK_FAULTS) $(CARGO) test --release -p integration --test faults -- --test-threads=1 --nocapture
