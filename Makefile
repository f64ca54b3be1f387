# `make train` and `make test` set everything up by themselves; ARGS go on to train.py, TESTS to pytest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-resume lint docs lock check-lock audit clean environment

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

train: environment ## train; ARGS="recipe=image_classification optim=adamw" go on to train.py
	$(BIN)/python train.py $(ARGS)

test: environment ## run the tests; TESTS=tests/optim picks some
	$(BIN)/python -m pytest $(TESTS)

test-all: environment ## run the slow tests as well (an hour or two)
	$(BIN)/python -m pytest -m "" $(TESTS)

test-resume: environment ## every resume, signal and two-process test, and 50 kills (half an hour)
	LION_LIGHTNING_WHOLE_MATRIX=1 $(BIN)/python -m pytest -m "" tests/reliability tests/training/checkpoint/test_files.py
	$(BIN)/python scripts/kill_test.py --kills 50 --seed 1
	$(BIN)/python scripts/signal_test.py --repeats 20 --seed 1

lint: environment ## style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: environment ## build the documentation strictly into build/site; DOCS=serve shows it while you write
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --requirement pyproject.toml --extra docs --constraint requirements.lock
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(DOCS),build)

lock: environment ## write requirements.lock: every supported Python and platform, from the ranges in pyproject.toml
	$(BIN)/python scripts/lock.py write

check-lock: environment ## resolve the lock and all extras for every supported Python and platform; installs nothing
	$(BIN)/python scripts/lock.py check

audit: ## known vulnerabilities of what requirements.lock pins
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# PYTHON=python3.13 and TORCH=cpu are remembered by the environment; a second start changes nothing and needs no network.
environment:
	@$(PYTHON) scripts/make_environment.py --venv $(VENV) $(if $(filter command environment,$(origin PYTHON)),--python $(PYTHON)) \
	  $(if $(TORCH),--torch $(TORCH))
