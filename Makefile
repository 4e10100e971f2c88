# make demo | test | slow | lint | reproduce | clean
# Variables: PYTHON (3.11 or newer), VENV, CONSTRAINTS (empty on a machine with a GPU), JOBS.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
JOBS ?= 2

PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TORCH := $(if $(CONSTRAINTS),$(shell sed -n '/^torch==/p' $(CONSTRAINTS)),torch)
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

.PHONY: demo test slow lint reproduce clean

# A run folder is never overwritten: the second demo goes to runs/demo-DATE-TIME.
demo: $(VENV)/.installed
	@run=runs/demo; [ ! -e $$run ] || run=runs/demo-$$(date +%Y%m%d-%H%M%S); set -x; \
	OMP_NUM_THREADS=1 $(VENV)/bin/unveil train mdpo --run $$run

test: $(VENV)/.installed-dev
	$(PYTEST) -n $(JOBS)

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

reproduce: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/unveil reproduce mdpo

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	"make: $(PYTHON) is missing or older than Python 3.11; name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# torch by itself and first: pip then never looks at another torch, which may be gigabytes large.
$(VENV)/.torch: $(VENV)/bin/python $(CONSTRAINTS)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
