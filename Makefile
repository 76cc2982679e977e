# make demo | make test | make test-all | make lint: each sets up .venv on a fresh machine, with
# tools/install.py, and then runs.
# DETECTRON2=<anything pip installs> (a wheel, a folder, a git URL) replaces Detectron2's own
# source.
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
INSTALL = @$(PYTHON) tools/install.py --venv "$(VENV)" $(if $(DETECTRON2),--source "$(DETECTRON2)")

ifeq ($(ENGINE),torchvision)
DEMO_NEEDS = --base
else ifeq ($(ENGINE),detectron2)
DEMO_NEEDS =
else ifeq ($(ENGINE),)
DEMO_NEEDS = --otherwise "the demo runs on torchvision's detectors"
else
DEMO_NEEDS = $(error ENGINE is '$(ENGINE)'; it can be detectron2 or torchvision)
endif

.PHONY: demo test test-all lint install clean-install

demo:
	$(INSTALL) $(DEMO_NEEDS)
	@$(BIN)/python tools/demo.py $(if $(ENGINE),--engine $(ENGINE))

# Without Detectron2 the tests that need none of it run; the last line counts the others.
test:
	$(INSTALL) --otherwise "the tests that need it are left out"
	$(PYTEST) -m "not slow"

test-all:
	$(INSTALL)
	KD_DETECTRON_TEST_ALL=1 $(PYTEST)

lint:
	$(INSTALL) --base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install:
	$(INSTALL)

clean-install:
	rm -rf $(VENV)
