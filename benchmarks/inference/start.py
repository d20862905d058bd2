"""Measure how soon a device process computes its first batch: the first one of a node, and those after it.

    python -m benchmarks.inference.start [--quick] [--json] [--device cuda]

Every process starts anew: it imports torch, loads the prepared checkpoint, compiles the forward pass for whole rows,
and embeds a few cells. All share a cache that is empty at first, as the device processes of a node do: the prepared
checkpoint and the compiled kernels are in it. The model has tf_exemplar's shape on a GPU; on a CPU it is an eighth as
wide, and the row is short, because FlexAttention is slow there. On a CPU the engine does not compile, so this program
makes it do so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Shape, sample, table

STARTS = 3
CELLS, MEDIAN = 4, 90


def start(folder: Path, device: str, shape: Shape) -> dict[str, Any]:
    """Load, compile and embed in this process; return seconds since torch was imported, and what the caches gave."""
    # `benchmarks.common` has imported torch.
    imported, cpu = time.monotonic(), time.process_time()
    import torch
    from torch._dynamo.utils import counters

    from census_tf_dagster.inference import model
    from census_tf_dagster.inference.engine import Engine
    from census_tf_dagster.inference.packing import assemble

    # A device process gets tokens from another one, so making them here does not count.
    counted, cpu_counted = time.monotonic(), time.process_time()
    from census_tf_dagster.inference.tokens import Tokenizer

    checkpoint, prepared = _prepared(folder, device)
    tokenizer = Tokenizer.build(shape.genes(), checkpoint)
    packed = tokenizer(sample(CELLS, shape.vocabulary, MEDIAN).cells)
    spent, cpu_spent = time.monotonic() - counted, time.process_time() - cpu_counted
    engine = Engine.load(prepared, tokenizer.known_genes, device)
    loaded = time.monotonic()
    if device == "cuda":
        engine.embed(packed)
    else:
        for name in ("block", "to_hidden"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
        engine.model.embed(assemble(packed, np.arange(CELLS)), 1024)
    ended = time.monotonic()
    return {
        "until loaded": loaded - imported - spent,
        "until the first batch": ended - imported - spent,
        "CPU until then": time.process_time() - cpu - cpu_spent,
        "compiled": counters["inductor"]["fxgraph_cache_miss"],
        "from the cache": counters["inductor"]["fxgraph_cache_hit"],
    }


def _prepared(folder: Path, device: str) -> Any:
    from census_tf_dagster.inference.checkpoint import read_checkpoint
    from census_tf_dagster.inference.checkpoint_cache import prepare

    checkpoint = read_checkpoint(folder / "checkpoint", cache=folder / "cache")
    return checkpoint, prepare(checkpoint, "fp16" if device == "cuda" else "fp32", folder / "cache")


def main() -> None:
    """Build and prepare a checkpoint, start processes one after the other, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 of 12 layers")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--step", help="(internal) folder")
    arguments = parser.parse_args()
    shape = Shape("exemplar", 1 if arguments.device == "cuda" else 8, 2 if arguments.quick else 12)
    if arguments.step:
        print(json.dumps(start(Path(arguments.step), arguments.device, shape)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        from census_tf_dagster.inference.checkpoint_cache import kernel_folders

        folder = Path(place)
        shape.build(folder / "checkpoint")
        _, prepared = _prepared(folder, arguments.device)
        command = [sys.executable, "-m", "benchmarks.inference.start", "--device", arguments.device, "--step", place]
        command += ["--quick"] if arguments.quick else []
        environment = {**os.environ, **kernel_folders(prepared)}
        for number in range(STARTS):
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"start {number + 1}: first batch {rows[-1]['until the first batch']:.2f} s after torch's import")
    print(f"exemplar {shape.width} wide, {shape.layers} layers, {arguments.device}; seconds, and numbers of graphs")
    names = list(rows[0])
    table(["", *names], [[f"start {n}", *(f"{row[name]:.4g}" for name in names)] for n, row in enumerate(rows, 1)])
    if arguments.json:
        print(json.dumps({"ours": rows[1]["until the first batch"], "unit": "s", "rows": rows}))


if __name__ == "__main__":
    main()
