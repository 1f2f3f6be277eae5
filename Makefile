# Nothing is assumed but Python 3.11 to 3.13, git and make. Everything is installed into .venv, and only when
# pyproject.toml or constraints.txt has changed since: every target may be run again at any time.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# A PYTHON given by hand is taken at its word; otherwise the first that fits.
CANDIDATES := $(if $(filter file,$(origin PYTHON)),python3 python3.13 python3.12 python3.11 python,$(PYTHON))
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check bench gpu gpu-more gpu-dry clean

help: ## this list
	@echo 'Sfumato. Every target sets up what it needs in $(VENV); PYTHON=... chooses the interpreter (3.11 to 3.13).'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	    while IFS='|' read -r name text; do printf '  make %-8s  %s\n' "$$name" "$$text"; done

setup: $(VENV)/.demo-stamp ## install Sfumato and what it needs to run into .venv
	@echo 'setup: ready: $(BIN)/sfumato --help'

demo: $(VENV)/.demo-stamp ## watch the embedded models: a Sudoku, an edit, code, a molecule, a plot, a decision, live
	@echo 'demo: six skills of the embedded models, a new item each'
	$(BIN)/sfumato demo

test: $(VENV)/.test-stamp ## format, lint, types, layering, pages, then every test that is not slow
	@echo 'test: scripts/check, then scripts/test'
	@scripts/check
	@scripts/test --ignore tests/test_layering.py --ignore tests/test_style.py # which scripts/check has run

check: $(VENV)/.test-stamp ## format, lint, types, layering and pages only
	@scripts/check

# One process after the other; the machine's ceiling is measured once, first, and shared.
BENCH := runs/bench
WITH  := --ceilings runs/ceilings.json

bench: $(VENV)/.test-stamp ## the CPU benchmarks, under ten minutes: operations, a step, answers, transformers on the same weights
	@echo 'bench: up to ten minutes; leave the machine alone meanwhile; records go to $(BENCH)'
	@mkdir -p $(BENCH) && rm -f runs/ceilings.json
	$(BIN)/python benchmarks/step.py $(WITH) --seconds 5 -o $(BENCH)/step.json
	$(BIN)/python benchmarks/request.py --seconds 8 -o $(BENCH)/request.json
	$(BIN)/python benchmarks/request.py --kinds "" --sudoku 100 --rounds 1 -o $(BENCH)/sudoku.json
	$(BIN)/python benchmarks/peers.py --seconds 6 -o $(BENCH)/peers.json
	@for op in linear experts attention read_out soft_embedding norms; do \
	    $(BIN)/python benchmarks/ops/$$op.py $(WITH) --seconds 1 -o $(BENCH)/ops-$$op.json || exit 1; \
	done
	@echo 'bench: cp $(BENCH)/*.json benchmarks/results && $(BIN)/python benchmarks/results.py makes RESULTS.md of them'

# Not the venv: a machine lent for its GPU may have no network, and has torch of its own.
gpu: ## on a CUDA machine, without network or .venv: all that only a GPU can say, in eight minutes (needs torch, triton, safetensors, tokenizers, numpy)
	@echo 'gpu: with $(PYTHON), eight minutes at most; results go to $(or $(OUT),runs/gpu)'
	$(PYTHON) scripts/gpu.py --out $(or $(OUT),runs/gpu)

gpu-more: ## the same, four minutes more: long contexts, a memory checker, hardware counters, offloading, transformers
	@echo 'gpu-more: with $(PYTHON), four minutes at most; results go to $(or $(OUT),runs/gpu-more)'
	$(PYTHON) scripts/gpu.py --more --out $(or $(OUT),runs/gpu-more)

gpu-dry: $(VENV)/.test-stamp ## both on any machine, at toy sizes on the processor, in about two minutes: that the scripts themselves work
	@echo 'gpu-dry: about two minutes; results go to runs/gpu-dry and runs/gpu-more-dry'
	$(BIN)/python scripts/gpu.py --dry
	$(BIN)/python scripts/gpu.py --more --dry

clean: ## remove .venv, caches and build leftovers; runs/ and anything tracked stay
	@echo 'clean: removing $(VENV), caches and build leftovers'
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment: the first Python in CANDIDATES that is 3.11 to 3.13 and can make one.
$(BIN)/python:
	@seen=; \
	for candidate in $(CANDIDATES); do \
	    version=$$($$candidate -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    case $$version in 3.11|3.12|3.13) ;; *) seen="$$seen, $$candidate is $$version"; continue ;; esac; \
	    $$candidate -c 'import ensurepip, venv' 2>/dev/null || \
	        { seen="$$seen, $$candidate lacks venv (Debian, Ubuntu: apt install python3-venv)"; continue; }; \
	    echo "setup: making $(VENV) with $$candidate (Python $$version)"; \
	    exec $$candidate -m venv $(VENV); \
	done; \
	echo "setup: no usable Python 3.11, 3.12 or 3.13 among: $(CANDIDATES)$${seen:+ ($${seen#, })}" >&2; \
	echo "       Install one of these versions, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

# torch by itself first: it is most of the download, and an interruption then costs only the small rest.
$(VENV)/.demo-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'setup: installing torch, then Sfumato and what it needs to run (the first time: a few minutes)'
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[serve]'
	@touch $@

# The test extras hold all that the demo needs, so this also makes the demo ready.
$(VENV)/.test-stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'setup: installing torch, then Sfumato with its test extras (the first time: a few minutes)'
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.demo-stamp $@
