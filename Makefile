# Everything needs only Python 3.10+ with venv, make and pip's network: `make test` or `make demo` on a fresh machine
# first sets up $(VENV), once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
# Worker processes of `make test`.
TEST_JOBS ?= 2
# More arguments for pytest, the demo, the studies, the benchmark and the fuzzer, e.g.
# make demo DEMO_FLAGS="--metric diag --steps 500", or make fuzz FUZZ_FLAGS="--minutes 30 --jobs 2".
TEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=
STUDY_FLAGS ?=
FIRST_FLAGS ?=
CHECK_FLAGS ?=
FUZZ_FLAGS ?=
GATE_FLAGS ?=
REHEARSE_FLAGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.setup-done
RUNS := $(VENV)/.setup-runs-done
# The oldest Triton supported, which the first GPU machines hold, and where it is unpacked.
OLDEST_TRITON := 3.6.0
OLDEST := build/triton-$(OLDEST_TRITON)

.PHONY: help setup test lint format aot aot-oldest rehearse fuzz demo studies bench first-run gpu-check wheel audit check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## set up .venv with the package, editable, and all it is developed with

# What the demo, the studies and the benchmark need, for whoever only wants to look.
# torch comes first, under its pin: a looser requirement would fetch gigabytes of another build.
$(RUNS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip setuptools
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[data]'
	@touch $@

$(STAMP): $(RUNS)
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

test: $(STAMP) ## run the tests and the docstrings' examples, in Triton's interpreter where there is no GPU
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_FLAGS)

lint: $(STAMP) ## ruff's rules and format, mypy's types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gssf_triton perf examples

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(STAMP) ## compile what public calls launch, for GPUs that need not be there, and hold it to the gate's rules
	env -u TRITON_INTERPRET $(BIN)/python -m gssf_triton.autotune.compile_gate $(GATE_FLAGS)

# The oldest Triton that the kernels run with, beside the newest that $(VENV) has: found first on the path.
$(OLDEST)/.done: constraints.txt | $(STAMP)
	rm -rf $(OLDEST)
	$(PIP) install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	@touch $@

aot-oldest: $(OLDEST)/.done ## the same for sm_90 in bfloat16, with the oldest Triton supported
	env -u TRITON_INTERPRET PYTHONPATH=$(OLDEST) $(BIN)/python -m gssf_triton.autotune.compile_gate \
		--arch sm_90 --numerics bf16 $(GATE_FLAGS)

rehearse: $(STAMP) ## what public calls cost on a GPU, and what the compiler makes of their kernels, without one
	env -u TRITON_INTERPRET $(BIN)/python -m gssf_triton.autotune.rehearse $(REHEARSE_FLAGS)

fuzz: $(STAMP) ## random cases of every public function against float64 until Ctrl-C, into runs/fuzz
	$(BIN)/python tests/fuzz $(FUZZ_FLAGS)

demo: $(RUNS) ## train and compare the metrics on glyph-name retrieval, into runs/demo
	$(BIN)/python examples/glyph_retrieval.py --out runs/demo $(DEMO_FLAGS)

studies: $(RUNS) ## redo all studies of the metric, some hours on two cores, into runs/studies; called again, it goes on
	$(BIN)/python examples/studies.py --out runs/studies $(STUDY_FLAGS)

bench: $(RUNS) ## measure speed and memory on this machine's GPU, or its CPU where it has none
	$(BIN)/python perf/sweep.py $(BENCH_FLAGS)

first-run: $(STAMP) ## the first five minutes on a GPU: which kernels are right, and how fast each is, into runs/first_run
	$(BIN)/python perf/first_run.py --out runs/first_run $(FIRST_FLAGS)

gpu-check: $(STAMP) ## check what only a GPU shows, or, without one, what of that needs none
	TRITON_INTERPRET=$$($(BIN)/python -c 'import torch; print(int(not torch.cuda.is_available()))') \
		$(BIN)/python perf/gpu_check.py $(CHECK_FLAGS)

wheel: $(STAMP) ## build dist/*.whl, the same bytes from the same commit
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

audit: ## ask for known vulnerabilities of the pinned versions; needs the network
	test -x build/audit/bin/python || $(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

check: lint test aot ## everything a change must pass

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
