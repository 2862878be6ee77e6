# make demo       train TC² on real images and write report.html
# make test       the whole test suite
# make lint       ruff and mypy
# make gpu-check  the CUDA tests and a short CUDA run
# make bench      hypergradient methods and other libraries compared, in minutes; METACAL_DATA names the folder of real data
# make bench-full the same with every problem at full size, in hours
# make gpu-bench  the full suite on a CUDA device
#
# Everything runs in $(VENV), which is made on first use and reinstalled only when setup.cfg or pyproject.toml change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# One thread per process: the suite runs in WORKERS processes side by side.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test lint gpu-check bench bench-full gpu-bench
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/installed
	$(VENV)/bin/metacal demo

test: $(VENV)/installed-test
	$(PYTEST)

lint: $(VENV)/installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

gpu-check: $(VENV)/installed-test
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  set -ex; $(VENV)/bin/python -m pytest -m cuda; $(VENV)/bin/metacal demo --device cuda --steps 20 --out runs/gpu-check --report runs/gpu-check.html; \
	else \
	  echo "gpu-check: no CUDA device here, nothing was checked."; \
	fi

bench: $(VENV)/installed-peers
	$(VENV)/bin/python -m benchmarks small

bench-full: $(VENV)/installed-peers
	$(VENV)/bin/python -m benchmarks full

gpu-bench: $(VENV)/installed-peers
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  set -ex; $(VENV)/bin/python -m benchmarks full --device cuda; \
	else \
	  echo "gpu-bench: no CUDA device here, nothing was measured."; \
	fi

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "metacal needs Python 3.10 - 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml
	@echo "Installing metacal and what it needs into $(VENV): some GB with torch, a few minutes."
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# The benchmarks' peers. betty-ml asks for an older Python than it needs; where it cannot be had, its rows say so.
$(VENV)/installed-peers: $(VENV)/installed-bench
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python betty-ml==0.2.1 \
	  && touch $@ || echo "betty-ml cannot be had here; its rows will say so."

# installed-EXTRA: the package with that extra of setup.cfg.
$(VENV)/installed-%: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
