"""Measure how long it takes to find out how far a shard is: restart of a finished and of a half-done shard.

    python -m benchmarks.store.restart [--quick] [--json]

The plan has the real size (one shard of 1.7 million cells, megabatches of 16,384), and the array its real number of
fragments. There are 8 features a cell, because fragments are counted from metadata and their size does not matter.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from census_tf_dagster.census.division import divide
from census_tf_dagster.census.plan import plan_totals, read_plan, with_checksums, write_plan
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.verification import is_verified, verify_shard
from census_tf_dagster.store.write_notes import NoteWriter, Written, read_notes

FEATURES = 8


def timed(action: Callable[[], object], repeats: int = 5) -> list[float]:
    """Return the seconds of each repeat."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Write the array, time what a restart asks it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 cells")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    arguments = parser.parse_args()
    cells = 100_000 if arguments.quick else 1_700_000
    identity = Identity("s3://x", "d", "o", None, 1, "census", "g", "c", "fp32", "bfloat16", FEATURES)
    storage = Storage()
    with tempfile.TemporaryDirectory() as place:
        folder = ReleaseFolder.of(place, "s", "r", identity)
        joinids = np.arange(cells, dtype=np.int64)
        batches = with_checksums(divide(joinids, np.full(cells, 1800, np.int32), 1, 16384).megabatches, joinids)
        write_plan(storage, folder.plan, joinids, batches, plan_totals(batches, 1, 0))
        array = EmbeddingsArray.create(folder.array, storage, identity, cells)
        notes = NoteWriter(storage, folder, read_plan(storage, folder.plan), 0)
        rows: dict[str, list[float]] = {}

        def ask() -> int:
            plan = read_plan(storage, folder.plan)
            opened = EmbeddingsArray.open(folder.array, storage, identity)
            notes = read_notes(storage, folder, plan, [0])
            return len(missing_megabatches(opened, plan, plan.shard(0), notes))

        for number, batch in enumerate(batches):
            if number == len(batches) // 2:
                assert ask() == len(batches) - number
                rows["half-done: what is missing"] = timed(ask)
            values = np.ones((batch.cells, FEATURES), np.float32)
            ids = joinids[batch.first : batch.last + 1]
            notes.note(Written.of(batch, ids, values))
            array.write(ids, values)
        assert ask() == 0
        rows["finished: what is missing"] = timed(ask)
        plan = read_plan(storage, folder.plan)
        verify_shard(array, plan, folder, 0)
        assert is_verified(array, plan, folder, 0)
        rows["finished: is it verified"] = timed(lambda: is_verified(array, plan, folder, 0))
        size = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
    print(f"{cells:,} cells, {len(batches)} fragments, {size / 2**20:.0f} MiB")
    print(f"{'':<30} median s      min      max")
    for name, seconds in rows.items():
        print(f"{name:<30} {np.median(seconds):>8.3f} {min(seconds):>8.3f} {max(seconds):>8.3f}")
    if arguments.json:
        medians = {name: float(np.median(seconds)) for name, seconds in rows.items()}
        print(json.dumps({"unit": "s", "cells": cells, "fragments": len(batches), "medians": medians}))


if __name__ == "__main__":
    main()
