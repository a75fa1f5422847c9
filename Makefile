# Two commands do everything: `make demo` and `make test`. Both make .venv if need be.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CODE   := flywheel data eval tests

.PHONY: setup demo test test-slow chaos lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt requirements/setup.sh pyproject.toml
	requirements/setup.sh $(PYTHON) $(VENV)
	touch $@

demo: setup
	$(BIN)/accelerate launch -m flywheel.iterate --round 3

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

chaos: setup
	$(BIN)/python tests/chaos/kills.py --kills 100
	$(BIN)/python tests/chaos/real.py --kills 10
	$(BIN)/python tests/chaos/hosts.py

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

clean:
	rm -rf runs wandb build
