# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
JOBS   ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: docs house simulate curves replay winners help install install-test quickstart test golden lint types imports pytest test-slow test-gpu test-faults storm bench bench-step bench-adapters bench-gpu bench-driver bench-service rehearse pictures format clean

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
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not faults and not gpu"

house: install-test ## Sizes, names, layers and words of the source, by the rules that tests hold
	$(BIN)/python -m tests.docs.house

golden: install-test ## Write tests/golden anew, after an intended change of visible output
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/end_to_end/test_shipped_sweeps.py tests/end_to_end/test_surface.py \
		tests/orchestrator/commands/test_job_files.py tests/orchestrator/service/test_deployment_files.py \
		tests/end_to_end/test_sweep.py::test_a_sweep_interrupted_resumed_and_exported

test-slow: install-test ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: install-test ## The CUDA paths, on a machine with a GPU (three minutes)
	$(BIN)/python -m pytest tests/gpu -rs

test-faults: install-test ## The faults of docs/reliability.md, also those that take minutes
	$(BIN)/python -m pytest tests/faults -m "not slow"

rehearse: install-test ## Every file in sweeps/ in small, by the command users type (ten minutes)
	$(BIN)/python -m tests.end_to_end.rehearse_all --write

storm: install-test ## A sweep killed 50 times against the same sweep left alone (about half an hour)
	$(BIN)/python -m tests.faults.storm

bench: install ## The same grid with TRL and with this, side by side (about half an hour)
	$(BIN)/python -m benchmarks.three_ways --write

bench-step: install ## One optimizer step, TRL's and this product's in turn
	$(BIN)/python -m benchmarks.step --write
	$(BIN)/python -m benchmarks.threads --write

bench-adapters: install ## Trials with adapters: one after another, in turn over one base, a process each
	$(BIN)/python -m benchmarks.adapters --write

bench-gpu: install ## A step of an 8B model on one GPU, TRL's and this product's
	$(BIN)/python -m benchmarks.gpu --write

bench-driver: install ## What an event costs the driver of 2,000 trials over 64 slots (about ten minutes)
	$(BIN)/python -m benchmarks.driver --write

bench-service: install ## The service with 50 viewers of a sweep of 64 slots and 1,000 sweeps to list (three minutes)
	$(BIN)/python -m benchmarks.service --write

simulate: install ## What pruning saves and what the visibility rule costs, without training (a quarter of an hour)
	$(BIN)/python -m benchmarks.pruning

curves: install ## Learning curves of 180 small trials into benchmarks/recorded.json (three quarters of an hour of CPU; continues)
	nice -n 15 $(BIN)/python -m benchmarks.recorded

replay: install ## What pruning and samplers find on the recorded curves, without training (half an hour of CPU; continues)
	$(BIN)/python -m benchmarks.replay --write --keep runs/replay.jsonl

winners: install ## What is shipped by accuracy, with requirements, with finalists, over 20 seeds (hours of CPU; continues)
	nice -n 15 $(BIN)/python -m benchmarks.winners --write

docs: install ## Write docs/configuration.md from the schema and docs/sweeps.md from the plans of sweeps/
	$(BIN)/python -m docs.make_configuration
	$(BIN)/python -m docs.make_sweeps

pictures: install ## The README's pictures, from the quickstarts in runs/ (needs Chromium)
	$(BIN)/python -m docs.make_pictures

format: install-test ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches, never runs/
	rm -rf $(VENV) .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
