# `make demo` and `make test` are all a newcomer needs: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := -n 2 --dist loadgroup  # two pytest processes; each test has one thread

.PHONY: demo test quick lint types docs clean setup

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)            ## the main job on real handwritten digits: runs/demo/report.html
	$(BIN)/coar demo

test: $(READY) lint types docs ## everything: lint, types, the site, all tests
	$(BIN)/pytest $(PARALLEL)

quick: $(READY)           ## the tests without the slow ones
	$(BIN)/pytest $(PARALLEL) -m 'not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)            ## the documentation site: runs/docs/index.html, to be opened from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
