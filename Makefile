# Everything runs in .venv, which the targets make and fill themselves. `make help` lists them.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
SOURCES := dprl agents envs experiments tests setup.py
VIEW := build/view

.DEFAULT_GOAL := help
.PHONY: help demo setup test test-full lint format types bench clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.demo  ## the main job: noisy demonstrations, behaviour cloning, DPPO (ARGS="--seed 1")
	$(BIN)/dprl demo $(ARGS)

setup: $(VENV)/.all  ## .venv with everything

test: $(VENV)/.all  ## the test suite, a process a core (ARGS="-k resume" picks tests)
	$(PYTEST) -m "not full" $(ARGS)

test-full: $(VENV)/.all  ## the test suite with its long repetitions
	$(PYTEST) $(ARGS)

lint: $(VENV)/.all  ## ruff
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.all  ## ruff, mending what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.all $(VIEW)  ## mypy --strict on the library
	cd $(VIEW) && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dprl

bench: $(VENV)/.all  ## benchmarks: ratios measured in one run
	for benchmark in throughput rollout dppo scaling sampling guidance training offline; do $(BIN)/python -m dprl.experiments.benchmarks.$$benchmark || exit 1; done

clean:  ## remove what was built, but not .venv or runs
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The package as it is when installed, made of links: mypy on the bare tree would miss agents, envs and experiments.
$(VIEW): $(wildcard dprl/* agents envs experiments)
	rm -rf $(VIEW)
	mkdir -p $(VIEW)/dprl
	ln -s $(CURDIR)/dprl/* $(CURDIR)/agents $(CURDIR)/envs $(CURDIR)/experiments $(VIEW)/dprl/
	rm -rf $(VIEW)/dprl/__pycache__

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.venv setup.py constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.all: $(VENV)/.venv setup.py constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo
