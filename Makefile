# Two commands matter: `make demo` and `make test`. Both set up what they need in $(VENV) first.
#
#   make demo PYTHON=python3.12 SYSTEM_SITE=1    reuse the torch (and whatever else) that PYTHON already has
#   make demo TORCH='torch==2.13.0'              the torch to install when there is none
PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?=
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
.DEFAULT_GOAL := help
.PHONY: help tools demo test lint types clean

help:  ## what there is
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST)

tools:
	@PYTHON='$(PYTHON)' sh tools/check_tools.sh

# A torch that is importable is never replaced: its exact version is a constraint for everything installed after it.
$(STAMP): pyproject.toml Makefile tools/check_tools.sh
	@PYTHON='$(PYTHON)' sh tools/check_tools.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH)'
	@$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	@echo "using `cat $(VENV)/constraints.txt`; installing the rest into $(VENV)"
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## the main job on a tiny DeepSeek-V3: what fused, what did not and why, and the proof
	@$(BIN)/python examples/quickstart.py

test: $(STAMP)  ## all tests that need no GPU
	@$(BIN)/python -m pytest -m 'not gpu'

lint: $(STAMP)  ## ruff, format and rules
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	@$(BIN)/mypy

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
