# Two commands for a start: `make demo` and `make test`. Each makes the environment first, once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TESTS ?= tests
# Two processes of one thread each: what the smallest machine has.
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

.PHONY: help setup demo test test-slow test-slurm check format clean

help:
	@echo 'make setup      make the environment in .venv'
	@echo 'make demo       train and evaluate a small network on real handwritten digits (minutes on two cores)'
	@echo 'make test       run the tests (at most 15 minutes)'
	@echo 'make test-slow  run the tests that take longer (at most 45 minutes)'
	@echo 'make test-slurm run the SLURM launchers on a real two-node SLURM on this machine (at most 10 minutes)'
	@echo 'make check      lint, format, types and tests'
	@echo 'make format     mend what lint and format can mend'
	@echo 'make clean      remove .venv, data and runs'

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: Python {v[0]}.{v[1]} found; pairwise needs 3.10 to 3.13: make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: Python's venv module is incomplete: apt-get install python3-venv" >&2; exit 1; }
	@echo 'making .venv (about 7 GB, some minutes)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/python image/prepare.py digits data/digits
	@PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch image/train.py
	@$(BIN)/python image/eval.py runs/digits

test: $(READY)
	$(PYTEST) $(TESTS)

test-slow: $(READY)
	$(PYTEST) -m 'slow and not gpu and not slurm' $(TESTS)
	$(MAKE) test-slurm

# One process: there is one cluster. Without the packages each test is skipped and says why.
test-slurm: $(READY)
	@command -v slurmctld >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge slurm-wlm-basic-plugins; } >/dev/null 2>&1 || \
		echo 'SLURM is not installed and apt-get could not install it: its tests are skipped'
	env OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm tests/slurm

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m common.report.api docs/api.md

clean:
	rm -rf .venv data runs
