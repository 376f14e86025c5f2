# Each target makes its own environment in .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
# A Python 3.12 for `make test-lowest`, also one that pyenv keeps from the PATH; empty where there is none.
PYTHON312 ?= $(firstword $(shell python3.12 -c 'import sys; print(sys.executable)' 2> /dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12))
VENV := .venv
BIN := $(VENV)/bin
WORKERS := -n 2 --dist worksteal
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
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-slow: $(VENV)/.made  ## the whole test suite
	$(BIN)/python -m pytest $(WORKERS)

# The wheel is tried, not the checkout, in an environment of its own, on the other Python if there is one.
test-lowest: export OMP_NUM_THREADS = 1
test-lowest: export PYTHONSAFEPATH = 1
test-lowest: dist         ## demo and tests from the wheel, on the lowest declared versions (torch: newest)
	$(BIN)/python tests/release/lowest.py pyproject.toml > dist/lowest.txt
	$(or $(PYTHON312),$(PYTHON)) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet --upgrade pip
	$(VENV)-lowest/bin/pip install --quiet --constraint dist/lowest.txt "$$(ls dist/*.whl)[test]"
	$(VENV)-lowest/bin/python examples/demo.py demo
	$(VENV)-lowest/bin/python -m pytest -m "not slow and not long" $(WORKERS)

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
	$(BIN)/python -m phenoseq.zoo.cards README.md docs/model.md model_cards/*.md

clean:
	rm -rf $(VENV) $(VENV)-lowest docs/_build demo dist
