# Each target makes its own environment in .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow lint bench docs cards clean

$(VENV)/.made: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "phenoseq needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable ".[test,lint]"
	touch $@

demo: $(VENV)/.made       ## simulate a plate, predict its expression, draw demo/prediction.png
	$(BIN)/python examples/demo.py demo

test test-slow: export OMP_NUM_THREADS = 1  # two processes share the cores

test: $(VENV)/.made       ## the test suite, without what takes minutes
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.made  ## the whole test suite
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.made       ## style, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.made      ## speed, memory and accuracy, as ratios measured in this run
	$(BIN)/python tests/benchmarks/run.py

docs: $(VENV)/.made       ## the documentation, into docs/_build
	$(BIN)/pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

cards: $(VENV)/.made      ## the measured tables, into README and cards
	$(BIN)/python -m phenoseq.zoo.cards README.md model_cards/*.md

clean:
	rm -rf $(VENV) docs/_build demo
