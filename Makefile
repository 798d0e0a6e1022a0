# Everything starts from a fresh clone with only Python (3.11 to 3.13) and make. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# More arguments for pytest and the benchmarks, e.g. make test ARGS="-k ledger -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-openai test test-kills test-chaos test-dapr test-dapr-kills test-stores test-faults lint format types dapr bench bench-checkpointer bench-recovery bench-journal bench-openai clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml uv.lock tools/bootstrap.py
	@$(PYTHON) tools/bootstrap.py --venv $(VENV) --stamp $(READY)

setup: $(READY) ## Create .venv with everything in it (uv where present, else venv and pip)

demo: setup ## Kill an agent in the middle of its run and watch it finish by itself
	@$(BIN)/outlast demo

demo-openai: setup ## The same with an OpenAI agent: a support desk that is killed while it pays
	@$(BIN)/python examples/support_desk.py demo

test: setup ## Run the tests (no Dapr installation needed)
	$(BIN)/pytest -n auto -rs -m "not dapr and not slow" $(ARGS)

test-kills: setup ## Kill runs at every call, and at random, on the embedded sidecar
	$(BIN)/pytest tests/acceptance tests/openai_agents -n auto -rs -m "slow and not dapr" $(ARGS)

test-chaos: setup ## Run `outlast chaos` on agents that keep the promise, and on some that do not
	$(BIN)/pytest tests/chaos -rs $(ARGS)

test-dapr: setup dapr ## Run the acceptance tests on a real Dapr runtime
	$(BIN)/pytest -n auto -rs -m "(dapr or acceptance) and not slow" --sidecar=daprd $(ARGS)

test-dapr-kills: setup dapr ## Kill runs at every call, and at random, on a real Dapr runtime
	$(BIN)/pytest tests/acceptance tests/openai_agents -n auto -rs -m "acceptance and slow" --sidecar=daprd $(ARGS)

# Which stores: all that can be started here, or STORE=redis, or STORE=redis,mysql
STORE ?= all
test-stores: setup dapr ## Run the tests of state stores on real servers (STORE=redis for one)
	STORE=$(STORE) $(BIN)/pytest tests/stores -rs $(ARGS)

test-faults: setup dapr ## Break parts of the runtime with runs in flight (Redis, PostgreSQL; root for network and disk)
	FAULTS=1 $(BIN)/pytest tests/faults -rs $(ARGS)

lint: setup ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## Check types
	$(BIN)/mypy

dapr: ## Get daprd, placement and scheduler: an installed Dapr, else a build from source in a cache
	@$(PYTHON) tools/get_dapr.py

bench: setup dapr ## Measure the cost of a superstep
	$(BIN)/python -m benchmarks.supersteps $(ARGS)

bench-checkpointer: setup dapr ## Measure DaprSaver next to LangGraph's own savers (needs PostgreSQL and Redis servers)
	$(BIN)/python -m benchmarks.checkpointer $(ARGS)

bench-recovery: setup dapr ## Measure how long a run stands still after a kill
	$(BIN)/python -m benchmarks.recovery $(ARGS)

bench-journal: setup dapr ## Measure what recording a model call or a tool call costs
	$(BIN)/python -m benchmarks.journal $(ARGS)

bench-openai: setup ## Measure what a durable OpenAI Agents run costs, and its resume
	$(BIN)/python -m benchmarks.openai_agents $(ARGS)

clean: ## Remove .venv and what the tools left in the tree
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
