# `make train` and `make test` set everything up by themselves; ARGS go on to train.py, TESTS to pytest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help train test test-resume lint lock audit clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

train: $(READY) ## train; ARGS="recipe=image_classification optim=adamw" go on to train.py
	$(BIN)/python train.py $(ARGS)

test: $(READY) ## run the tests; TESTS=tests/optim picks some
	$(BIN)/python -m pytest $(TESTS)

test-resume: $(READY) ## every resume, signal and two-process test, and 50 kills (half an hour)
	LION_LIGHTNING_WHOLE_MATRIX=1 $(BIN)/python -m pytest tests/reliability tests/training/test_durable.py
	$(BIN)/python scripts/kill_test.py --kills 50 --seed 1
	$(BIN)/python scripts/signal_test.py --repeats 20 --seed 1

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: ## write requirements.lock from what is installed in .venv
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | sed -E 's/^(torch==[0-9.]+).*/\1/' > requirements.lock

audit: ## known vulnerabilities of what requirements.lock pins
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# One environment, rebuilt only when the lock or the packaging changes.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
