# make demo [MODEL=id-or-path] [ARGS=...]   generate with stock Transformers and with the patched model
# make test [ARGS=...]                      lint, types, tests; one closing line
# make smoke523                             one test per family on the Transformers before the cache was renamed
# make smoke517                             one test per family and the kernels on the oldest supported versions
# make newest                               one test per family on the newest releases, past our own upper bounds
# make environments                         what the others make the first time: with --jobs=2, side by side
# make record                               write down what kernels take that are new or changed, for both versions of Triton
#
# Each target makes its own virtual environment the first time. To use one you have, say where its
# interpreter is: `make test PYTHON=/path/to/python` (or PYTHON517= for smoke517); nothing but this
# project itself is then ever installed into it.

BASE_PYTHON ?= python3
MODEL ?=
ARGS ?=

VENV := .venv
VENV517 := .venv-517
VENVNEWEST := .venv-newest
TRANSFORMERS523 := .venv-transformers-523
INSTALL = -m pip install --quiet --disable-pip-version-check

# A CUDA build of torch pins its own Triton, so with a GPU both versions are left to pip.
PINNED_BY_GPU := $(if $(shell command -v nvidia-smi 2>/dev/null),torch|triton,none)

ifdef PYTHON
READY := existing
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

ifdef PYTHON517
READY517 :=
else
PYTHON517 := $(VENV517)/bin/python
READY517 := $(VENV517)/.installed
endif

.PHONY: demo test lint format smoke523 smoke517 newest record environments existing clean

demo: $(READY)
	@$(PYTHON) -u -m hf_fastattn.eval.demo $(MODEL) $(ARGS)

test: lint
	@$(PYTHON) tests/run.py $(ARGS)

lint: $(READY)
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m mypy --no-error-summary

format: $(READY)
	@$(PYTHON) -m ruff check --quiet --fix .
	@$(PYTHON) -m ruff format .

smoke523: $(READY) $(TRANSFORMERS523)/.installed
	@PYTHONPATH=$(TRANSFORMERS523) $(PYTHON) tests/run.py tests/patches/test_family_smoke.py

smoke517: $(READY517)
	@FASTATTN_TARGETS=few $(PYTHON517) tests/run.py tests/patches/test_family_smoke.py tests/loop/test_changes.py tests/tools tests/kernels/test_hashes.py tests/kernels/test_compile.py

newest:
	@rm -rf $(VENVNEWEST) && $(BASE_PYTHON) -m venv $(VENVNEWEST)
	@$(VENVNEWEST)/bin/python $(INSTALL) torch transformers triton accelerate peft safetensors packaging setuptools pytest hypothesis
	@$(VENVNEWEST)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	@$(VENVNEWEST)/bin/python tests/newest.py
	@$(VENVNEWEST)/bin/python tests/run.py tests/patches/test_family_smoke.py

environments: $(READY) $(READY517) $(TRANSFORMERS523)/.installed

record: $(READY) $(READY517)
	@$(PYTHON) -m tests.kernels.compile_record
	@FASTATTN_TARGETS=few $(PYTHON517) -m tests.kernels.compile_record

existing:
	@$(PYTHON) -c "import torch, transformers" || \
	  { echo "$(PYTHON) lacks torch or transformers; install them, or leave PYTHON= out"; exit 1; }
	@$(PYTHON) -c "import hf_fastattn" 2>/dev/null || $(PYTHON) $(INSTALL) --no-deps -e .

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (one to three minutes, once)"
	@test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	@grep -vE '^($(PINNED_BY_GPU))==' constraints.txt > $(VENV)/constraints.txt
	@$(VENV)/bin/python $(INSTALL) -c $(VENV)/constraints.txt torch setuptools
	@$(VENV)/bin/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@$(VENV)/bin/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e '.[trl]' || \
	  echo "TRL does not install here: the test that trains with it is skipped"
	@$(VENV)/bin/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e '.[serve]' || \
	  echo "what Transformers' server needs does not install here: the tests over HTTP are skipped"
	@$(VENV)/bin/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e '.[eval]' || \
	  echo "lm-evaluation-harness does not install here: the test of its example is skipped"
	@touch $@

$(VENV517)/.installed: pyproject.toml constraints-517.txt
	@echo "setting up $(VENV517) (one to three minutes, once)"
	@test -x $(VENV517)/bin/python || $(BASE_PYTHON) -m venv $(VENV517)
	@grep -vE '^($(PINNED_BY_GPU))==' constraints-517.txt > $(VENV517)/constraints.txt
	@$(VENV517)/bin/python $(INSTALL) -c $(VENV517)/constraints.txt torch setuptools pytest pytest-xdist hypothesis
	@$(VENV517)/bin/python $(INSTALL) -c $(VENV517)/constraints.txt --no-build-isolation -e .
	@touch $@

$(TRANSFORMERS523)/.installed: $(READY)
	@rm -rf $(TRANSFORMERS523)
	@$(PYTHON) $(INSTALL) --no-deps --target $(TRANSFORMERS523) transformers==5.23.0
	@touch $@

clean:
	rm -rf $(VENV) $(VENV517) $(VENVNEWEST) $(TRANSFORMERS523) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
