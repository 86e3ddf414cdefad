# What people and CI call. Everything is built static; make needs Go and nothing else, each target
# that needs more installs it first through tests/setup (Debian packages, as root).

GO      ?= go
BIN     := build/muster
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

export CGO_ENABLED := 0

.DEFAULT_GOAL := build
# Where the C parts go: Slurm's plug-in and TaskProlog. A plug-in is good for the release of Slurm whose headers it saw.
PLUGIN  := build
SPANK   := jobhooks/slurm/spank

.PHONY: build plugin demo test setup lint unit e2e e2e-long race fuzz bench bench-start bench-read bench-mount bench-ztoc bench-inflate sim sim-trees clean

build:
	$(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN) ./cmd/muster

# Needs a C compiler and Slurm's headers (Debian: gcc, libslurm-dev).
plugin:
	@mkdir -p $(PLUGIN)
	$(CC) -D_GNU_SOURCE -O2 -Wall -Wextra -Wno-unused-parameter -Werror -shared -fPIC -o $(PLUGIN)/spank_muster.so $(SPANK)/muster.c
	$(CC) -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -static -s -o $(PLUGIN)/task-prolog $(SPANK)/task-prolog.c

# A registry inside the program, a real image in it, a program run from it lazily, a plain pull and unpack of the
# same image beside it, and a cluster of four agents that pull it once. Building the image the first time takes a
# minute or two.
demo: build
	tests/setup demo
	$(BIN) demo "$$($(GO) run ./tests/images/cmd/images debian-python)"

setup:
	tests/setup test

# The test images come first: built once on a machine, that takes minutes. The gate runs every test package, counts, and fails when a test leaves a mount, a process or a
# temporary file behind.
test: setup lint build
	$(GO) run ./tests/images/cmd/images test
	$(GO) run ./tests/gate ./...

unit: build
	$(GO) run ./tests/gate $$($(GO) list ./... | grep -v -e /tests/e2e -e /tests/cluster)

e2e: setup build
	$(GO) run ./tests/gate ./tests/e2e/... ./tests/cluster/...

e2e-long: setup build
	MUSTER_LONG=1 $(GO) run ./tests/gate -timeout 60m ./tests/e2e/... ./tests/cluster/... ./lazyfs/mountd ./peer/...

lint:
	@out=$$($(GO) tool gofumpt -l .); if [ -n "$$out" ]; then echo "not formatted by gofumpt:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# The race detector needs cgo.
race:
	CGO_ENABLED=1 $(GO) run ./tests/gate -race $$($(GO) list ./... | grep -v -e /tests/e2e -e /tests/cluster)

# Every fuzz target there is, FUZZTIME each.
FUZZTIME ?= 30s
fuzz:
	@set -e; grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r f; do \
		for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$f"); do \
			echo "== $$(dirname $$f) $$t"; \
			$(GO) test -run '^$$' -fuzzminimizetime 10x -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) "$$(dirname $$f)"; \
		done; \
	done
	MUSTER_STREAMS=1000000 $(GO) test -timeout 60m -run TestZlib ./ztoc/inflate

# Each bench prints a table and writes build/bench/NAME.json.
bench: bench-inflate bench-ztoc bench-read bench-mount bench-start bench-swarm

bench-start bench-read bench-mount bench-ztoc bench-inflate bench-swarm: bench-%: build
	tests/setup bench
	$(GO) run ./tests/bench/$*

# What stages take on up to 16,384 hosts, simulated: a table, build/bench/sim.json, sim.html and sim.svg. Some minutes on one core.
sim:
	$(GO) run ./tests/bench/sim

# The tables of docs/trees.md, which the numbers of package planner come from.
sim-trees:
	$(GO) run ./planner/sim/trees -w docs/trees.md

clean:
	rm -rf build
