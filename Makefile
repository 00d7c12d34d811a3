# `make demo` trains digits on 2 ranks. Each target sets up .venv first: hvdtrain with its extras `all` and Horovod; the
# targets below also JAX, Keras, TensorFlow and the tools of development.
# make check      lint, types, and the tests that start no rank: about a minute
# make test       all tests but the slow ones: what CI runs
# make test-slow  the slow ones: full matrices of what `make test` tests in part
# make soak       half an hour of random faults in an elastic run
# make bench      the benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# These two must match each other; Horovod is built for the one that is installed.
TORCH ?= torch==2.14.1 torchvision==0.29.1

# Some thousand processes would compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

# Processes of pytest. Many tests wait more than they compute, so more than there are cores. Each needs 5 GB of memory.
JOBS ?= 3
PYTEST := $(BIN)/python -m pytest --quiet -n $(JOBS) --dist loadscope --no-loadscope-reorder --durations=20

.PHONY: demo check test test-slow lint setup dev bench soak clean

demo: setup
	@$(BIN)/hvdtrain launch -np 2 digits

check: lint
	$(PYTEST) -m unit

test: lint
	$(PYTEST) -m "not slow"

test-slow: dev
	$(PYTEST) -m slow

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

setup: $(VENV)/.installed
	@$(BIN)/hvdtrain horovod build

dev: setup $(VENV)/.dev

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hvdtrain needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || { echo "no C++ compiler found: apt-get install g++, or dnf install gcc-c++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): apt-get install python3-venv" >&2; exit 1; }
	@echo "installing torch and hvdtrain into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# About half an hour on a quiet machine; the shaped links need root. tests/benchmarks/accuracy.py and time_to_accuracy.py take hours.
bench: dev
	$(BIN)/python -m tests.benchmarks.step_overhead
	$(BIN)/python -m tests.benchmarks.latency
	$(BIN)/python -m tests.benchmarks.exchange
	$(BIN)/python -m tests.benchmarks.exchange --rate 1gbit --ways none,horovod,ddp,ddp-fp16,bucketed,bucketed:powersgd:4,bucketed:auto
	$(BIN)/python -m tests.benchmarks.exchange --rate 100mbit --rounds 1 --ways bucketed,bucketed:powersgd:4,bucketed:auto
	$(BIN)/python -m tests.benchmarks.wire_table

# Half an hour of random faults in an elastic run; SEED repeats one.
soak: dev
	$(BIN)/python -m tests.ranks.soak $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) runs build *.egg-info
