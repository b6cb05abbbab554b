# make demo: fine-tune the embedded model and show the result.  make test: the tests.  make help: the rest.
PYTHON ?= python3
VENV := .venv
PY := $(CURDIR)/$(VENV)/bin/python
HERE := examples/stable_diffusion_v2
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
export GLOG_v ?= 3

.PHONY: help setup demo test parity lint format bench clean

help:
	@echo "make setup   install what the scripts need, into .venv;  make clean: remove it"
	@echo "make demo    fine-tune the tiny model on OpenMoji and draw before and after"
	@echo "make test    all tests that need no PyTorch"
	@echo "make parity  compare with diffusers and transformers (installs PyTorch)"
	@echo "make bench   the full SD 2 beside diffusers, its UNet and whole runs (installs PyTorch)"
	@echo "make lint    ruff;  make format: rewrite the files as ruff wants them"

$(VENV)/run: $(HERE)/requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r $(HERE)/requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/run $(HERE)/requirements-dev.txt
	$(PIP) -r $(HERE)/requirements-dev.txt
	touch $@

$(VENV)/parity: $(VENV)/dev $(HERE)/requirements-parity.txt
	$(PIP) -r $(HERE)/requirements-parity.txt
	touch $@

setup: $(VENV)/run

demo: $(VENV)/run
	cd $(HERE) && $(PY) tools/demo.py

test: $(VENV)/dev
	$(PY) -m pytest

parity: $(VENV)/parity
	$(PY) -m pytest -m parity -rs

bench: $(VENV)/parity
	cd $(HERE) && $(PY) tools/benchmark_unet.py
	cd $(HERE) && $(PY) tools/benchmark_sampling.py

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
