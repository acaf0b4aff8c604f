# Everything runs in .venv, which the first command makes; later commands reuse it until pyproject.toml,
# setup.py or constraints.txt change. `make help` lists the commands.

VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.fxfuse-installed
ARGS   ?=

# The first interpreter on PATH that is 3.10 or newer; name one with `make PYTHON=python3.12 ...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test cuda-test sanitize lint wheel bench tables docs clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is handed on, e.g. make bench ARGS="--workload kl_div --budget 60"'

$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "fxfuse needs Python 3.10 or newer and found none on PATH;" \
	    "install one, or name it: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make a virtual" \
	    "environment; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (the first time this downloads PyTorch)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

setup: $(STAMP)  ## make .venv with fxfuse and all tools in it

demo: $(STAMP)  ## five models, before and after: matched, time, memory, error
	$(PY) -m fxfuse demo $(ARGS)

test: $(STAMP)  ## run the test suite
	$(PY) -m pytest $(ARGS)

cuda-test: $(STAMP)  ## run the tests that need an NVIDIA GPU; fails where there is none
	@$(PY) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("make cuda-test: torch sees no CUDA device")'
	$(PY) -m pytest -m cuda $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

wheel: $(STAMP)  ## build dist/*.whl, with the compiled kernels where nvcc is present, and check what is in it
	rm -rf build dist
	$(PY) -m build --wheel --outdir dist . > /dev/null  # what it copies; progress and errors go to stderr
	$(PY) .ci/check_wheel.py dist/*.whl

bench: $(STAMP)  ## measure: fxfuse bench $(ARGS)
	$(PY) -m fxfuse bench $(ARGS)

tables: $(STAMP)  ## write benchmarks/*.json into the tables and plots of README and docs
	$(PY) -m fxfuse.bench.tables

docs: $(STAMP)  ## build the documentation into out/site; a warning is an error
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(PY) -m mkdocs build --strict

clean:  ## remove what was built (not .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

sanitize: $(STAMP)  ## the CUDA tests under compute-sanitizer: memcheck, racecheck, synccheck
	$(PY) tests/sanitize.py $(ARGS)
