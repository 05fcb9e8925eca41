# Each target makes .venv if it is missing, installs into it, and runs. `make PYTHON=/path/to/python` picks the interpreter.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/installed
DOCS_STAMP := .venv/installed-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt

.PHONY: demo test test-slow lint docs bench clean

demo: $(STAMP)
	$(BIN)/xflow demo

# A file stays with one worker: its tests share what they have compiled. Unoptimised, since compiling takes most of the time:
# tests/conftest.py then sets a further flag.
test: $(STAMP)
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
		$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site goes to site/. Its tutorials are run on the way, which takes about a minute.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/xflow bench --model tiny

# The stamp is written last, so an interrupted install is done again. The marker tells a killed install, whose packages may
# be torn, from one that failed by itself. Building without isolation needs no network once setuptools is there. Byte
# code is compiled last, since pip itself takes one core for 13,000 files.
$(STAMP): pyproject.toml constraints.txt
	@if [ -e .venv/installing ]; then rm -rf .venv; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer was not found: call make PYTHON=/path/to/python" >&2; exit 2; fi; \
		$(PYTHON) -m venv --clear .venv; \
	fi
	@echo "Installing into .venv (some minutes the first time)"
	@touch .venv/installing
	@{ $(PIP) "setuptools>=77" && $(PIP) --no-build-isolation -e ".[test]"; } || { rm -f .venv/installing; exit 1; }
	@$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # packages bring files that do not compile
	@rm -f .venv/installing
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) --no-build-isolation -e ".[docs]"
	@touch $@

clean:
	rm -rf site .venv .cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
