# Two commands: `make demo` trains digits on 2 ranks, `make test` runs lint and all tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# These two must match each other; Horovod is built for the one that is installed.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: demo test lint setup bench soak clean

demo: setup
	@$(BIN)/hvdtrain launch -np 2 digits

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed
	@$(BIN)/hvdtrain horovod build

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hvdtrain needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@command -v c++ g++ clang++ >/dev/null || { echo "no C++ compiler found: apt-get install g++, or dnf install gcc-c++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make $(VENV): apt-get install python3-venv" >&2; exit 1; }
	@echo "installing torch and hvdtrain into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# About half an hour on a quiet machine; the shaped links need root. tests/benchmarks/accuracy.py and time_to_accuracy.py take hours.
bench: setup
	$(BIN)/python -m tests.benchmarks.step_overhead
	$(BIN)/python -m tests.benchmarks.latency
	$(BIN)/python -m tests.benchmarks.exchange
	$(BIN)/python -m tests.benchmarks.exchange --rate 1gbit --ways none,horovod,ddp,ddp-fp16,bucketed,bucketed:powersgd:4,bucketed:auto
	$(BIN)/python -m tests.benchmarks.exchange --rate 100mbit --rounds 1 --ways bucketed,bucketed:powersgd:4,bucketed:auto
	$(BIN)/python -m tests.benchmarks.wire_table

# Half an hour of random faults in an elastic run; SEED repeats one.
soak: setup
	$(BIN)/python -m tests.ranks.soak $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) runs build *.egg-info
