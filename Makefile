# make demo | make test | make test-all | make lint: each sets up .venv on a fresh machine and then runs.
# DETECTRON2=<anything pip installs> (a wheel, a folder, a git URL) replaces Detectron2's own source.
# make demo ENGINE=torchvision: the demo on torchvision's detectors, without Detectron2. It is also
# what make demo does where Detectron2 cannot be installed.

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?=
ENGINE ?=
BIN := $(VENV)/bin
# Processes that share the tests; each computes with one thread.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SOURCE := $(or $(DETECTRON2),its own repository (requirements-detectron2.txt))
CHECK_SOURCE = $(PYTHON) tools/check_source.py "$(or $(DETECTRON2),requirements-detectron2.txt)"
UNREACHABLE := Detectron2 could not be installed from $(SOURCE); name another source: make ... DETECTRON2=<wheel, folder or git URL>

.PHONY: demo test test-all lint install clean-install

demo:
	@engine="$(ENGINE)"; \
	if [ -z "$$engine" ]; then \
	  engine=detectron2; \
	  if [ ! -f $(VENV)/.installed ] && ! $(CHECK_SOURCE); then \
	    echo "Detectron2 cannot be reached at $(SOURCE), so the demo runs on torchvision's detectors"; \
	    engine=torchvision; \
	  elif ! $(MAKE) --no-print-directory $(VENV)/.installed; then \
	    echo "Detectron2 cannot be installed, so the demo runs on torchvision's detectors"; \
	    engine=torchvision; \
	  fi; \
	fi; \
	if [ "$$engine" = torchvision ]; then needed=.base; else needed=.installed; fi; \
	$(MAKE) --no-print-directory -s $(VENV)/$$needed \
	  && $(BIN)/python tools/demo.py --engine "$$engine"

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

# An unreachable source is noticed before the large downloads. Detectron2 is compiled against the
# installed torch, hence no build isolation.
$(VENV)/.installed: requirements.txt requirements-dev.txt requirements-detectron2.txt setup.py
	@$(CHECK_SOURCE) || { echo "error: $(UNREACHABLE)" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/.base
	@$(BIN)/pip install --no-build-isolation \
	  $(if $(DETECTRON2),"$(DETECTRON2)",-r requirements-detectron2.txt) \
	  && $(BIN)/python -W ignore -c "import torch, detectron2._C" \
	  || { echo "error: $(UNREACHABLE)" >&2; exit 1; }
	touch $@

clean-install:
	rm -rf $(VENV)
