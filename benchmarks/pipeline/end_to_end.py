"""Measure the way from a Census to an array: one shard run of ours against the reference workflow's loop.

    python -m benchmarks.pipeline.end_to_end [--quick] [--json] [--upstream COMMAND] [--device cuda]

The reference workflow runs as its users run it. Both embed the same cells of a synthetic Census of 60,000 genes, median
1,800 expressed. The vocabulary has the genes that are expressed most. The weights are random, in the model's shape
(tf_exemplar by default) on a GPU, an eighth as wide on a CPU. Each way is a process of its own, timed from its start to
its end, and all its processes may use all cores.

The stages are reported one by one, because a total alone would flatter us on a small model: a new process for each
megabatch and slow tokens cost the reference workflow the same whatever the model. Seconds are busy seconds. Stages may
overlap (the reference workflow reads and writes while it infers), so their sum may exceed the total.

The device's idle share counts from its first megabatch to its last, so it means little for fewer than three. `--alone
--cells 12288 --megabatches 3` measures it at a size that a GPU works on for a while. Each megabatch prints a line.

start-up   from starting a process to its first cell: imports, plan, array, vocabulary, weights
read       counts from the Census; for the reference workflow also writing its h5ad file
tokens     tokenizing; for upstream also reading the h5ad file; with few cells, ours is the loading of compiled code
compute    the model
write      into the array; for the reference workflow also its h5ad file of embeddings
other      reading back everything that was written (ours), the trainer around the model (upstream), ending processes
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiledbsoma
import torch

from benchmarks.common import (
    VOCABULARIES,
    Shape,
    arguments_parser,
    ratios,
    spread,
    table,
    thread_environment,
    upstream_python,
)
from benchmarks.reference_workflow import STAGES
from census_tf_dagster.config.settings import DEFAULT_COMPUTE_PRECISION
from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.synthetic import synthetic_organism

ORGANISM, LABEL, RELEASE = "homo_sapiens", "Homo sapiens", "2025-11-08"
GENES, MEDIAN = 60_000, 1800


def build(folder: Path, cells: int, shape: Shape) -> None:
    """Build Census and checkpoint."""
    drawn = synthetic_organism(ORGANISM, LABEL, cells, GENES, "ENSG", seed=1, median_genes=MEDIAN)
    build_census(str(folder / "census" / RELEASE), RELEASE, [drawn])
    expressed = np.argsort(-drawn.counts.getnnz(axis=0), kind="stable")[: min(shape.vocabulary, GENES)]
    known = [drawn.genes["feature_id"].iloc[gene] for gene in expressed]
    # Genes of other species, which no cell of this one has.
    shape.build(folder / "checkpoint", known + [f"OTHER{i}" for i in range(shape.vocabulary - len(known))])


def ours(request: dict[str, Any]) -> dict[str, Any]:
    """Plan and embed the only shard in this process; return busy seconds of each stage."""
    from census_tf_dagster.embedding_set import EmbeddingSet
    from census_tf_dagster.orchestration.asset_support import release_context
    from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
    from census_tf_dagster.pipeline.embed_shard import ShardSummary, embed_shard
    from census_tf_dagster.pipeline.plan_release import make_plan

    folder = Path(request["folder"])
    declared = EmbeddingSet(
        name="benchmark",
        organism=ORGANISM,
        checkpoint=request["checkpoint"],
        shards=1,
        megabatch_size=request["megabatch_size"],
        compute_precision="fp32" if request["device"] == "cpu" else DEFAULT_COMPUTE_PRECISION,
        device=request["device"],
    )
    census = CensusResource(location=str(Path(request["census"]).parent / "{release}"))
    store = StoreResource(location=str(folder / "store"), cache=str(folder / "cache"))

    def report(summary: ShardSummary) -> None:
        print(
            f"  megabatch {summary.megabatches_computed} of {summary.megabatches}: "
            f"{summary.cells_per_second():,.2f} cells/s, device idle {idle_share(summary):.3f}",
            flush=True,
        )

    with release_context(declared, RELEASE, census, store) as context:
        make_plan(context)
        seconds = {"start-up": time.monotonic() - request["started"]}
        summary = embed_shard(context, 0, report=report)
        seconds["start-up"] += summary.times.load
        seconds |= {stage: spent.busy for stage, spent in summary.times.stages.items()}
        seconds["other"] = summary.verification_seconds
        seconds["idle share"] = idle_share(summary)
        found = {
            **seconds,
            "cells": summary.cells,
            "token_count": summary.tokens_computed,
            "array": context.folder.array,
        }
    return {**found, "ended": time.monotonic()}


def idle_share(summary: Any) -> float:
    """Return the share of the time since its first megabatch in which the device waited."""
    compute = summary.times.stages["compute"]
    return float(compute.waiting / (compute.busy + compute.waiting))


def timed_run(command: list[str], request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one way as a process on a request; return its last line, and its wall time. Its other lines are shown."""
    folder.mkdir()
    path = folder / "request.json"
    started = time.monotonic()
    path.write_text(json.dumps({**request, "folder": str(folder), "started": started}))
    environment = thread_environment(len(os.sched_getaffinity(0)))
    with (folder / "errors").open("w+") as errors:
        last = ""
        with subprocess.Popen(
            [*command, str(path)], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line
                if not line.startswith("{"):
                    print(line, end="", flush=True)
        total = time.monotonic() - started
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command} failed:\n{errors.read()[-3000:]}")
    said = json.loads(last)
    # The end of a process takes time, too.
    said["other"] += started + total - said.pop("ended")
    return {**said, "total": total}


