# Two commands: `make repro` builds everything from a bare checkout, `make test` tests it.
# PYTHON chooses the interpreter (3.11 to 3.13); TORCH=cpu takes PyTorch's small CPU build on Linux.
PYTHON ?= python3
TORCH ?= default
VENV := .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# DVC runs the stages with the `python` that it finds first.
export PATH := $(BIN):$(PATH)
PORT ?= 5000
# A test worker for each core, but no more than 8: each holds PyTorch and MLflow in memory.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest
# Neighbours in a file stay together: they share what takes long to make.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: repro test test-slow test-gpu gpu faults ui report lint clean git help
repro: git $(STAMP)
	$(BIN)/dvc repro

test: $(STAMP)
	$(SIDE_BY_SIDE) -m 'not slow and not gpu and not alone'
	$(PYTEST) -m 'not slow and not gpu and alone'

test-slow: $(STAMP)
	$(SIDE_BY_SIDE) -m slow

# What needs a CUDA device: some minutes on one card, skipped where there is none.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# What a card shows, in the order of docs/gpu.md. Given again, it goes on with what is missing.
gpu: test-gpu
	$(BIN)/python benchmarks/gpu.py $(PEERS)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/fp8.py
	$(BIN)/python benchmarks/sample_gpu.py

help:
	@echo 'make repro       the environment and the pipeline; PYTHON=python3.12, TORCH=cpu (Linux)'
	@echo 'make ui          MLflow, on the curves of all runs; PORT=5001'
	@echo 'make report      one HTML page; RUNS="lr-0.002 lr-0.008" or RUNS=--all'
	@echo 'make test        the tests; test-slow, test-gpu: the others; WORKERS=2'
	@echo 'make gpu         what a card shows: tests and measurements, docs/gpu.md; PEERS=...'
	@echo 'make lint        ruff and mypy'
	@echo 'make faults      inject faults, and write docs/faults.md'
	@echo 'make clean       the disk space back: environment, runs, caches'
	@echo 'all else: $(VENV)/bin/python -m pipeline'

# The tests that inject faults, and the table of what came of them in docs/faults.md.
faults: $(STAMP)
	$(BIN)/python tools/readme.py --faults

ui: $(STAMP)
	$(BIN)/python -m pipeline ui $(PORT)

# The workspace's run; RUNS="a b" puts DVC experiments side by side, RUNS=--all every one.
report: $(STAMP)
	$(BIN)/python -m pipeline report $(RUNS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# DVC wants git; pipeline/records/dvc_history.py says the same where it needs it.
git:
	@if LC_ALL=C git rev-parse --git-dir 2>&1 | grep -q 'not a git repository' && \
	    ! grep -qs 'no_scm *= *true' .dvc/config .dvc/config.local; then \
	    echo "no git repository here, as in an unpacked ZIP: clone the project instead, or say" >&2; \
	    echo "  git init && git add --all && git commit -m start" >&2; \
	    echo "To run the pipeline alone, without experiments and sweeps, put these two lines into" >&2; \
	    echo ".dvc/config.local:" >&2; \
	    echo "  [core]" >&2; \
	    echo "      no_scm = true" >&2; \
	    exit 1; \
	fi

# Every file is held against its hash, but PyTorch's own: its builds come from more than one index.
$(STAMP): requirements.txt requirements-dev.txt requirements-plays.txt constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) \
	    else "Python %d.%d found, 3.11 to 3.13 needed: make repro PYTHON=python3.12" % v)'
	@echo "installing PyTorch, MLflow, DVC and the rest into $(VENV): some minutes, once"
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	$(BIN)/python -m pip install --no-deps torch==2.13.0 \
	    --index-url https://download.pytorch.org/whl/cpu
endif
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-plays.txt
	touch $(STAMP)

# Gives the disk back: the environment, scratch, the MLflow store and DVC's cache. `dvc gc -w`
# is the gentler way: it drops only what neither the workspace nor an experiment needs.
clean:
	rm -rf $(VENV) .runs mlflow.db mlflow.db-wal mlflow.db-shm mlflow.db.lock mlartifacts \
	    .dvc/cache .dvc/tmp data/tokens artifacts metrics plots records comparisons \
	    report.html dvc_plots .pytest_cache .ruff_cache .mypy_cache
