"""Measure the peak memory of one shard run against the number of cells in the shard.

    python -m benchmarks.pipeline.memory [--quick] [--json]

Each size runs in a process of its own, with another for the device, whose peak is added. The cells come from a
synthetic Census of 60,000 genes, median 1,800 expressed, in megabatches of 1,024 cells. The model is one small layer at
the full window of 2,047 (its memory could not grow with cells).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import children_peak_gib, peak_gib

GENES = 60_000
MEGABATCH = 1024
RELEASE = "2025-11-08"


def build(folder: Path, cells: int) -> None:
    """Build a Census of so many cells, and once the checkpoint."""
    from census_tf_dagster.demo.census import build_census
    from census_tf_dagster.demo.checkpoint import build_checkpoint
    from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism

    organism = synthetic_organism("homo_sapiens", "Homo sapiens", cells, GENES, "ENSG", seed=1)
    build_census(str(folder / str(cells) / RELEASE), RELEASE, [organism])
    if not (folder / "checkpoint").exists():
        genes = organism.genes["feature_id"].tolist()[:20_000]
        sizes = {"embed_dim": 16, "num_heads": 1, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
        build_checkpoint(folder / "checkpoint", {"homo_sapiens": genes}, KNOWN_ASSAYS, **sizes)


def run(folder: Path, cells: int) -> dict[str, float]:
    """Run the only shard of that Census; return seconds and this process's peak memory."""
    from census_tf_dagster.config.settings import SetSettings
    from census_tf_dagster.orchestration.asset_support import release_context
    from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
    from census_tf_dagster.pipeline.embed_shard import embed_shard
    from census_tf_dagster.pipeline.plan_release import make_plan

    settings = SetSettings(
        name=f"cells_{cells}",
        organism="homo_sapiens",
        checkpoint=str(folder / "checkpoint"),
        shards=1,
        megabatch_size=MEGABATCH,
        compute_precision="fp32",
        device="cpu",
    )
    census = CensusResource(location=str(folder / str(cells) / "{release}"))
    store = StoreResource(location=str(folder / "store"))
    with release_context(settings, RELEASE, census, store) as context:
        make_plan(context)
        started = time.monotonic()
        device: list[float] = []
        summary = embed_shard(context, 0, report=lambda _: device.append(children_peak_gib()))
    return {
        "cells": summary.cells,
        "seconds": time.monotonic() - started,
        "shard_gib": peak_gib(),
        "device_gib": device[-1],
        "peak_gib": peak_gib() + device[-1],
    }


def main() -> None:
    """Build, run each size in its own process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 against 2,000 cells")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder, cells = arguments.step[0], Path(arguments.step[1]), int(arguments.step[2])
        if step == "build":
            build(folder, cells)
        else:
            print(json.dumps(run(folder, cells)))
        return
    sizes = (500, 2000) if arguments.quick else (4000, 40_000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cells in sizes:
            for step in ("build", "run"):
                command = [sys.executable, "-m", "benchmarks.pipeline.memory", "--step", step, folder, str(cells)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(" cells  seconds  shard's process  device's process  sum of the peaks, GiB")
    for row in rows:
        figures = f"{row['shard_gib']:>16.2f} {row['device_gib']:>17.2f} {row['peak_gib']:>17.2f}"
        print(f"{row['cells']:>6} {row['seconds']:>8.0f} {figures}")
    print(f"ratio of peaks: {rows[1]['peak_gib'] / rows[0]['peak_gib']:.3f}")
    if arguments.json:
        ours, reference = rows[1]["peak_gib"], rows[0]["peak_gib"]
        print(
            json.dumps({"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "GiB", "rows": rows})
        )


if __name__ == "__main__":
    main()
