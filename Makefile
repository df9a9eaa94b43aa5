# `make demo` and `make test` each set up a fresh clone by themselves: they need Python
# (3.10 to 3.13) with pip and, for the tests, a C++ compiler. Everything goes into $(VENV).

PYTHON ?= python3
VENV   ?= .venv
# What pip is asked for. Installed first, so that what needs torch takes the one that is there.
TORCH  ?= torch==2.13.0
PYTEST_ARGS ?=

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --no-input
STAMPS := $(VENV)/.stamps

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test nightly lint format typecheck bench clean distclean FORCE

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV)  PYTEST_ARGS="

demo: $(STAMPS)/demo ## pictures of what the package does; nothing is compiled
	$(PY) -m convnn_geo demo

test: $(STAMPS)/all $(STAMPS)/cluster ## the test suite, less the slow tests
	$(PY) -m pytest $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest tests -m triton -n 2

nightly: $(STAMPS)/all $(STAMPS)/cluster ## the whole test suite
	$(PY) -m pytest -m "" $(PYTEST_ARGS)

lint: $(STAMPS)/all ## formatting and style, nothing changed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: $(STAMPS)/all ## format and fix what can be fixed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

typecheck: $(STAMPS)/all ## mypy
	$(PY) -m mypy

bench: $(STAMPS)/all $(STAMPS)/cluster ## every benchmark; writes benchmarks/RESULTS.md
	$(PY) benchmarks/results.py

clean: ## remove build leftovers and caches, keep $(VENV)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove $(VENV) too
	rm -rf '$(VENV)'

# --- setting up: one stamp a step, redone when what it stands on changes ---

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) must be Python 3.10 to 3.13; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv '$(VENV)'
	$(PIP) install --upgrade pip "setuptools>=77.0.3" wheel
	@mkdir -p $(STAMPS) && touch $@

# Rewritten only when TORCH names something else than last time.
$(STAMPS)/torch.spec: $(STAMPS)/venv FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/torch.spec
	$(PIP) install '$(TORCH)'
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	$(PIP) install -e '.[data,viz]'
	@touch $@

$(STAMPS)/all: $(STAMPS)/torch pyproject.toml
	$(PIP) install '$(TORCH)' -e '.[all]'
	@touch $@

# torch_cluster and torch_scatter. pip keeps the wheels that it builds, but under a key that
# leaves torch out, so one built for another torch comes back and fails: hence the check.
CLUSTER := DIST_EXTRA_CONFIG='$(abspath $(STAMPS)/build.cfg)' \
  $(PIP) install --no-build-isolation -e '.[cluster]'

$(STAMPS)/cluster: $(STAMPS)/all
	@$(PY) -c "$$COMPILER_NOTE"
	@echo "Installing torch_cluster and torch_scatter; compiling them, where pip has kept no" \
	  "wheels, takes about 6 minutes on two cores."
	@$(PY) -c "$$BUILD_CONFIG" > $(STAMPS)/build.cfg
	$(CLUSTER)
	@$(PY) -c "$$CHECK_CLUSTER" || { \
	  echo "These wheels were built for another torch: compiling them again."; \
	  $(PIP) uninstall -y torch-cluster torch-scatter && \
	  { $(PIP) cache remove torch_cluster; $(PIP) cache remove torch_scatter; true; } && \
	  $(CLUSTER) --no-binary torch-cluster,torch-scatter && \
	  $(PY) -c "$$CHECK_CLUSTER"; }
	@touch $@

# Both packages work if compiled calls answer.
define CHECK_CLUSTER
import torch, torch_cluster, torch_scatter
x = torch.tensor([[0.0], [1.0], [5.0]])
assert torch_cluster.knn(x, x, 1).tolist() == [[0, 1, 2], [0, 1, 2]]
assert torch_scatter.segment_csr(x, torch.tensor([0, 2, 3])).tolist() == [[1.0], [5.0]]
endef
export CHECK_CLUSTER

# Extensions may be built side by side, except with CUDA, where two share object files.
define BUILD_CONFIG
import os, torch
from torch.utils.cpp_extension import CUDA_HOME
cuda = torch.cuda.is_available() and (CUDA_HOME or torch.version.hip)
cuda = cuda or os.environ.get("FORCE_CUDA") == "1"
print("[build_ext]\nparallel =", 1 if cuda else min(os.cpu_count() or 1, 8))
endef
export BUILD_CONFIG

# Words that name the remedy, for a compilation that is going to fail.
define COMPILER_NOTE
import os, shutil, sysconfig
compiler = os.environ.get("CXX", "c++").split()[0]
if not (shutil.which(compiler) or shutil.which("g++")):
    print("No C++ compiler found (" + compiler + "): install one, or set CXX.")
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if not os.path.exists(header):
    print("No " + header + ": install Python's development headers.")
endef
export COMPILER_NOTE
