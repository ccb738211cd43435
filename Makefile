# make setup | test | test-all | test-exhaustive | demo | lint | types | bench
#
# `setup` makes .venv with CPU PyTorch. For another build of PyTorch:
#   make setup TORCH=torch==2.14.0              another version, CPU
#   make setup TORCH_INDEX=                     the default (CUDA) build of the package index
# or install what you like in .venv yourself: a PyTorch already there is kept if it fits TORCH.

VENV ?= .venv
PYTHON3 ?= $(shell command -v python3 || command -v python)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.dspark-setup
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-exhaustive demo lint format types bench clean

help:
	@sed -n 's/^# //p' Makefile | head -1

setup: $(STAMP)

# PyTorch comes first and by itself, so that nothing after it pulls in a CUDA build. The first
# attempt asks for the CPU build where pip is already configured to find one; the second names the
# index that PyTorch publishes CPU builds on.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON3)" || { echo "no python3 found; set PYTHON3=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON3) -m venv $(VENV)
ifeq ($(strip $(TORCH_INDEX)),)
	$(PIP) "$(TORCH)"
else
	$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)" --extra-index-url $(TORCH_INDEX)
endif
	if [ "$$(uname -s)" = Linux ]; then $(PIP) "$(TRITON)"; fi
	$(PIP) "setuptools>=77" wheel
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

test: setup
	$(BIN)/pytest $(PYTEST_ARGS)

test-all: setup
	$(BIN)/pytest -m "not exhaustive" $(PYTEST_ARGS)

test-exhaustive: setup
	$(BIN)/pytest -m exhaustive $(PYTEST_ARGS)

demo: setup
	$(BIN)/dspark demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
