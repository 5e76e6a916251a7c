# `make help` lists what there is.
PYTHON ?= python3
VENV ?= .venv
# Where pip looks besides its defaults. On a machine without a GPU: make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=
BIN := $(VENV)/bin
LOCKED := --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock"
# What `make test-lowest` runs, seen from tests/. transformers 5.6 lacks deepseek_v4 and inkling and cannot build llama4 and musicgen.
LOWEST := undo_core/attacks undo_core/checkpoints undo_core/cli/test_commands.py undo_core/io undo_core/models/test_models.py \
	undo_core/pipeline/test_pipeline.py undo_kernels/library undo_kernels/ops/test_checks.py undo_kernels/reference \
	-k 'not llama4 and not deepseek_v4 and not test_entries_that_the_model_drops and not test_a_model_that_transformers_cannot_make'
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing PyTorch and the other packages, then compiling the C++ kernels: some minutes.'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@$(BIN)/python -c 'import undo_kernels; why = undo_kernels.unavailable().get("cpu"); why and print(f"undo-core: NO C++ KERNELS: {why}; the reference backend is used")'
	@touch $@

install: $(INSTALLED)  ## create a virtual environment and install

demo: $(INSTALLED)  ## the whole method on arithmetic, on a CPU
	$(BIN)/undo run configs/arithmetic-cpu.yaml

test: $(INSTALLED)  ## all tests, file by file on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --benchmark-disable

test-matrix: $(INSTALLED)  ## a table: accuracy and the noise's bits by instruction set, dtype and threads; two minutes
	$(BIN)/python tests/matrix.py

test-variations: $(INSTALLED)  ## all tests of the kernels for each instruction set, number of threads and code path of the libraries; long
	$(BIN)/python tests/variations.py

test-arm: $(INSTALLED)  ## the C++ kernels for Arm in an emulator; needs a cross compiler and qemu, and says how to get them
	$(BIN)/python tests/arm.py

test-distributed: $(INSTALLED) $(VENV)/.installed-ray  ## long tests with several processes and with a Ray cluster on this machine
	$(BIN)/python -m pytest -m distributed_long --durations=40

test-aot: $(INSTALLED)  ## every form of the Triton kernels compiled for sm_90, the heaviest for other GPUs; needs none; 20 minutes
	UNDO_AOT=$(or $(UNDO_AOT),sm_90) $(BIN)/python -m pytest tests/undo_kernels/triton/test_aot.py

test-published: $(INSTALLED) $(VENV)/.installed-data  ## the published runs on two layers, in the true formats of their data; half an hour
	HF_DATASETS_OFFLINE=1 $(BIN)/python bench/published.py

test-trainers: $(INSTALLED) $(VENV)/.installed-bench  ## the examples in TRL's trainers, which `make test` skips where TRL is missing, and in the others
	$(BIN)/python -m pytest tests/examples/test_examples.py tests/bench/test_trainers.py

harden: $(INSTALLED)  ## faults, kills, hostile files, random calls and long runs in full; `make test` has a quick part; hours
	UNDO_HARDEN=$(or $(UNDO_HARDEN),1) $(BIN)/python -m pytest tests/harden -n logical --maxprocesses 4 --durations=40

bench: $(VENV)/.installed-bench  ## losses, noise and RMU beside the alternatives, about nine minutes; results in bench/results
	$(BIN)/python bench/bench_kl.py
	$(BIN)/python bench/bench_cross_entropy.py
	$(BIN)/python bench/bench_noise.py
	$(BIN)/python bench/bench_rmu.py --rounds 5
	$(BIN)/python bench/plot.py
	$(BIN)/python bench/processors.py

bench-all: $(VENV)/.installed-bench  ## every row, activations of trained models, and a whole training step; long, for a machine with memory
	$(BIN)/python bench/bench_kl.py --all
	$(BIN)/python bench/bench_kl.py --activations
	$(BIN)/python bench/bench_cross_entropy.py --all
	$(BIN)/python bench/bench_cross_entropy.py --activations
	$(BIN)/python bench/bench_noise.py --rounds 15
	$(BIN)/python bench/bench_rmu.py
	$(BIN)/python bench/bench_step.py
	$(BIN)/python bench/plot.py

