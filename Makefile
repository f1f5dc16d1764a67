# Two commands: `make demo` trains and compares, `make test` checks everything. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled to byte code when first imported: a third of the installation's time saved.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint types clean

demo: .venv/demo
	$(BIN)/python examples/train_gpt.py --compare --layers 3 --context 128 --steps 120

test: lint types
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not see setuptools' package-dir mapping, so they check the package laid out as a wheel has it.
types: .venv/test
	rm -rf build/types
	$(BIN)/python -c 'import setuptools; setuptools.setup()' -q build_py --build-lib build/types
	$(BIN)/mypy
	$(BIN)/mypy examples benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[examples]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[examples,report,tensorboard,dev]'
	touch $@

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .ruff_cache .hypothesis
