# `make demo` and `make test` are all a newcomer needs: both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest
PARALLEL := -n 2 --dist loadgroup  # two pytest processes; each test has one thread

.PHONY: demo test quick test-oldest lint types docs dist clean setup

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

# Old libraries beside newer ones say what those will give up: deprecations are judged by the newest.
SHOWN := $(patsubst %,-W default::%,DeprecationWarning PendingDeprecationWarning FutureWarning)
test-oldest: $(OLDEST)/.ready  ## the quick suite with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/pytest $(PARALLEL) $(SHOWN) -m 'not slow'

$(OLDEST)/.ready: pyproject.toml tests/release/lower_bounds.py
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tests/release/lower_bounds.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --disable-pip-version-check --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	touch $(OLDEST)/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)            ## the documentation site: runs/docs/index.html, to be opened from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: $(READY)            ## dist/: the source and the wheel, built of it
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
