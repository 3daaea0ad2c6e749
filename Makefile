# `make` lists the targets. Every target creates .venv first, and again when pyproject.toml has changed.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEXT ?=
OUTPUT ?= runs/demo$(if $(TEXT),-$(shell basename -- "$(TEXT)"))

.DEFAULT_GOAL := help
.PHONY: help setup demo tokenizer pretrain sft rl chat serve speedrun test test-slow test-torch211 test-gpu bench-gpu gpu-wheels lint types format bench bench-lowering bench-rollouts loss-compare clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# An installed torch of a supported version is used, with the packages beside it (GPU images have their own); otherwise
# pip installs one.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lmchat needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version); run make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import importlib.metadata as m; t = m.distribution("torch"); v = tuple(map(int, t.version.split(".")[:2])); print(t.locate_file("") if (2, 11) <= v < (2, 14) else "")' \
	  2>/dev/null > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_parent.pth" || true
	@$(BIN)/python -m pip install -q -e ".[dev,plot,serve$$(command -v nvidia-smi > /dev/null && echo ,gpu)]" || { echo "The installation failed; the message above says why"; exit 1; }
	@touch $@

setup: $(INSTALLED)  ## make the virtual environment and install lmchat into it

demo: $(INSTALLED)  ## train and try a small model on this machine's own text, offline (TEXT=folder for yours, OUTPUT=folder for results)
	@$(BIN)/lmchat demo --output "$(OUTPUT)" $(if $(TEXT),--text "$(TEXT)")

# The full pipeline, for 8 GPUs. Smaller: make speedrun DEPTH=12 SHARDS=24. Other variables: BASE (folder), DEVICES, TEXT
# (folder of text, instead of the download), VOCAB_SIZE; PRETRAIN, SFT, RL (configs).
PIPELINE := LMCHAT=$(BIN)/lmchat scripts/pipeline.sh
export BASE TEXT DEPTH SHARDS DEVICES VOCAB_SIZE PRETRAIN SFT RL

tokenizer: $(INSTALLED)  ## download text and train a tokenizer on it (DEPTH=26, BASE=folder, DEVICES=auto, SHARDS=160)
	@$(PIPELINE) tokenizer

pretrain: tokenizer  ## pretrain, and what comes before; finished stages are skipped, interrupted ones resume
	@$(PIPELINE) pretrain

sft: pretrain  ## fine-tune, after the stages before it
	@$(PIPELINE) sft

rl: sft  ## reinforcement learning, after the stages before it
	@$(PIPELINE) rl

speedrun: rl  ## the whole pipeline, d26 on 8 GPUs
	@echo "Finished. Talk to it: make chat$(if $(BASE), BASE=$(BASE))"

chat: $(INSTALLED)  ## chat with the model of the latest finished stage
	@$(if $(BASE),LMCHAT_BASE_DIR="$(BASE)") $(BIN)/lmchat chat

serve: $(INSTALLED)  ## chat page and API of that model, on this machine only (PORT=8000)
	@$(if $(BASE),LMCHAT_BASE_DIR="$(BASE)") $(BIN)/lmchat serve $(if $(PORT),--port $(PORT))

# One worker per core, at most 8, since each imports torch. One process: make test WORKERS=0.
WORKERS ?= logical
test: $(INSTALLED)  ## run the tests in parallel (minutes on two cores; WORKERS=2)
	@$(BIN)/python -m pytest -m 'not slow and not gpu' -n $(WORKERS) --maxprocesses 8 --dist worksteal

test-slow: $(INSTALLED)  ## run the long tests
	@$(BIN)/python -m pytest -m slow

# The suite on the oldest torch that is supported; PyPI's wheel brings CUDA's libraries, 7 GB in all.
TORCH211 := .venv-torch211
$(TORCH211)/.installed: pyproject.toml
	@test -x $(TORCH211)/bin/python || $(PYTHON) -m venv $(TORCH211)
	@$(TORCH211)/bin/python -m pip install -q 'torch==2.11.*' -e '.[dev,plot,serve]'
	@touch $@

test-torch211: $(TORCH211)/.installed  ## run the tests on torch 2.11, in an environment of its own
	@$(TORCH211)/bin/python -m pytest -m 'not slow and not gpu' -n $(WORKERS) --maxprocesses 8 --dist worksteal

# On a GPU image without pip or a network: the image's own Python, and four packages that are carried to it, as the
# ignored folder benchmarks/wheels (25 MB). `make gpu-wheels` fills it where there is a network.
WHEELS := benchmarks/wheels
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
ON_GPU := PYTHONPATH=src:tests/helpers:$(WHEELS)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON)

gpu-wheels:  ## download what a stock torch image lacks, to carry it along
	@$(PYTHON) -m pip download -q --no-deps -d $(WHEELS) jsonargparse docstring_parser typeshed_client torchao
	@for wheel in $(WHEELS)/*.whl; do $(PYTHON) -m zipfile -e $$wheel $(WHEELS) && rm $$wheel; done

test-gpu:  ## run the GPU tests on one card
	@$(ON_GPU) -m pytest -o addopts=--import-mode=importlib -q -m gpu tests/test_gpu.py

bench-gpu:  ## measure on one card, 8 minutes: table and JSON in runs/gpu (TOY=--toy rehearses on a CPU)
	@$(ON_GPU) benchmarks/gpu_run.py $(TOY)

lint: $(INSTALLED)  ## check style
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: $(INSTALLED)  ## check types
	@$(BIN)/python -m mypy

format: $(INSTALLED)  ## format the code
	@$(BIN)/python -m ruff format . && $(BIN)/python -m ruff check --fix .

bench: $(INSTALLED)  ## measure the CPU benchmarks, as ratios within one run
	@for file in benchmarks/*.py; do case $$file in *gpu*|*rollouts*|*lowering*|*loss_compare*) ;; *) echo "== $$file"; $(BIN)/python $$file || exit 1;; esac; done

bench-lowering: $(TORCH211)/.installed  ## count the memory traffic of a training step on an H100, without one (DEPTH=12, ROWS=32)
	@$(TORCH211)/bin/python benchmarks/lowering.py $(if $(DEPTH),--depth $(DEPTH)) $(if $(ROWS),--rows $(ROWS))

bench-rollouts:  ## measure sampling on one card, under 5 minutes (TOY=--toy rehearses on a CPU)
	@$(ON_GPU) benchmarks/rollouts.py $(TOY)

loss-compare: $(INSTALLED)  ## check that a refactor leaves the losses of revisions A and B identical (A=rev B=rev)
	@$(BIN)/python benchmarks/loss_compare.py $(A) $(B)

clean:  ## remove the virtual environment, caches and demo runs
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache
