#!/usr/bin/env bash
# The GPU's share of the tests and benchmarks, on a bare CUDA machine: Python 3.12 with torch and numba, no network.
#
#   bash benchmarks/gpu.sh [sapiens|exemplar|metazoa] [OUTPUT_FOLDER]
#
# Takes the packages that the machine lacks from .wheels/packages.tar.xz (`make wheels`, on a machine with a network).
# It has four parts. Each is worth having alone, prints its figures as it goes, and is ended when its time is over. All
# of them fit 14 minutes:
#
#   touch      the tests of attention, engine and packing on the GPU, then equality with upstream's command   200 s
#   engine     our engine alone at the true shape of the model (tf_exemplar by default), with its kernels    160 s
#   upstream   upstream's inference beside ours, at a median of 1,800 genes                                  240 s
#   loop       from Census to array, three megabatches of 4,096 cells, with the device's idle share          220 s
#
# PARTS="engine loop" runs only these. Two more parts run only if they are named: `start`, how soon the first process of
# a node and the later ones compute; and `reference`, the reference workflow's loop beside ours, on 1,024 cells. LIMIT
# gives each part other seconds. Each part's output also goes to a file in OUTPUT_FOLDER.
#
# `DEVICE=cpu` rehearses every part in small on a machine without a GPU. There UPSTREAM names upstream's command, which
# has an environment of its own; without it, upstream is not measured.
set -uo pipefail
cd "$(dirname "$0")/.."
model=${1:-exemplar}
output=${2:-benchmarks/results}
device=${DEVICE:-cuda}
parts=${PARTS:-touch engine upstream loop}
mkdir -p "$output"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
# A part that is ended leaves its files here. Compiled kernels are shared by the parts.
export TMPDIR="$temporary" PYTHONUNBUFFERED=1 HYDRA_FULL_ERROR=1

packages=.wheels/unpacked
if [ -f .wheels/packages.tar.xz ] && [ ! "$packages" -nt .wheels/packages.tar.xz ]; then
    rm -rf "$packages" "$packages.partial"
    mkdir "$packages.partial"
    python3 -W ignore -m tarfile -e .wheels/packages.tar.xz "$packages.partial" || exit 1
    touch "$packages.partial"
    mv "$packages.partial" "$packages"
fi
export PYTHONPATH="$PWD/$packages:$PWD"
# Upstream's command, run by the same python: its pins do not matter where both use one torch.
mkdir "$temporary/bin"
printf '#!/bin/sh\nexec python3 -c "from transcriptformer.cli import main; main()" "$@"\n' >"$temporary/bin/transcriptformer"
printf '#!/bin/sh\nexec python3 "$@"\n' >"$temporary/bin/python"
chmod +x "$temporary/bin/"*
upstream=${UPSTREAM:-$temporary/bin/transcriptformer}

tests=tests/inference
if [ "$device" = cpu ]; then
    seconds=${LIMIT:-3600}
    engine=(--quick --medians 90) upstream_mix=(--quick --medians 90) loop=(--quick) start=(--quick) reference=(--quick)
    touch_tests=("$tests/test_packing.py" "$tests/test_engine.py::test_rows_of_any_kind_give_the_same")
else
    seconds=${LIMIT:-}
    engine=(--medians 1800 90 3500 --precisions fp16) upstream_mix=(--medians 1800 --precisions fp16)
    loop=(--cells 12288 --megabatches 3) reference=(--cells 1024 --megabatches 2) start=()
    touch_tests=("$tests"/test_{engine,attention,attention_choice,pooling,non_finite,packing,equality_built}.py)
fi
failed=0

# part NAME SECONDS COMMAND...: run a part, if it was asked for, for at most so many seconds.
part() {
    local name=$1 limit=${seconds:-$2} began=$SECONDS code=0
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    {
        echo "== $name, $model, $device, at most $limit s: $*"
        [ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        python3 -c "import sys, torch; print('python', sys.version.split()[0], 'torch', torch.__version__)"
        CENSUS_TF_TEST_DEVICE="$device" timeout --kill-after=10 "$limit" "$@" 2>&1 || code=$?
        echo "== $name ended after $((SECONDS - began)) s with $code$([ $code = 124 ] && echo ', its time was over')"
        [ "$code" = 0 ]
    } | tee "$output/${device/cuda/gpu}-$model-$name.txt" || failed=1
}

# A red test costs the run its success, not its measurements. Torch warns that TF32 is off: it is meant to be.
part touch 200 python3 -m pytest -v -p no:cacheprovider --basetemp="$temporary/tests" --upstream="$upstream" \
    -W "ignore:TensorFloat32" -W ignore::DeprecationWarning "${touch_tests[@]}"
part engine 160 python3 -m benchmarks.inference.engine --device "$device" --models "$model" --alone --profile --json \
    "${engine[@]}"
part upstream 240 python3 -m benchmarks.inference.engine --device "$device" --models "$model" --upstream "$upstream" \
    --json "${upstream_mix[@]}"
part loop 220 python3 -m benchmarks.pipeline.end_to_end --device "$device" --model "$model" --alone --json "${loop[@]}"
part start 240 python3 -m benchmarks.inference.start --device "$device" --json "${start[@]}"
part reference 600 python3 -m benchmarks.pipeline.end_to_end --device "$device" --model "$model" --upstream "$upstream" \
    --json "${reference[@]}"
exit "$failed"
