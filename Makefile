# `make demo` and `make test` each work in a fresh clone; a second run installs nothing.
# Without a GPU: make demo TORCH_INDEX=URL, the URL of PyTorch's index of CPU wheels (docs/install.md).
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-from-constraints

.PHONY: demo test sweeps lint format clean

demo: $(INSTALLED)
	$(BIN)/kd demo --out demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Minutes to hours: what `make test` checks by an example, over all cases.
sweeps: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m sweep $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Written last, so that an interrupted installation is not taken for a whole one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	@echo 'Installing about 6 GB of packages into $(VENV), mostly CUDA libraries.'
	@echo 'Without a GPU, 2 GB are enough: make $(MAKECMDGOALS) TORCH_INDEX=URL (see docs/install.md)'
else
	@echo 'Installing about 2 GB of packages into $(VENV), with PyTorch for CPUs from $(TORCH_INDEX).'
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --index-url $(TORCH_INDEX) \
	    torch torchaudio torchvision
endif
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,export]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info demo
