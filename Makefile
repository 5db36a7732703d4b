# make demo    set up, search on real models, print the table
# make smoke   the same in a few minutes, with answers from a file
# make test    set up, lint, run the tests
# make chaos   kill actors, nodes and drivers of a search, many times (long)
# make docs    write docs/language.md anew
# make lock    resolve the locks anew (deploy/lock.py)
# TARGET=gpu with any of them takes the GPU lock.

PYTHON ?= python3.11
VENV := .venv
TARGET ?= cpu
LOCK := deploy/locks/$(TARGET).txt
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# The locks are installed uncompiled, since most of it is never imported. What is must be compiled once and not in every
# process: where the environment forbids to write bytecode, an actor would take three times as long to start.
unexport PYTHONDONTWRITEBYTECODE
LOCKED := $(PIP) install --quiet --no-deps --no-compile --require-hashes
# The stamp holds the hash of what the environment was made from, so a stale one is noticed whatever the clock says.
STAMP := $(VENV)/.made-from
WANTED = $(shell echo $(TARGET) | cat - deploy/locks/*.txt setup.cfg | sha256sum | cut -d' ' -f1)

.PHONY: setup demo smoke test lint chaos docs lock clean

setup:
	@if [ "$$(cat $(STAMP) 2>/dev/null)" != "$(WANTED)" ]; then $(MAKE) --no-print-directory $(VENV); fi

# --no-deps: the locks are complete, and leave out what would break (see deploy/lock.py). Torch comes as the CPU build
# where that can be had, otherwise as the index's own build with its CUDA libraries.
$(VENV): FORCE
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON): install CPython 3.11 or name it, PYTHON=…" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "make: $(PYTHON) is not CPython 3.11, for which the locks are: name one, PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV) from $(LOCK): a few minutes."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
ifeq ($(TARGET),cpu)
	@$(LOCKED) -r deploy/locks/torch-cpu.txt 2> /dev/null || { \
		echo "pip finds no CPU build of torch: the index's own comes, with CUDA's libraries, several GB."; \
		$(LOCKED) -r deploy/locks/torch-indexed.txt; }
endif
	@$(LOCKED) -r $(LOCK)
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@echo "$(WANTED)" > $(STAMP)

FORCE:

demo: setup
	@$(VENV)/bin/autoprune search configs/demo.yaml $(ARGS)

smoke: setup
	@$(VENV)/bin/autoprune search configs/smoke.yaml $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check . || { echo "run: ruff format ." >&2; exit 1; }

test: lint
	@$(VENV)/bin/python -m pytest $(ARGS)

chaos: setup
	@AUTOPRUNE_KILLS=30 $(VENV)/bin/python -m pytest tests/chaos $(ARGS)

docs: setup
	@$(VENV)/bin/python -m autoprune.algorithms.manual > docs/language.md

lock:
	$(PYTHON) deploy/lock.py $(TARGET)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
