# Everyday verbs: `make help` lists them.
# Plain enough for GNU make 3.81 (macOS): no .ONESHELL, no !=, no $(file).

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
CONFIG ?=
PYTEST_ARGS ?=
FOLD ?= $(PROXY_USAGE_FOLD)
# FOLD=protobuf: any verb without the compiled fold, `make test` for one.
export PROXY_USAGE_FOLD := $(FOLD)
BENCH ?=
ONLY ?=
SAVE ?=
MINUTES ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PYTEST := $(PY) -m pytest $(PYTEST_ARGS)

# One stamp for each finished step, so that a repeated verb starts at once. A checkout set up for development
# needs nothing more to run.
READY := $(VENV)/.created
DEMO := $(VENV)/.demo-installed
DEV := $(VENV)/.dev-installed
CEILOMETER_VENV := build/ceilometer-venv
CEILOMETER := $(CEILOMETER_VENV)/.installed
RUNNABLE := $(if $(wildcard $(DEV)),$(DEV),$(DEMO))

# Built by the installation, in place; without a compiler the protobuf fold runs.
EXTENSION := setup.py $(wildcard proxy_usage/decode/native/*)

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup run check test test-faults bench bench-check bench-core soak format protos screenshots docs ceilometer lock clean lint types imports unit most-tests e2e-tests

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV)  ## create .venv with everything for development, exactly as locked
	@echo "$(VENV) is ready."

run: $(RUNNABLE)  ## the demonstration with a real Envoy; CONFIG=file: the sink alone
	@$(PY) -m proxy_usage $(if $(CONFIG),run --config "$(CONFIG)",demo --story)

check: lint types imports unit  ## lint, types, import contracts and unit tests: under 2 minutes

test: lint types imports most-tests e2e-tests  ## everything; FOLD=protobuf: with that fold alone

test-faults: $(DEV)  ## 200 kills, 32 graceful stops, 100,000 mutated messages: about 25 minutes
	@FAULT_KILLS=200 FAULT_STOPS=32 FAULT_MESSAGES=100000 $(PYTEST) -s tests/faults

bench: $(DEV)  ## the sink's cost beside its peers': 10 minutes; BENCH=full: all of it, ONLY=part, SAVE=1: into the docs
	@$(PY) -m bench $(ONLY) $(if $(filter full,$(BENCH)),--full) $(if $(SAVE),--save)

bench-check: $(DEV)  ## whether ratios are still those of bench/results.json, within a half: 2 minutes
	@$(PY) -m bench.check $(ONLY)

bench-core: $(DEV)  ## what folding, checkpoints and rows of long streams cost here: about 10 minutes
	@$(PY) bench/fold.py
	@$(PY) bench/checkpoints.py
	@$(PY) bench/long_rows.py
	@$(PY) bench/memory_streams.py
	@$(PY) bench/jetstream.py
	@$(PY) bench/page.py

soak: $(DEV)  ## 5 million waiting events, then 20 minutes (MINUTES=n) of load, churn, rotation and outages
	@$(PY) bench/soak_backlog.py
	@$(PY) bench/soak.py $(MINUTES)

format: $(DEV)  ## rewrite the Python code in the house style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

protos: $(DEV)  ## regenerate the protobuf code from protos/
	@$(PY) protos/generate.py

screenshots: $(DEV)  ## take the pictures of the operator's page in docs/images anew: about 6 minutes
	@mkdir -p docs/images
	@SCREENSHOTS=docs/images $(PYTEST) --timeout 900 tests/e2e/test_operators_page.py
	@$(PY) docs/choose_pictures.py docs/images

docs: $(DEV)  ## rewrite docs/troubleshooting.md and configuration.md from the code
	@$(PY) docs/write_pages.py

ceilometer: $(CEILOMETER)  ## create build/ceilometer-venv, whose publisher tests compare with ours: about a minute

lock:  ## rewrite requirements/*.txt from pyproject.toml; UPGRADE=1: with the newest versions
	@$(UV) --version >/dev/null 2>&1 || { \
	  echo "make lock needs uv, and there is no '$(UV)' here. One way to get it:"; \
	  echo "  $(PYTHON) -m venv build/uv && build/uv/bin/pip install uv && make lock UV=build/uv/bin/uv"; exit 1; } >&2
	@$(COMPILE) --output-file requirements/run.txt pyproject.toml
	@$(COMPILE) --extra demo --constraint requirements/run.txt --output-file requirements/demo.txt pyproject.toml
	@$(COMPILE) --extra dev --constraint requirements/demo.txt --output-file requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(COMPILE) --constraint requirements/demo.txt --output-file requirements/build.txt -
	@$(COMPILE) --group ceilometer --output-file requirements/ceilometer.txt

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

clean:  ## remove caches and build products; .venv and var/ stay
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

lint: $(DEV)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(DEV)
	@$(PY) -m mypy .

imports: $(DEV)
	@$(VENV)/bin/lint-imports --no-logo

unit: $(DEV)
	@$(PYTEST) -n auto tests/unit tests/test_*.py

# The end-to-end tests come last and one at a time: each drives Envoys of its own, and two cores are soon full.
most-tests: $(DEV) $(CEILOMETER)
	@$(PYTEST) -n auto --ignore tests/e2e --ignore tests/faults tests

e2e-tests: $(DEV)
	@$(PYTEST) tests/e2e tests/faults

# A virtual environment that works is kept, whoever made it; one that does not is made anew.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "proxy-usage needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not there)."; \
	  echo "Name another one: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=python3.12"; exit 1; } >&2
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments: its venv or ensurepip module is missing."; \
	    echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

$(DEMO): $(READY) requirements/demo.txt pyproject.toml $(EXTENSION)
	@echo "Installing requirements/demo.txt into $(VENV) ..."
	@$(PIP) install --require-hashes -r requirements/demo.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): $(READY) requirements/dev.txt pyproject.toml $(EXTENSION)
	@echo "Installing requirements/dev.txt into $(VENV) ..."
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(CEILOMETER): requirements/ceilometer.txt | $(DEV)
	@echo "Installing requirements/ceilometer.txt into $(CEILOMETER_VENV) ..."
	@$(PY) -m venv --clear $(CEILOMETER_VENV)
	@$(CEILOMETER_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --require-hashes -r requirements/ceilometer.txt
	@touch $@
