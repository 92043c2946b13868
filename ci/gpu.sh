#!/usr/bin/env bash
# What a GPU box runs. In an environment of its own for each, at pinned versions: PyTorch with ONNX
# Runtime's CUDA provider, TensorRT 10, TensorRT 11, TensorRT for RTX. Each is installed, has
# `doctor` and the tests that need a GPU, and then build, parity, sample, bench and timings of the
# three presets (benchmarks/gpu.py). What fails is listed at the end and in FOLDER/failed.txt; the
# rest goes on, and the exit code is 0 only when everything passed.
#
#   bash ci/gpu.sh [FOLDER] [NAME…]       NAME: runtimes, tensorrt-10, tensorrt-11, tensorrt-rtx
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu-report}
names=("${@:2}")
[ ${#names[@]} -gt 0 ] || names=(runtimes tensorrt-10 tensorrt-11 tensorrt-rtx)

command -v nvidia-smi >/dev/null || { echo "error: no nvidia-smi here; this needs a GPU" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
mkdir -p "$out" || exit 1
: >"$out/failed.txt"

# Run a command of an environment; where it fails, say so and keep it for the end.
try() {
  local name=$1 what=$2
  shift 2
  "$@" && return 0
  echo "$name: $what failed" | tee -a "$out/failed.txt" >&2
  return 1
}

# What an environment holds, and the backends that must work in it.
describe() {
  case $1 in
    runtimes) packages=('.[dev]') backends=(torch onnxruntime) ;;
    tensorrt-10) packages=('.[dev,tensorrt]' tensorrt==10.16.1.11) backends=(tensorrt) ;;
    tensorrt-11) packages=('.[dev,tensorrt]' tensorrt==11.4.0.106) backends=(tensorrt) ;;
    tensorrt-rtx)
      packages=('.[dev,tensorrt-rtx]' tensorrt-rtx==1.7.1.116) backends=(tensorrt-rtx) ;;
    *) echo "error: no environment $1" >&2; return 1 ;;
  esac
}

for name in "${names[@]}"; do describe "$name" || exit 2; done
for name in "${names[@]}"; do
  describe "$name"
  echo "== $name"
  environment=.venv-gpu/$name
  python=$environment/bin/python
  try "$name" "making the environment" "${PYTHON:-python3}" -m venv "$environment" || continue
  if [[ " ${backends[*]} " == *" onnxruntime "* ]]; then
    # lutdeploy requires the build for CPUs, in whose place the one for GPUs goes.
    try "$name" "onnxruntime-gpu" bash -c "'$python' -m pip uninstall --yes onnxruntime &&
      '$python' -m pip install --quiet --no-deps --constraint constraints.txt onnxruntime-gpu" ||
      continue
  fi
  # The wheel of torch that pip takes on Linux has CUDA; below it is asked whether it sees the GPU.
  try "$name" "installation" "$python" -m pip install --quiet --constraint constraints.txt \
    --editable "${packages[@]}" || continue
  try "$name" "torch, which sees no CUDA device (a build for another driver?)," \
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || continue
  try "$name" "doctor" "$python" -m lutdeploy.cli doctor
  try "$name" "pytest -m gpu" "$python" -m pytest -m gpu tests
  words=()
  for backend in "${backends[@]}"; do words+=(--backend "$backend"); done
  try "$name" "benchmarks.gpu (see $out/$name/report.md)" \
    "$python" -m benchmarks.gpu "${words[@]}" --out "$out/$name"
done

if [ -s "$out/failed.txt" ]; then
  echo "failed:" >&2
  cat "$out/failed.txt" >&2
  exit 1
fi
echo "passed: ${names[*]}"
