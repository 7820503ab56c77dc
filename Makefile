# `make test` and `make math` do all the set-up they need: a virtual
# environment in .venv with the versions that constraints/ pins. A PYTHON of
# another version than .venv's gets an environment of its own: .venv-3.12.
PYTHON ?= python3

version_of = $(shell $(1) -c 'import sys; v = sys.version_info; \
  print("%d.%d" % v[:2] if v >= (3, 11) else "")' 2>/dev/null)
VERSION := $(call version_of,$(PYTHON))
ifeq ($(VERSION),)
  $(error PYTHON=$(PYTHON) is missing or older than Python 3.11; \
    name another one, as in: make test PYTHON=python3.12)
endif

VENV := $(if $(filter-out $(VERSION),$(call version_of,.venv/bin/python)),\
  .venv-$(VERSION),.venv)
VENV := $(strip $(VENV))
CONSTRAINTS := constraints/py$(if $(filter 3.11,$(VERSION)),311,312).txt
STAMP := $(VENV)/set-up

.PHONY: setup test test-slow compilers test-compile math smoke lint types

setup: $(STAMP)

$(STAMP): setup.py $(CONSTRAINTS) $(VENV)/bin/python
	@echo "Installing $(CONSTRAINTS) into $(VENV): about a minute"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev,hf,notebooks,plots,tensorboard]' \
	  --constraint $(CONSTRAINTS)
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Nearly all of its time is compiling, and a third of that LLVM's optimizing.
test: setup
	XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS" \
	  $(VENV)/bin/python -m pytest -m "not slow" \
	  --numprocesses=logical --maxprocesses=4 --dist=worksteal

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

# The TPU compiler in a folder of its own: where it is installed, JAX looks for
# a TPU at each start.
compilers: $(VENV)/compilers/set-up

$(VENV)/compilers/set-up: $(STAMP)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --upgrade --target $(VENV)/compilers \
	  --constraint $(CONSTRAINTS) libtpu
	@touch $@

test-compile: compilers
	PYTHONPATH=$(VENV)/compilers JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest \
	  tests/test_compile_only.py -m slow -k TestForATpu

math: setup
	$(VENV)/bin/python -m experiments.main --config=experiments/math.py

# The whole of `make math` in small: trains, evaluates and saves.
smoke: setup
	workdir=$$(mktemp -d) && trap 'rm -rf "$$workdir"' EXIT && \
	  $(VENV)/bin/python -m experiments.main \
	  --config=experiments/math.py:tiny --workdir="$$workdir"

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: setup
	$(VENV)/bin/pyrefly check --python-interpreter-path=$(VENV)/bin/python