bench-check: $(INSTALLED)  ## fails if the kernels need more work, memory or time than bench/baseline.json says
	$(BIN)/python bench/regressions.py

# What an extra of pyproject.toml lists, in the versions of constraints.txt, without building the extension again.
$(VENV)/.installed-%: $(INSTALLED)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$*'], sep='\n')" > $@.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -r $@.txt
	@touch $@

test-lowest: $(VENV)/.installed-supply  ## the tests of the pipeline, models and files with the lowest versions that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --quiet --extra test --resolution lowest-direct --python-version 3.11 --no-annotate -o build/lowest.txt
	$(BIN)/uv venv --quiet --allow-existing --python 3.11 build/lowest
	$(BIN)/uv pip install --quiet --python build/lowest -r build/lowest.txt
	$(BIN)/uv pip install --quiet --python build/lowest --no-deps --no-build-isolation .
	cd tests && ../build/lowest/bin/python -m pytest -c ../pyproject.toml --benchmark-disable $(LOWEST)

lock: $(VENV)/.installed-supply  ## requirements/*.txt from pyproject.toml and constraints.txt; LOCK=--upgrade takes newer versions
	$(BIN)/uv pip compile pyproject.toml $(LOCKED) $(LOCK) -c constraints.txt --all-extras -o requirements/all.txt
	$(BIN)/uv pip compile pyproject.toml $(LOCKED) $(LOCK) -c requirements/all.txt -o requirements/core.txt

licences: $(VENV)/.installed-supply  ## the licence of every locked package, in requirements/licences.md; fails if one is not allowed
	$(BIN)/python requirements/supply.py licences

sbom: $(VENV)/.installed-supply  ## a bill of materials of every locked package in CycloneDX's JSON, in dist/sbom.json
	PATH=$(BIN):$$PATH $(BIN)/python requirements/supply.py sbom dist/sbom.json

audit: $(VENV)/.installed-supply  ## known vulnerabilities of every locked package; asks PyPI, or AUDIT='-s osv'
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off $(AUDIT) -r requirements/all.txt

lint: $(VENV)/.installed-lint  ## check style and types of everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/cpp/*
	$(BIN)/shellcheck examples/slurm/*.sbatch
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text

format: $(VENV)/.installed-lint  ## fix style where tools can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/cpp/*

docs: $(VENV)/.installed-docs  ## the documentation as a site, in site/index.html; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html; with the search: $(PYTHON) -m http.server --directory site"

EMPTY := build/empty-venv
# The time that files of a release state: that of the last commit, so that another build of it has the same bytes.
dist: export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),315532800)
dist: $(VENV)/.installed-dist  ## sdist and wheel, tried in an empty environment without a compiler; TORCH=2.11.0 tries that torch
	rm -rf dist $(EMPTY)
	$(BIN)/python -m build --installer pip
	case "$$(uname)" in Linux) PATH=$(BIN):$$PATH auditwheel repair --exclude libgomp.so.1 -w dist dist/*-linux_*.whl && rm dist/*-linux_*.whl;; esac
	$(PYTHON) -m venv $(EMPTY)
	CC=false CXX=false $(EMPTY)/bin/python -m pip install --quiet $(PIP_ARGS) $(if $(TORCH),torch==$(TORCH),-c constraints.txt) dist/*.whl
	$(EMPTY)/bin/python tests/smoke.py
	rm -rf $(EMPTY)

clean:  ## remove the environment and built files
	rm -rf $(VENV) build dist site *.egg-info kernels/undo_kernels/*.so

.PHONY: help install demo test test-matrix test-variations test-arm test-distributed test-aot test-published test-trainers test-lowest harden bench bench-all bench-check lock licences sbom audit lint format docs dist clean
