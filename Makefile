# One verb, one line each. Everything is installed into .venv; `make VENV=…` puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# In the order of the files: else the two longest, of few tests each, would come last and one after the other.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder --durations=25

.PHONY: demo test test-all check fuzz bench figures clean

demo: $(VENV)/.export        ## set up; export the embedded checkpoint + adapter, rerank, show parity
	$(BIN)/python -m m0kit_parity.demo

test: $(VENV)/.dev check     ## set up; the test suite, the installed runtime's own among it
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev check ## the same with the long tables and every Python
	$(PYTEST)

check: $(VENV)/.dev          ## set up; linter, formatter, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(VENV)/.dev           ## set up; 100,000 inputs that others may have made for each surface (an hour or so)
	$(BIN)/python -m tests.fuzz $(if $(FUZZ_N),-n $(FUZZ_N)) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS)) \
	  $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

bench: $(VENV)/.dev          ## set up; whole-pair ratios against transformers on this machine
	$(BIN)/m0kit bench pairs

figures: $(VENV)/.dev        ## set up; measure every published figure here into docs/ (an hour or more; QUICK=1: minutes)
	$(BIN)/m0kit figures $(if $(QUICK),--quick) $(if $(AGAIN),--again)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone: a range would take the newest build, on Linux with gigabytes of CUDA.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0

$(VENV)/.export: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[cpu,export]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.export
