# What a developer and CI run. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Debian packages that tests and demo need beside Go and Rust.
PACKAGES := conntrack iproute2 ipset iptables nftables procps util-linux
CARGO_DENY := 0.20.2
CARGO := cargo
KEEP ?=
ROWS ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: packages ## Show MetalEG at work on a real cluster on this machine (root; KEEP=1 leaves it running)
	$(CARGO) build --locked --workspace
	@target/debug/metaleg-lab build
	@target/debug/metaleg-lab demo $(if $(KEEP),--keep)

.PHONY: test
test: packages lint test-fast test-kernel test-e2e ## Everything (root; builds Kubernetes and MetalLB the first time)

.PHONY: test-fast
test-fast: ## Unit and property tests, the model, scenarios: neither root nor a cluster
	$(CARGO) test --locked --workspace --all-features --lib --bins
	$(CARGO) test --locked --package metaleg --all-features --test model --test scenarios

.PHONY: test-kernel
test-kernel: packages ## The backends against the real kernel, in network namespaces (root)
	$(CARGO) test --locked --package metaleg --all-features --test kernel

.PHONY: test-e2e
test-e2e: packages ## The product on real clusters, told by what the other end sees (root; ROWS=matrix::nftables for some)
	$(CARGO) run --locked --quiet --package metaleg-lab -- build
	$(if $(ROWS),,$(CARGO) test --locked --package metaleg-lab --test lab)
	$(CARGO) test --locked --package metaleg --all-features --test e2e -- $(ROWS)

.PHONY: lint
lint: ## Formatting, clippy, links of the documentation, licences and sources of dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --locked --quiet --no-deps --workspace --document-private-items
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked --quiet cargo-deny@$(CARGO_DENY)
	$(CARGO) deny --locked check licenses bans sources

.PHONY: packages
packages: # Install the Debian packages that are missing
	@missing=(); for package in $(PACKAGES); do \
	  dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$$package"); \
	done; \
	if (( $${#missing[@]} )); then \
	  echo "installing $${missing[*]}"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi

.PHONY: image
image: ## Build the container image
	docker build --tag metaleg-agent:$$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1) .
