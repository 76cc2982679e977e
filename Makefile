# make demo | make test | make test-all | make lint: each sets up .venv on a fresh machine and then runs.
# DETECTRON2=<anything pip installs> (a wheel, a folder, a git URL) replaces Detectron2's own source.

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=
BIN := $(VENV)/bin
# Processes that share the tests; each computes with one thread.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
UNREACHABLE := Detectron2 could not be installed from $(or $(DETECTRON2),its own repository \
(requirements-detectron2.txt)); name another source: make ... DETECTRON2=<wheel, folder or git URL>

.PHONY: demo test test-all lint install clean-install

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py

# Without Detectron2 the tests that need none of it run; the last line counts the others.
test: $(VENV)/.base
	@$(MAKE) --no-print-directory $(VENV)/.installed || true
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed
	KD_DETECTRON_TEST_ALL=1 $(PYTEST)

lint: $(VENV)/.base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.base: requirements.txt requirements-dev.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	touch $@

# Detectron2 is compiled against the installed torch, hence no build isolation.
$(VENV)/.installed: $(VENV)/.base requirements-detectron2.txt
	@$(BIN)/pip install --no-build-isolation \
	  $(if $(DETECTRON2),"$(DETECTRON2)",-r requirements-detectron2.txt) \
	  && $(BIN)/python -W ignore -c "import torch, detectron2._C" \
	  || { echo "error: $(UNREACHABLE)" >&2; exit 1; }
	touch $@

clean-install:
	rm -rf $(VENV)
