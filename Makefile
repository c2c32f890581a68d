# Every target does all of its own set-up on a fresh machine; a second run skips what is done.
#   make demo    the bundled model on bundled pictures: a table and report.html
#   make test    the tests
#   make check   what CI runs: lint, format, types, floors, tests
#   make format  let ruff put the style right

# The first Python of 3.11–3.13 that is found; choose another with `make PYTHON=… demo`.
FITS   := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
            "$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests are many and small: whole processes side by side, one torch thread each.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The pins hold for isolated build environments too (the second name is pip >= 25.3's).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: demo test check lint format clean

demo: .venv/.installed
	$(BIN)/segcompass demo

test: .venv/.installed-dev
	$(PYTEST)

check: lint
	$(PYTEST)

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: .venv/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11–3.13 found; install one, or: make PYTHON=/path/to/python3.x …" >&2; exit 1; }
	@echo "Setting up .venv with $(PYTHON): downloads torch once, takes a few minutes" >&2
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.created pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	@touch $@ .venv/.installed