def read(uri: str, features: int) -> np.ndarray:
    """Read all embeddings, by joinid; NaN where a value is missing."""
    with tiledbsoma.open(uri) as array:
        found = array.read().tables().concat()
    rows = found["soma_dim_0"].to_numpy()
    values = np.full((rows.max() + 1, features), np.nan, np.float32)
    values[rows, found["soma_dim_1"].to_numpy()] = found["soma_data"].to_numpy()
    return values


def main() -> None:
    """Build, run both in turn, print a table."""
    parser = arguments_parser(__doc__, quick="on a CPU 9 cells, 1 of 12 layers")
    parser.add_argument("--model", choices=list(VOCABULARIES), default="exemplar")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", type=int, help="default 1,024 on a GPU, else 64")
    parser.add_argument("--megabatches", type=int, default=3)
    parser.add_argument("--layers", type=int, help="default 12")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--batch-size", type=int, help="upstream's; default 48 on a GPU as the reference workflow's, else 4"
    )
    parser.add_argument("--step", help="(internal) request: run ours")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(ours(json.loads(Path(arguments.step).read_text()))))
        return
    on_gpu = arguments.device == "cuda"
    small = arguments.quick and not on_gpu
    cells = arguments.cells or (9 if small else 1024 if on_gpu else 64)
    shape = Shape(arguments.model, 1 if on_gpu else 8, arguments.layers or (1 if small else 12))
    upstream_path = None if arguments.alone else upstream_python(arguments.upstream)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "reference workflow": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        begun = time.monotonic()
        build(folder, cells, shape)
        print(f"{cells:,} cells and the checkpoint: built in {time.monotonic() - begun:.1f} s")
        request = {"census": str(folder / "census" / RELEASE), "checkpoint": str(folder / "checkpoint")}
        settings: dict[str, Any] = {**request, "device": arguments.device, "organism": ORGANISM, "label": LABEL}
        settings |= {"megabatches": arguments.megabatches, "megabatch_size": -(-cells // arguments.megabatches)}
        settings |= {"batch_size": arguments.batch_size or (48 if on_gpu else 4), "features": shape.width}
        for number in range(arguments.rounds):
            command = [sys.executable, "-m", "benchmarks.pipeline.end_to_end", "--step"]
            found["ours"].append(timed_run(command, settings, folder / f"ours-{number}"))
            if upstream_path:
                settings["array"] = str(folder / f"array-{number}")
                command = [str(upstream_path), str(Path(__file__).parents[1] / "reference_workflow.py"), "loop"]
                found["reference workflow"].append(timed_run(command, settings, folder / f"reference-{number}"))
        difference = None
        if upstream_path:
            mine, other = read(found["ours"][-1]["array"], shape.width), read(settings["array"], shape.width)
            difference = float(np.linalg.norm(mine - other) / np.linalg.norm(other))
            assert difference < 0.02, f"the arrays differ by {difference}: not the same cells"
    ways = {way: rounds for way, rounds in found.items() if rounds}
    tokens = found["ours"][-1]["token_count"]
    for one in found["ours"]:
        del one["array"]
    print(
        f"{cells} cells, {tokens / cells:,.0f} tokens a cell, {GENES:,} genes, {arguments.megabatches} megabatches, "
        f"{arguments.rounds} rounds; {shape.name} {shape.width} wide, {shape.layers} layers, {arguments.device}"
    )
    rows = []
    for stage in (*STAGES, "total"):
        columns = [[one.get(stage, 0.0) for one in rounds] for rounds in ways.values()]
        if upstream_path:
            columns.append(ratios(columns[1], columns[0]))
        rows.append([stage, *(spread(values, 2) for values in columns)])
    table(["seconds", *ways, *(["ratio"] if upstream_path else [])], rows)
    idle = spread([one["idle share"] for one in found["ours"]], 3)
    print(f"our device's idle share, from its first megabatch to its last: {idle}")
    if difference is not None:
        print(f"the two arrays hold the same cells; relative RMS of the difference {difference:.1e} (ours is rounded)")
    if arguments.json:
        medians = {way: float(np.median([one["total"] for one in rounds])) for way, rounds in ways.items()}
        answer: dict[str, Any] = {"ours": medians["ours"], "unit": "s", "cells": cells, "rounds": found}
        if upstream_path:
            ratio = ratios(*([one["total"] for one in found[way]] for way in ("reference workflow", "ours")))
            answer |= {"reference": medians["reference workflow"], "ratio": float(np.median(ratio))}
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
