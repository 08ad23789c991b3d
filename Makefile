# Everything a developer or a machine of ours types. `make` alone lists the targets.
# Every target that needs the environment makes it first; a second call finds the stamp and is instant.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
DEMO   ?= demo.mp4
# Without an NVIDIA card this exact version goes in first, so that the wheel pip is configured to
# find (a CPU build, where there is one) wins over the newest build with its gigabytes of CUDA.
TORCH_WITHOUT_CARD ?= torch==2.13.0
PYTEST_ARGS ?=

PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

# $(call with_progress,what,command): runs the command, prints a line every 15 s until it ends.
# In the background the command would outlive Ctrl-C, hence the trap.
define with_progress
echo "==> $(1)"; $(2) & pid=$$!; trap "kill $$pid 2>/dev/null; exit 130" INT TERM; waited=0; \
while kill -0 $$pid 2>/dev/null; do \
  sleep 1; waited=$$((waited + 1)); \
  if [ $$((waited % 15)) -eq 0 ]; then echo "    still at it after $$waited s: $(1)"; fi; \
done; wait $$pid
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test soak check types fmt bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install reelpool in it, with what the tests need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10; name another one: make setup PYTHON=python3.12"; exit 1; }
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "==> making the virtual environment $(VENV)"; \
	  $(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu install python3-venv"; exit 1; }; \
	fi
	@if nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  echo "==> NVIDIA card found: torch comes with the rest"; \
	else \
	  $(call with_progress,no NVIDIA card: installing $(TORCH_WITHOUT_CARD) first,$(PIP) install "$(TORCH_WITHOUT_CARD)") \
	  || echo "    $(TORCH_WITHOUT_CARD) is not to be had here: torch comes with the rest"; \
	fi
	@$(call with_progress,installing reelpool (editable) and its test tools,$(PIP) install -e ".[test]")
	@touch $(STAMP)
	@echo "==> set-up done"

demo: $(STAMP) ## a prompt becomes demo.mp4 on two local workers
	@$(BIN)/reelpool demo -o $(DEMO)

test: $(STAMP) ## the tests: a seeded sample of the long suites, all of the others
	@echo "==> tests"
	@$(BIN)/python -m pytest -m "not soak" $(PYTEST_ARGS)

soak: $(STAMP) ## the tests with the whole of the long suites
	@echo "==> tests, long suites included"
	@$(BIN)/python -m pytest --soak $(PYTEST_ARGS)

check: $(STAMP) types ## lint, format and types, changing nothing
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy (strict, through build/types)"
	@$(BIN)/mypy

# The packages lie beside reelpool/ here and inside it when installed. mypy has to see them inside,
# or it finds no error at all; links give it that view. Made anew each time: a file may have gone.
types:
	@rm -rf build/types && mkdir -p build/types/reelpool
	@for path in reelpool/*; do \
	  case $$path in */__pycache__) ;; *) ln -s ../../../$$path build/types/reelpool/ ;; esac; \
	done
	@for name in runtime scheduler models; do ln -s ../../../$$name build/types/reelpool/$$name; done

fmt: $(STAMP) ## format the sources and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## run every script of benchmarks/ (results go to benchmarks/results/)
	@for script in benchmarks/*.py; do \
	  if [ ! -f "$$script" ]; then echo "benchmarks/ holds no scripts yet"; exit 0; fi; \
	  echo "==> $$script"; $(BIN)/python "$$script" || exit 1; \
	done

docs: $(STAMP) ## write the generated pages of docs/ anew
	@echo "==> generated docs"
	@$(BIN)/python -m reelpool.cli.docs

clean: ## remove build outputs and caches (.venv, runs/ and videos stay)
	@rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -print | xargs rm -rf
