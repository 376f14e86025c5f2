# Each target makes its own environment in .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow test-lowest lint bench docs cards dist clean

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

# The wheel, and not the checkout, in an environment of the lowest declared versions.
test-lowest: export OMP_NUM_THREADS = 1
test-lowest: export PYTHONSAFEPATH = 1
test-lowest: dist         ## install the wheel anew with the lowest versions; demo and tests from it
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --upgrade pip
	$(VENV)-lowest/bin/pip install --quiet torch torchvision
	$(BIN)/python tests/release/lowest.py pyproject.toml > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/pip install --quiet --constraint $(VENV)-lowest/lowest.txt "$$(ls dist/*.whl)[test]"
	$(VENV)-lowest/bin/python examples/demo.py demo
	$(VENV)-lowest/bin/python -m pytest -m "not slow" -n 2

dist: $(VENV)/.made       ## source distribution and wheel, into dist/
	rm -rf dist
	$(BIN)/pip install --quiet --editable ".[release]"
	$(BIN)/python -m build --outdir dist .

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
	rm -rf $(VENV) $(VENV)-lowest docs/_build demo dist
