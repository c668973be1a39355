# The same words everywhere: demo, test, check, fmt. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long check fmt venv clean

demo: venv
	$(BIN)/splitwise demo

test: venv
	$(BIN)/python -m pytest -m "not long and not alone" -n auto --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest -m "not long and alone"

test-long: venv
	$(BIN)/python -m pytest -m long

check: venv
	$(BIN)/ruff check src tests runs examples
	$(BIN)/ruff format --check src tests runs examples
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: venv
	$(BIN)/ruff check --fix src tests runs examples
	$(BIN)/ruff format src tests runs examples

venv: $(VENV)/installed

# torch alone and first: then nothing that follows replaces the build that pip chose for this machine.
$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "the venv module is missing: apt-get install python3-venv"; exit 1; }
	@echo "installing torch, a large download the first time ..."
	@$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0
	@echo "installing the rest ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) build out
