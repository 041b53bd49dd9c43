# Every target makes what it needs: a virtual environment in .venv by plain pip, with the versions in constraints.txt.
# PIP_ARGS goes to every `pip install`, e.g. to choose the small CPU build of torch (see the README).
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/core ## watch the embedded model unmask an answer
	$(BIN)/python -m unmask demo

test: .venv/dev ## run the tests (below 5 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

check: .venv/dev ## lint, format, types, size budgets and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python scripts/budget.py src

bench: .venv/core ## measure the embedded pair; writes results/
	$(BIN)/python -m unmask bench

clean: ## remove the virtual environment and the caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist

# A stamp is as new as the last install that succeeded. The dev install contains the core install.
.venv/core: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e .
	@touch $@

.venv/dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[dev]'
	@touch .venv/core $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unmask needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
