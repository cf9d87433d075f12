# Everything a newcomer needs: make demo, make test. Both make .venv from a package index and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-all bench lint docs audit clean

help:
	@echo "make demo      install, then search the embedded digits model (about 4 minutes on two cores)"
	@echo "make test      install with the dev extras, then run the tests"
	@echo "make test-all  everything that make test leaves out as well: slow and, where there is one, GPU tests"
	@echo "make bench     ratios of the supernet and of Winograd convolutions to float, in one process"
	@echo "make lint      ruff and mypy"
	@echo "make audit     known vulnerabilities of what is installed; asks an advisory service on the internet"
	@echo "make docs      the pages of docs/ and the public API as docs/_build/index.html; a warning is an error"
	@echo "make clean     remove .venv"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m tmpq_exp

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.installed-dev
	$(PIP) install --quiet "pip-audit>=2.7,<3"
	$(BIN)/pip-audit --skip-editable

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build
	@echo docs/_build/index.html

clean:
	rm -rf $(VENV) docs/_build
