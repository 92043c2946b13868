#!/usr/bin/env bash
# What a GPU box runs: install with CUDA and TensorRT, the tests that need a GPU, then engines,
# parity, 1,024 pictures and timings of the three presets. Writes FOLDER/report.json and
# report.md; the exit code is 0 only when everything passed.
#
#   bash ci/gpu.sh [FOLDER]
#
# TENSORRT names the package (default: tensorrt, whose installer takes NVIDIA's wheels for the
# newest CUDA); for an older driver: TENSORRT=tensorrt-cu12.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-report}
python=${PYTHON:-python3}

command -v nvidia-smi >/dev/null || { echo "error: no nvidia-smi here; this needs a GPU" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

"$python" -m venv .venv-gpu
# The wheel of torch that pip takes on Linux has CUDA; below it is asked whether it sees the GPU.
.venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
.venv-gpu/bin/python -m pip install --quiet "${TENSORRT:-tensorrt}"
.venv-gpu/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  { echo "error: torch sees no CUDA device; install a build for this driver" >&2; exit 1; }

status=0
.venv-gpu/bin/lutdeploy doctor || status=1
.venv-gpu/bin/python -m pytest -m gpu tests || status=1
.venv-gpu/bin/python -m benchmarks.gpu --out "$out" || status=1
exit $status
