# make demo | test | bench | lint | clean: each makes .venv first.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test bench lint clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or later is needed; name one with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[fast,train,test]" --constraint constraints.txt $(PIP_ARGS)
	@touch $@

demo: install
	$(BIN)/python -m uae.demo

test: install
	$(BIN)/python -m pytest Testing

bench: install
	$(BIN)/python -m uae bench all --json build/bench/all.json --report Docs/benchmarks

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find uae UAE* Testing -name __pycache__ -type d -prune -exec rm -rf {} +
