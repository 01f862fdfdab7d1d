# Every target first makes the environment that it needs, in .venv; scripts/setup.sh does nothing where it is up to date.
#   make lab LAB_ARGS="--no-browser --port 8899"     what JupyterLab is told
#   make test PYTHON=/path/to/python3                which Python makes .venv

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
ifneq ($(ROOT),$(CURDIR))
$(error run make in the folder of the project, from elsewhere: make -C $(ROOT) $(MAKECMDGOALS))
endif

PY := .venv/bin/python
# JupyterLab refuses to run as root unless told. It listens on this machine only and asks for its token.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup lab demo test test-engines test-ray alternatives check notebooks site lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup:
	@sh scripts/setup.sh

lab: setup ## JupyterLab on your own copy of the notebooks, in work/
	@sh scripts/setup.sh --copy work
	@.venv/bin/jupyter lab --notebook-dir=work --LabApp.default_url=/lab/tree/00_start_here.ipynb $(AS_ROOT) $(LAB_ARGS)

demo: setup ## the whole system in a minute
	@$(PY) -m kvlab demo

test: setup ## lint and types, then every test and every notebook, and a table of what became of them
	@$(PY) -m tests.harness.run

test-engines: setup ## vLLM with the connector, in an environment of its own (.venv-engines, Linux, about 3 GB)
	@sh scripts/test_engines.sh

test-ray: setup ## the scheduler on Ray Serve, in an environment beside .venv (.venv-ray, about 400 MB)
	@sh scripts/test_ray.sh

alternatives: ## the stores of others beside Redis, and kvlab's replay of a TRACE beside Dynamo's (.venv-alternatives, about 900 MB)
	@sh scripts/alternatives.sh "$(TRACE)"

check: setup ## while you change code: lint, types, units and contracts, in under three minutes
	@$(PY) -m tests.harness.run --quick

notebooks: setup ## run the notebooks and write their outputs
	$(PY) scripts/build_notebooks.py

site: setup ## the website, from README, docs/ and the stored outputs of the notebooks, into build/site/
	$(PY) scripts/build_site.py

lint: setup ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean: ## remove .venv, caches and build output; work/ stays
	rm -rf .venv .venv-engines .venv-ray .venv-alternatives build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvlab notebooks scripts tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
