#!/usr/bin/env bash
# Tests, kernels, tiles, benchmarks, memory and the pipeline on a GPU machine without network; bench/gpu_suite.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" bench/gpu_suite.py "$@"
