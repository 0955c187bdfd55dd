# Two commands matter: `make demo` and `make test`. Both set up what they need in $(VENV) first.
#
#   make demo PYTHON=python3.12 SYSTEM_SITE=1    reuse the torch (and whatever else) that PYTHON already has
#   make demo TORCH='torch==2.13.0'              the torch to install when there is none
PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?=
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SETUP = PYTHON='$(PYTHON)' VENV='$(VENV)' SYSTEM_SITE='$(SYSTEM_SITE)' TORCH='$(TORCH)' sh tools/environment.sh
INPUTS := pyproject.toml tools/environment.sh tools/check_tools.sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint types codegen codegen-check bench clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST)

$(VENV)/.demo: $(INPUTS)
	@$(SETUP) torch transformers
	@touch $@

$(VENV)/.ready: $(INPUTS)
	@$(SETUP) torch transformers compressed_tensors depyf hypothesis mypy numpy pytest ruff xdist
	@touch $@

demo: $(VENV)/.demo  ## the main job on a tiny DeepSeek-V3: what fused, what did not and why, and the proof
	@PYTHONPATH=. $(BIN)/python examples/quickstart.py

test: $(VENV)/.ready  ## all tests that need no GPU
	@PYTHONPATH=. $(BIN)/python -m pytest -m 'not gpu and not rocm' -n 2 --dist loadfile

lint: $(VENV)/.ready  ## ruff: rules and format
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: $(VENV)/.ready  ## mypy, strict
	@$(BIN)/python -m mypy

codegen: $(VENV)/.ready  ## compile every kernel for every GPU (none needed), write the table of docs/compatibility.md
	@PYTHONPATH=. $(BIN)/python -m tools.codegen

codegen-check: $(VENV)/.ready  ## is that table of these sources? compile a pairwise subset
	@PYTHONPATH=. $(BIN)/python -m tools.codegen --check

bench: $(VENV)/.ready  ## on a GPU: the ops beside a copy, eager, Inductor and peers; JSON and a picture in bench-output/
	@PYTHONPATH=. $(BIN)/python -m fusionpasses bench --output bench-output $(BENCH)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
