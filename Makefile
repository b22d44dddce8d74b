# Every target sets up what it needs. Python 3.11 or newer and make are all it takes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODELS_DIR ?= models
ARGS ?=
STARTER := smollm2-135m-instruct
VLLM_VENV := .venv-vllm

.PHONY: help serve vllm test test-fast check fix bench clean
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## Set everything up and run the server (ARGS="--port 9000")
	@MODELS_DIR="$(MODELS_DIR)" exec $(BIN)/xandrouting serve --starter $(ARGS)

vllm: $(VENV)/.serve ## Install vLLM into .venv-vllm (ARGS="--gpu --force")
	@$(BIN)/xandrouting engines install vllm --into $(VLLM_VENV) $(ARGS)

test: $(VENV)/.dev ## Run every test, on a real model too
	@$(BIN)/python scripts/fetch_starter.py .cache/models
	$(BIN)/pytest tests/unit tests/contract --cov
	$(BIN)/pytest tests/process tests/engine tests/e2e
	-@vllm=$${VLLM_BIN:-$$($(BIN)/xandrouting engines install vllm --into $(VLLM_VENV))} && \
		$${vllm%/*}/python scripts/convert_starter.py .cache/models/$(STARTER)/*.gguf .cache/vllm-models/$(STARTER)
	$(BIN)/pytest tests/vllm

test-fast: $(VENV)/.dev ## Run the tests without processes and models, in seconds
	$(BIN)/pytest -q tests/unit

check: $(VENV)/.dev ## Lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.dev ## Format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure the server and print a table
	@$(BIN)/python scripts/fetch_starter.py .cache/models
	$(BIN)/python -m bench

clean: ## Remove what the targets made, models excepted
	rm -rf $(VENV) $(VLLM_VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist bench/.build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"

$(VENV)/.serve: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[llamacpp]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.serve | $(VENV)/bin/python
	$(PIP) install --group dev
	@touch $@
