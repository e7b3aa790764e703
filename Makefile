# One verb, one line each. Everything is installed into .venv; `make VENV=…` puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The release of onnxruntime-gpu whose kernels the committed table has.
ORT_GPU ?= 1.31.1
# In the order of the files: else the two longest, of few tests each, would come last and one after the other.
# A worker that dies ends the run: replaced, it leaves xdist's queue with scopes that are done, and the run waits for ever.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0 --durations=10
# Part by part, in processes of their own: what thousands of opened models leave in one (20 GB) goes with it. In the last,
# Ray ends the process that talks to it when its cluster is lost, as on a machine that stands still for a while.
RAY = tests/runtime/jobs/test_ray_engine.py
LARGE = tests/parity/ tests/quant/ tests/runtime/
folders = $(filter-out %__pycache__/,$(wildcard $(1)/*/))
define RUN
	@failed=0; \
	$(PYTEST) $(1) $(filter-out $(LARGE),$(call folders,tests)) || failed=1; \
	$(PYTEST) $(1) $(call folders,tests/parity) || failed=1; \
	$(PYTEST) $(1) $(wildcard tests/parity/test_*.py) || failed=1; \
	$(PYTEST) $(1) tests/quant || failed=1; \
	$(PYTEST) $(1) tests/runtime $(wildcard tests/test_*.py) --ignore $(RAY) || failed=1; \
	$(BIN)/python -m pytest -q $(1) $(RAY) || failed=1; \
	exit $$failed
endef

.PHONY: demo test test-all check browser kernels fuzz clients bench figures gpu clean integrations locks

demo: $(VENV)/.export        ## set up; export the embedded checkpoint + adapter, rerank, show parity
	$(BIN)/python -m m0kit_parity.demo

test: $(VENV)/.dev check     ## set up; the test suite, the installed runtime's own among it
	$(call RUN,-m "not slow")

test-all: $(VENV)/.dev check ## the same with the long tables and every Python
	$(call RUN,)

check: $(VENV)/.dev          ## set up; linter, formatter, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Its tests are among those of `make test`, and are left out where there is no browser.
browser: $(VENV)/.dev        ## set up; the server's page in Chromium without a window: apt-get install chromium chromium-driver
	@for name in chromium chromedriver; do command -v $$name >/dev/null || { \
	  echo "There is no $$name: apt-get install chromium chromium-driver" >&2; exit 1; }; done
	$(BIN)/python -m pytest -q tests/runtime/server/page

integrations: $(VENV)/.dev   ## set up; LangChain, LlamaIndex and Haystack, newest and oldest, with their tests (5 minutes at first)
	$(BIN)/python -m tests.integrations $(ARGS)

kernels: $(VENV)/.dev        ## set up; CUDA kernels read anew, graphs placed and the engine rehearsed in onnxruntime-gpu; no GPU
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/gpu onnxruntime-gpu==$(ORT_GPU)
	$(BIN)/python -m m0kit_parity.cuda.pretend $(VENV)/gpu -m m0kit_parity.cuda.table
	$(BIN)/python -m m0kit_parity.cuda.pretend $(VENV)/gpu -m m0kit_parity.cuda.placing
	$(BIN)/python -m m0kit_parity.cuda.pretend $(VENV)/gpu -m m0kit_parity.cuda.rehearse

fuzz: $(VENV)/.dev           ## set up; 100,000 inputs that others may have made for each surface (an hour or so)
	$(BIN)/python -m tests.fuzz $(if $(FUZZ_N),-n $(FUZZ_N)) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS)) \
	  $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

clients: $(VENV)/.dev        ## set up; real clients of other rerankers against `m0kit serve`, into docs/clients.md (ten minutes or more)
	$(BIN)/python -m tests.clients

bench: $(VENV)/.dev          ## set up; whole-pair ratios against transformers on this machine
	$(BIN)/m0kit bench pairs

figures: $(VENV)/.dev        ## set up; measure every published figure here into docs/ (an hour or more; QUICK=1: minutes)
	$(BIN)/m0kit figures $(if $(QUICK),--quick) $(if $(AGAIN),--again)

locks: $(VENV)/.dev          ## set up; locks with hashes and lists of packages in deploy/, for the versions that there are now
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/locks uv
	$(BIN)/python deploy/locks.py $(VENV)/locks/bin/uv

# Nothing is set up, so that it needs no network: PYTHON must have PyTorch for CUDA and what m0kit[gpu,export] brings.
gpu:                         ## every check and figure that takes an NVIDIA GPU, into gpu.json (some ten minutes)
	PYTHONPATH=runtime:export:quant:parity:$$PYTHONPATH $(PYTHON) -m m0kit_parity.gpu.check $(ARGS)

clean:
	rm -rf $(VENV) .clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone: a range would take the newest build, on Linux with gigabytes of CUDA.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0

$(VENV)/.export: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[cpu,export,serve]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.export
