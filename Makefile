PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench exactness chaos clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: .venv/.run ## the whole service on this machine: no Kafka, no Stripe account, no Docker
	@$(BIN)/tallyman demo

test: .venv/.dev ## all tests, those on a real Kafka included
	$(BIN)/python -m pytest -q --numprocesses 5 --dist worksteal

lint: .venv/.dev ## ruff, mypy --strict, the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/.dev ## rewrite the code in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev ## speed of both stages on a real Kafka, of two processes against one, and of a restore
	$(BIN)/python -m benchmarks.aggregate
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.deliver
	$(BIN)/python -m benchmarks.restore

chaos: .venv/.dev ## a million events, three processes, three brokers, forty faults: billed must equal produced
	$(BIN)/python -m tests.chaos --events 1000000 --workers 3 --partitions 12 --faults 40 --brokers 3 --seed 1

exactness: .venv/.dev ## a million events on a real Kafka, twenty kills, a Stripe that fails: billed must equal produced
	$(BIN)/python -m tests.exactness.run

clean: ## remove what the other targets made
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/.run
