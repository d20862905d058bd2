"""Measure what copying reused cells costs, in a shard whose datasets are in another order than in the earlier array.

    python -m benchmarks.pipeline.copying [--quick] [--json]

65,536 cells x 2,048 in megabatches of 16,384, bfloat16 storage, local disk. The first case keeps the cells of a dataset
together and changes the order of datasets (2,048 cells each). The second shuffles every cell, which is the worst case.
Each runs in a process of its own: three rounds, interleaved, median (least to most). The time in which the shard reads
back what it wrote is left out.
"""

import json
import multiprocessing
import tempfile
import time
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from benchmarks.common import arguments_parser, peak_gib, spread, table
from benchmarks.store.finalise import build, identity
from census_tf_dagster.census.plan import Megabatch, Source, plan_totals, read_plan, with_checksums, write_plan
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.copy_shard import CopySummary, copy_shard
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.verification import Committed, coverage, verify_shard

FEATURES, MEGABATCH = 2048, 16_384
ORDERS = {"datasets of 2,048 cells": 2048, "every cell by itself": 1}


def build_earlier(place: str, cells: int) -> None:
    """Write and verify the array that is copied from."""
    build(place, cells, FEATURES, 1, MEGABATCH)
    storage, folder = Storage(), ReleaseFolder.of(place, "s", "r", identity(FEATURES))
    array = EmbeddingsArray.open(folder.array, storage, identity(FEATURES))
    plan = read_plan(storage, folder.plan)
    assert not verify_shard(array, plan, folder, 0)
    covered = coverage(Committed.of(array).between(0, cells))
    array.write_record({"plan": plan.totals.plan, "covered": covered})


def copy(place: str, cells: int, together: int, round_: int) -> dict[str, float]:
    """Plan a release that reuses all cells, and copy them; return CPU and wall seconds, and this process's peak."""
    storage = Storage()
    earlier = ReleaseFolder.of(place, "s", "r", identity(FEATURES))
    folder = ReleaseFolder.of(place, "s", f"later-{together}-{round_}", identity(FEATURES))
    joinids = np.arange(cells, dtype=np.int64)
    groups = joinids.reshape(-1, together)
    sources = groups[np.random.default_rng(round_).permutation(len(groups))].ravel()
    batches = tuple(
        Megabatch(index, 0, first, first + MEGABATCH - 1, MEGABATCH, MEGABATCH * 1800, reused=True)
        for index, first in enumerate(range(0, cells, MEGABATCH))
    )
    source = Source("r", earlier.root, identity(FEATURES).digest)
    batches = with_checksums(batches, joinids, sources)
    totals = plan_totals(batches, 1, 0, source)
    write_plan(storage, folder.plan, joinids, batches, totals, sources)
    EmbeddingsArray.create(folder.array, storage, identity(FEATURES), cells)
    context = cast("ReleaseContext", SimpleNamespace(store=storage, folder=folder, identity=identity(FEATURES)))
    spent: list[float] = []

    def note(_: CopySummary) -> None:
        spent.append(time.process_time() - began)

    began = time.process_time()
    summary = copy_shard(context, 0, report=note)
    assert summary.cells_copied == cells
    return {"cpu": spent[-1], "wall": summary.seconds, "peak": peak_gib()}


def main() -> None:
    """Measure both orders, print a table."""
    arguments = arguments_parser(__doc__, quick="16,384 cells").parse_args()
    cells = MEGABATCH if arguments.quick else 4 * MEGABATCH
    spawn = multiprocessing.get_context("spawn")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ORDERS}
    with tempfile.TemporaryDirectory() as place:
        with spawn.Pool(1) as pool:
            pool.apply(build_earlier, (place, cells))
        for round_, (name, together) in product(range(3), ORDERS.items()):
            with spawn.Pool(1) as pool:
                rounds[name].append(pool.apply(copy, (place, cells, together, round_)))
    rows: list[list[str]] = []
    answers: list[dict[str, Any]] = []
    for name, found in rounds.items():
        rates = [cells / one["cpu"] for one in found]
        figures = {what: [one[what] for one in found] for what in ("wall", "peak")}
        answers.append({"order": name, "cells_per_cpu_second": rates, **figures})
        rows.append([name, spread(rates, 0), *(spread(values, 2) for values in figures.values())])
    table([f"{cells:,} cells", "cells per CPU s", "wall s", "peak GiB"], rows)
    if arguments.json:
        ours, reference = (float(np.median(one["cells_per_cpu_second"])) for one in answers)
        unit = "cells per CPU s"
        print(
            json.dumps({"ours": ours, "reference": reference, "ratio": ours / reference, "unit": unit, "rows": answers})
        )


if __name__ == "__main__":
    main()
