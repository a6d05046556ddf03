# make serve  - the demo model at http://127.0.0.1:8000/v1 (PORT=8123 for another port); Ctrl-C ends all of it
# make test   - what CI runs

PORT ?= 8000
CONFIG ?= serve_config.yaml
VENV ?= .venv
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
SHELL = /bin/bash

.PHONY: serve test lint tests test-cluster test-rest clean

serve: $(VENV)/.serve
	@exec $(VENV)/bin/flexpipe serve $(CONFIG) --port $(PORT)

test: lint tests

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy scripts/gpu_check  # what tests here cannot run

# At once: those that start Ray wait for processes most of the time.
tests: $(VENV)/.dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target --keep-going test-rest test-cluster

test-rest: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m "not gpu and not cluster" -n 2 --dist loadfile --no-loadscope-reorder --durations 10

test-cluster: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/integration -m "cluster and not gpu" --durations 10

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable ".[dev]"
	touch $@
