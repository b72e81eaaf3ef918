# make demo    train and evaluate a small LaDiR on arithmetic puzzles (2 cores, no GPU)   [SEED=0] [RANKS=2] [ARGS=settings]
# make prose   the same on word problems with chains of thought in English, about an hour     [SEED=0] [RANKS=2] [SECONDS=...] [ARGS=settings]
# make test    linters, types and all tests                                               [PYTEST_ARGS=...]
# make test-slurm  the batch scripts on a two-node Slurm cluster that it starts on this machine (Debian or Ubuntu, root)
# make bench   what one pass, caches, packing and ZeRO-3 save and cost on this machine, measured   [SIZE=tiny] [SUITE=all, compiled]
# make gpu-check   tests, kernels, MFU and memory of the 8B shape on a GPU machine, under ten minutes   [WHEELS=wheels] [DRY=1]
# make wheels  a folder of wheels for make gpu-check on a machine without network   [WHEELS=wheels]
# make lint    linters and types only
# make venv    the virtual environment (.venv) that the others use; they make it themselves
# Another interpreter: make PYTHON=python3.12 ...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint $(PINS)
SEED ?= 0
RANKS ?= 2
SECONDS ?= 3000
PYTEST_ARGS ?= -n 2 --dist loadfile
SIZE ?= tiny
SUITE ?= all
WHEELS ?= wheels

# What a machine with PyTorch and transformers may lack: pure Python, or small.
WHEEL_NAMES := deepspeed hjson py-cpuinfo ninja msgpack einops pydantic pydantic-core annotated-types typing-inspection \
	omegaconf datasets dill multiprocess xxhash transformers peft accelerate rich tqdm psutil \
	pytest pytest-timeout pluggy iniconfig hypothesis sortedcontainers matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil \
	pillow pyarrow tensorboard absl-py grpcio markdown protobuf werkzeug tensorboard-data-server

SLURM_PACKAGES := slurmctld slurmd slurm-client munge
BROWSER_PACKAGES := chromium-headless-shell fonts-dejavu-core

.PHONY: help demo prose test browser test-slurm bench gpu-check wheels lint venv clean-venv
.DEFAULT_GOAL := help

help:
	@sed -n '/^# /!q;s/^# //p' Makefile

demo: $(VENV)/.ready
	@$(BIN)/python -m training.demo --ranks $(RANKS) --config configs/demo.yaml run.seed=$(SEED) \
		run.name=demo$(if $(filter-out 0,$(SEED)),-seed$(SEED)) $(ARGS)

prose: $(VENV)/.ready-examples
	@$(BIN)/python -m training.demo --ranks $(RANKS) --seconds $(SECONDS) --config configs/gsm_symbolic.yaml run.seed=$(SEED) \
		run.name=prose$(if $(filter-out 0,$(SEED)),-seed$(SEED)) $(ARGS)

test: lint browser
	@echo "tests: pytest $(PYTEST_ARGS)"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest $(PYTEST_ARGS)

# For the test that opens the report; without one it is skipped and says so (in continuous integration it fails).
browser: $(VENV)/.ready-dev
	@for program in chromium-headless-shell chromium chromium-browser google-chrome; do command -v $$program >/dev/null && exit 0; done; \
	if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		echo "browser: installing $(BROWSER_PACKAGES)"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			$(BROWSER_PACKAGES); } >$(VENV)/browser-install.log 2>&1 || tail -n 5 $(VENV)/browser-install.log; \
	else \
		echo "browser: none found; as root on Debian or Ubuntu: apt-get install --no-install-recommends $(BROWSER_PACKAGES)"; \
	fi

test-slurm: $(VENV)/.ready-dev
	@missing=$$(for program in slurmctld slurmd sbatch munged; do command -v $$program >/dev/null || echo $$program; done); \
	[ -z "$$missing" ] || if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		echo "test-slurm: installing $(SLURM_PACKAGES)"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			$(SLURM_PACKAGES) >$(VENV)/slurm-install.log 2>&1 || { cat $(VENV)/slurm-install.log; exit 1; }; \
	else \
		echo "test-slurm: not found:" $$missing; \
		echo "as root on Debian or Ubuntu: apt-get install --no-install-recommends $(SLURM_PACKAGES)"; exit 1; \
	fi
	@[ "$$(id -u)" -eq 0 ] || { echo "test-slurm: needs root: the cluster's daemons start jobs as other users"; exit 1; }
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m slurm -x --durations=0 --durations-min=5 tests/slurm

bench: $(VENV)/.ready-dev
	@$(BIN)/python training/benchmark.py --size $(SIZE) --suite $(SUITE)

# Not the virtual environment: the machine's own Python with its PyTorch, or PYTHON=.venv/bin/python.
gpu-check:
	@$(PYTHON) training/gpu_check.py --wheels $(WHEELS) $(if $(DRY),--dry)

wheels: $(VENV)/.ready-dev
	@$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) --constraint $(PINS) $(WHEEL_NAMES)
	@ls $(WHEELS)

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

# First the pinned pip, for which packages are built with the pinned setuptools, too.
$(VENV)/.ready: requirements.txt $(PINS) pyproject.toml | $(VENV)/.created
	@echo "environment: installing requirements.txt (once; a few minutes)"
	@$(PIP) pip setuptools
	@$(PIP) --build-constraint $(PINS) -r requirements.txt
	@$(PIP) --build-constraint $(PINS) --no-deps --editable . 2>$(VENV)/install.log || { cat $(VENV)/install.log; exit 1; }
	@touch $@

$(VENV)/.ready-examples: requirements-examples.txt $(PINS) $(VENV)/.ready
	@echo "environment: installing requirements-examples.txt (once)"
	@$(PIP) --build-constraint $(PINS) -r requirements-examples.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt requirements-eval.txt requirements-examples.txt requirements-serve.txt requirements-loggers.txt $(PINS) $(VENV)/.ready
	@echo "environment: installing requirements-dev.txt (once)"
	@$(PIP) --build-constraint $(PINS) -r requirements-dev.txt
	@touch $@
