#!/usr/bin/env bash
# The GPU's share of the tests and benchmarks, on a bare CUDA machine: Python 3.12 with torch and numba, no network.
#
#   bash benchmarks/gpu.sh [sapiens|exemplar|metazoa] [OUTPUT_FOLDER]
#
# Takes the packages that the machine lacks from .wheels/packages.tar.xz (`make wheels`, on a machine with a network).
# Runs the equality tests on the GPU, then the engine at the true shape of the model (tf_exemplar by default) beside
# upstream's, then, for the exemplar, the whole loop on 1,024 cells. Everything printed also goes to OUTPUT_FOLDER.
# PARTS="engine" and the like runs only a part, if you have the machine for too short a time.
# `DEVICE=cpu` rehearses it in small on a machine without a GPU (with torch 2.11, one test of compiling fails there).
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-exemplar}
output=${2:-benchmarks/results}
mkdir -p "$output"
device=${DEVICE:-cuda}
exec > >(tee "$output/${device/cuda/gpu}-$model.txt") 2>&1

parts=${PARTS:-tests engine end_to_end}
small=()
[ "$device" = cuda ] || small=(--quick)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
mkdir "$temporary/packages" "$temporary/bin"
if [ -f .wheels/packages.tar.xz ]; then
    python3 -W ignore -m tarfile -e .wheels/packages.tar.xz "$temporary/packages"
fi
export PYTHONPATH="$temporary/packages:$PWD" HYDRA_FULL_ERROR=1
# Upstream's command, run by the same python: its pins do not matter where both use one torch.
upstream_command="$temporary/bin/transcriptformer"
printf '#!/bin/sh\nexec python3 -c "from transcriptformer.cli import main; main()" "$@"\n' >"$upstream_command"
printf '#!/bin/sh\nexec python3 "$@"\n' >"$temporary/bin/python"
chmod +x "$temporary/bin/"*

[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c "import sys, torch; print('python', sys.version.split()[0], 'torch', torch.__version__)"
failed=0
if [ "$model" = exemplar ] && [[ $parts == *tests* ]]; then
    # A red test costs the run its success, not its measurements. Torch warns that TF32 is off: it is meant to be.
    CENSUS_TF_TEST_DEVICE="$device" python3 -m pytest -q -p no:cacheprovider --upstream="$upstream_command" \
        -W "ignore:TensorFloat32" -W ignore::DeprecationWarning \
        tests/inference/test_attention.py tests/inference/test_engine.py tests/inference/test_non_finite.py tests/inference/test_packing.py \
        tests/inference/test_equality_built.py || failed=1
fi
if [[ $parts == *engine* ]]; then
    python3 -m benchmarks.inference.engine --device "$device" --models "$model" --upstream "$upstream_command" --json "${small[@]}"
fi
if [ "$model" = exemplar ] && [[ $parts == *end_to_end* ]]; then
    python3 -m benchmarks.pipeline.end_to_end --device "$device" --upstream "$upstream_command" --json "${small[@]}"
fi
exit "$failed"
