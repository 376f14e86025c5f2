# Each target makes its own environment in .venv on first use. PYTHON chooses the interpreter.
PYTHON ?= python3
# A Python 3.12 beside it, also one that pyenv keeps from the PATH; empty where there is none.
PYTHON312 ?= $(firstword $(shell python3.12 -c 'import sys; print(sys.executable)' 2> /dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12))
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow test-lowest test-3.12 lint bench docs cards dist clean

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

# Demo and tests of the wheel, not of the checkout, in a new environment.
# $(1): its folder; $(2): interpreter; $(3): more options of pip
define try-wheel
	$(2) -m venv --clear $(1)
	$(1)/bin/pip install --quiet --upgrade pip
	$(1)/bin/pip install --quiet torch torchvision
	$(1)/bin/pip install --quiet $(3) "$$(ls dist/*.whl)[test]"
	$(1)/bin/python examples/demo.py demo
	$(1)/bin/python -m pytest -m "not slow" -n 2
endef
test-lowest test-3.12: export OMP_NUM_THREADS = 1
test-lowest test-3.12: export PYTHONSAFEPATH = 1

test-lowest: dist         ## demo and tests from the wheel, on the lowest declared versions (torch: newest)
	$(BIN)/python tests/release/lowest.py pyproject.toml > dist/lowest.txt
	$(call try-wheel,$(VENV)-lowest,$(PYTHON),--constraint dist/lowest.txt)

ifeq ($(PYTHON312),)
test-3.12:                ## the same on Python 3.12 and the newest versions, where it is on the machine
	@echo "test-3.12 is skipped: no Python 3.12 on this machine; PYTHON312=... names one"
else
test-3.12: dist
	$(call try-wheel,$(VENV)-3.12,$(PYTHON312))
endif

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
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-3.12 docs/_build demo dist
