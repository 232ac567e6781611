# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install install-test quickstart test lint types imports pytest test-slow bench pictures format clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

install: $(VENV)/.installed ## The environment in .venv, with pinned versions
install-test: $(VENV)/.installed-test

quickstart: install ## Install, then run a real SimPO sweep on this machine's CPU (about five minutes)
	$(BIN)/orchestrate sweep sweeps/quickstart.yaml

test: install-test lint types imports pytest ## Everything that CI runs

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/pyright

imports: install-test
	$(BIN)/lint-imports --no-cache

pytest: install-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: install-test ## The tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout=1800

bench: install ## The same grid with TRL and with this, side by side (about half an hour)
	$(BIN)/python -m benchmarks.three_ways

pictures: install ## The README's pictures, from the quickstart in runs/ (needs Chromium)
	$(BIN)/python docs/make_pictures.py

format: install-test ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches, never runs/
	rm -rf $(VENV) .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
