# make demo    train and evaluate a small LaDiR on arithmetic puzzles (2 cores, no GPU)   [SEED=0] [RANKS=2]
# make test    linters, types and all tests                                               [PYTEST_ARGS=...]
# make lint    linters and types only
# make venv    the virtual environment (.venv) that the others use; they make it themselves
# Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SEED ?= 0
RANKS ?= 2
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help demo test lint venv clean-venv
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.ready
	@$(BIN)/python -m training.demo --ranks $(RANKS) --config configs/demo.yaml run.seed=$(SEED) \
		run.name=demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))

test: lint
	@echo "tests: pytest $(PYTEST_ARGS)"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev
	@echo "lint: ruff, mypy, shellcheck"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/shellcheck .ci/run $(wildcard slurm/*.sh slurm/*.sbatch)

venv: $(VENV)/.ready-dev

clean-venv:
	rm -rf $(VENV)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "environment: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.ready: requirements.txt pyproject.toml | $(VENV)/.created
	@echo "environment: installing requirements.txt (once; a few minutes)"
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --editable . 2>$(VENV)/install.log || { cat $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	@echo "environment: installing requirements-dev.txt (once)"
	@$(PIP) -r requirements-dev.txt
	@touch $@
