# Everything a person types. The llama.cpp source and build live in the cache that `gguf-splitq runtime path` names;
# GGUF_SPLITQ_CACHE moves it, LLAMA_CPP_DIR gives the source instead of a download.

PYTHON ?= python3
# Upstream's conversion reads checkpoints with torch; a plain `torch` brings gigabytes of CUDA on some machines. Any will do.
TORCH  ?= torch==2.13.0
MODEL  ?= examples/demo
TEXT   ?= examples/demo/eval.txt
TYPE   ?= sq4
# more options for the experiments, e.g. make demo ARGS="--type sq3 --type sq2"
ARGS   ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check -qq install
NAME := $(patsubst %.gguf,%,$(notdir $(patsubst %/,%,$(MODEL))))

.DEFAULT_GOAL := help
.PHONY: help demo test runtime perplexity bench quality embeddings journeys tables slices paper-splitquant \
	paper-claq paper-qrazor lint types docs fuzz patches-check cross-tools clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: runtime ## a checkpoint becomes sq4 and is measured against its F16: one table
	@$(PY) -m experiments.demo $(ARGS)

test: $(VENV)/test.stamp ## everything the tests need, then the tests
	@$(HAS_CROSS_TOOLS) || echo "Without an Arm compiler and emulator tests are skipped: make cross-tools" >&2
	@$(PY) -m gguf_splitq runtime build --tests
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

runtime: $(VENV)/run.stamp ## fetch, patch and build llama.cpp
	@$(PY) -m gguf_splitq runtime build

perplexity: runtime ## F16 against TYPE: make perplexity MODEL=... TYPE=... TEXT=...
	@mkdir -p build
	@$(PY) -m gguf_splitq convert "$(MODEL)" --type f16 --outfile "build/$(NAME)-f16.gguf" --overwrite
	@$(PY) -m gguf_splitq convert "$(MODEL)" --type "$(TYPE)" --outfile "build/$(NAME)-$(TYPE).gguf" --overwrite
	@$(PY) -m gguf_splitq validate "build/$(NAME)-$(TYPE).gguf" --baseline "build/$(NAME)-f16.gguf" --text "$(TEXT)"

bench: runtime ## speed of conversion and of decoding, beside stock llama.cpp types
	@$(PY) -m experiments.bench $(ARGS)

quality: runtime $(VENV)/plot.stamp ## KL divergence over stored bits of every type and way to make it, beside stock types
	@$(PY) -m experiments.quality $(ARGS)

journeys: runtime ## README's three ways, run as they stand there: time, memory, KL divergence
	@$(PY) -m experiments.journeys $(ARGS)

embeddings: runtime ## how far the vectors of a quantized embedding model turn, beside stock types
	@$(PY) -m experiments.embeddings $(ARGS)

tables: $(VENV)/plot.stamp ## the tables of README.md and docs/ from docs/results/*.json
	@$(PY) -m experiments.tables

slices: runtime ## what error feedback takes of larger models: conversions of one and two layers of 1 B and 8 B shapes
	@$(PY) -m experiments.slices $(ARGS)

paper-splitquant: runtime ## SplitQuantV2's claim: split INT4 is close to FP16, plain INT4 is not
	@$(PY) -m experiments.paper_splitquant $(ARGS)

paper-claq: runtime ## CLAQ's codebooks per column, adaptive precision and outliers; also with outlier channels
	@$(PY) -m experiments.paper_claq $(ARGS)

paper-qrazor: runtime ## QRazor's 4-bit weights, activations and KV cache: as published, and as sdr4
	@$(PY) -m experiments.paper_qrazor $(ARGS)

docs: $(VENV)/docs.stamp ## the pages in docs/ as a site in build/docs; a link that leads nowhere is an error
	@$(PY) -m mkdocs --quiet build --strict

fuzz: $(VENV)/test.stamp ## damaged files for every reader, a minute each; the tests do it for a moment
	@SPLITQ_FUZZ_SECONDS=60 $(PY) -m pytest -q tests/test_fuzz.py

lint: $(VENV)/test.stamp ## ruff: mistakes and format; the workflows and the citation against their schemas
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "Not formatted; run ruff format ." >&2; exit 1; }
	@$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	@! command -v actionlint >/dev/null || actionlint

types: $(VENV)/test.stamp ## mypy, and which room may import from which
	@$(PY) -m mypy
	@said=$$($(VENV)/bin/lint-imports --no-cache) || { echo "$$said" >&2; exit 1; }

patches-check: $(VENV)/run.stamp ## the patch series applies to a clean pinned tree, without fuzz
	@$(PY) -m gguf_splitq runtime check

clean: ## remove the virtual environment and built files; the cache of llama.cpp stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

# cmake and ninja come from the package index when the system has none, or a cmake that is too old
EXTRA_TOOLS = $(shell command -v ninja >/dev/null && \
	printf '3.18\n%s\n' "$$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')" | sort -VC || echo '[build]')

$(PY):
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment; install python3-venv for $(PYTHON)." >&2; exit 1; }

$(VENV)/run.stamp: pyproject.toml | $(PY)
	@echo "Installing gguf-splitq and its dependencies into $(VENV)" >&2
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)' || echo "No $(TORCH) here; taking another torch" >&2
	@$(PIP) -e '.$(EXTRA_TOOLS)'
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/plot.stamp: $(VENV)/run.stamp
	@$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	@$(PIP) -e '.[docs]'
	@touch $@

# On x86-64 the Arm kernels are tested under emulation where these are installed. Debian's names; `make test` installs nothing.
CROSS_PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
HAS_CROSS_TOOLS := { [ "$$(uname -m)" != x86_64 ] || \
	{ command -v aarch64-linux-gnu-gcc && command -v qemu-aarch64; } >/dev/null; }
cross-tools: ## install the Arm compiler and emulator for the tests, with sudo where that is needed
	@$(HAS_CROSS_TOOLS) || { [ "$$(id -u)" = 0 ] && as_root= || as_root=sudo; set -x; \
		$$as_root apt-get update -qq && $$as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $(CROSS_PACKAGES) >/dev/null; }
