"""Measure what verifying an array costs: reading a shard back, the last asset, and reading everything again.

    python -m benchmarks.store.finalise [--quick] [--json]

The last asset uses the shards' verifications. The arrays are 100,000 cells x 2,048 in megabatches of 16,384, and an
array of 5,000 fragments; local disk, bfloat16 storage. Each step runs in a process of its own, so that its peak memory
is its own: three rounds, median (least to most).
"""

import json
import multiprocessing
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments_parser, peak_gib, spread, table
from census_tf_dagster.census.division import divide
from census_tf_dagster.census.plan import plan_totals, read_plan, with_checksums, write_plan
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.verification import verify_release, verify_shard

HUMAN_CELLS = 162_025_130
"""Human cells of the 2025-11-08 release."""
STEPS = ("shards read back", "last asset, from verifications", "everything again")


def identity(features: int) -> Identity:
    return Identity("s3://x", "d", "o", None, 1, "census", "g", "c", "fp32", "bfloat16", features)


def build(place: str, cells: int, features: int, shards: int, megabatch: int) -> None:
    """Plan and write an array."""
    storage = Storage()
    folder = ReleaseFolder.of(place, "s", "r", identity(features))
    joinids = np.arange(cells, dtype=np.int64)
    batches = divide(joinids, np.full(cells, 1800, np.int32), shards, megabatch).megabatches
    batches = with_checksums(batches, joinids)
    write_plan(storage, folder.plan, joinids, batches, plan_totals(batches, shards, 0))
    array = EmbeddingsArray.create(folder.array, storage, identity(features), cells)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=features).astype(np.float32)
    with array.writing() as write:
        for batch in batches:
            values = mean + rng.normal(size=(batch.cells, features)).astype(np.float32) / 4
            write(joinids[batch.first : batch.last + 1], round_to_bfloat16(values))


def step(place: str, features: int, what: str) -> dict[str, float]:
    """Do one step; return CPU and wall seconds and peak memory of this process."""
    storage = Storage()
    folder = ReleaseFolder.of(place, "s", "r", identity(features))
    plan = read_plan(storage, folder.plan)
    array = EmbeddingsArray.open(folder.array, storage, identity(features))
    cpu, wall = time.process_time(), time.perf_counter()
    if what == "shards read back":
        assert not any(verify_shard(array, plan, folder, shard) for shard in range(plan.totals.shards))
    else:
        assert not verify_release(array, plan, folder, full=what == "everything again").problems
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": peak_gib()}


def main() -> None:
    """Measure both arrays, print a table."""
    arguments = arguments_parser(__doc__, quick="10,000 cells and 200 fragments").parse_args()
    cells, fragments = (10_000, 200) if arguments.quick else (100_000, 5_000)
    arrays = [(f"{cells:,} x 2,048", cells, 2048, 4, 16384), (f"{fragments:,} fragments", fragments * 20, 8, 96, 20)]
    rows: list[list[str]] = []
    answers: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    for array, count, features, shards, megabatch in arrays:
        with tempfile.TemporaryDirectory() as place:
            build(place, count, features, shards, megabatch)
            size = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
            rounds: dict[str, list[dict[str, float]]] = {what: [] for what in STEPS}
            for _, what in product(range(3), STEPS):
                with spawn.Pool(1) as pool:
                    rounds[what].append(pool.apply(step, (place, features, what)))
            for what, found in rounds.items():
                figures = {name: [one[name] for one in found] for name in ("cpu", "wall", "peak")}
                answers.append({"array": array, "step": what, "bytes": size, **figures})
                per_million = spread([cpu / count * 1e6 for cpu in figures["cpu"]], 0) if features == 2048 else ""
                rows.append([f"{array}: {what}", *(spread(values, 2) for values in figures.values()), per_million])
    table(["", "CPU s", "wall s", "peak GiB", "CPU s a million cells"], rows)
    if arguments.json:
        ours, reference = (float(np.median(answers[of]["cpu"])) for of in (1, 2))
        print(
            json.dumps(
                {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "CPU s", "rows": answers}
            )
        )


if __name__ == "__main__":
    main()
