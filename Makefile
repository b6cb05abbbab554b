# make demo: fine-tune the embedded model and show the result.  make test: the tests.  make help: the rest.
PYTHON ?= python3
VENV := .venv
PY := "$(CURDIR)/$(VENV)/bin/python"
HERE := examples/stable_diffusion_v2
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
WORKERS := -n auto --maxprocesses 4 --dist worksteal
export GLOG_v ?= 3
RIGHT_PYTHON := import sys; v = sys.version_info[:2]; (3, 9) <= v <= (3, 12) or \
	sys.exit("error: MindSpore 2.8.0 wants Python 3.9 to 3.12, this is %d.%d: make PYTHON=python3.11 ..." % v)

.PHONY: help setup demo test ascend parity lint format bench clean

help:
	@echo "make setup   install what the scripts need, into .venv;  make clean: remove it"
	@echo "make demo    fine-tune the tiny model on OpenMoji and draw before and after"
	@echo "make test    all tests that need no PyTorch"
	@echo "make ascend  drawing and training as on Ascend, on stand-ins for its libraries"
	@echo "make parity  compare with diffusers and transformers (installs PyTorch)"
	@echo "make bench   the networks of the full SD 2 beside diffusers' (installs PyTorch)"
	@echo "make lint    ruff;  make format: rewrite the files as ruff wants them"

$(VENV)/run: $(HERE)/requirements.txt
	$(PY) -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c '$(RIGHT_PYTHON)' && $(PYTHON) -m venv --clear $(VENV); }
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
	$(PY) -m pytest $(WORKERS) -m "not ascend"

ascend: $(VENV)/dev
	$(PY) -m pytest $(WORKERS) -m ascend -rs

parity: $(VENV)/parity
	$(PY) -m pytest $(if $(FULL_SIZE),,$(WORKERS)) -m parity -rs

bench: $(VENV)/parity
	cd $(HERE) && $(PY) tools/benchmark.py

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
