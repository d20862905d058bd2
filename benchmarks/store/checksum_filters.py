"""Measure what TileDB's checksum filters cost to write and to read an array, without all other work of a shard.

    python -m benchmarks.store.checksum_filters [--quick] [--json]

One thread, interleaved in random order, CPU seconds of the process. The least of many rounds is what the work takes
when nothing disturbs it; medians of this noisy machine differ by more than what is measured.
"""

import json
import random
import tempfile
import time
from unittest import mock

import numpy as np
import tiledbsoma

from benchmarks.common import arguments_parser, array_identity, table
from census_tf_dagster.io import storage as storage_module
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store import array as array_module
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16

FEATURES = 2048
ONE_THREAD = {"sm.compute_concurrency_level": "1", "sm.io_concurrency_level": "1"}
FILTERS = {"none": "NoOpFilter", "MD5": "ChecksumMD5Filter", "SHA-256": "ChecksumSHA256Filter"}


def work(filter_type: str, values: np.ndarray) -> tuple[float, float]:
    """Write values with a filter and read them; return the microseconds of CPU a cell of both."""
    ids = np.arange(len(values), dtype=np.int64)
    identity = array_identity("bfloat16", FEATURES)
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(array_module, "_SHA256", {"_type": filter_type}),
        mock.patch.object(storage_module, "MANY_AT_ONCE", ONE_THREAD),
    ):
        array = EmbeddingsArray.create(f"{place}/array", Storage(), identity, len(values))
        began = time.process_time()
        with array.writing() as write:
            write(ids, values)
        written = time.process_time()
        context = tiledbsoma.SOMATileDBContext(tiledb_config={**ONE_THREAD})
        with tiledbsoma.SparseNDArray.open(array.uri, context=context) as stored:
            for _ in stored.read().tables():
                pass
        return (written - began) * 1e6 / len(values), (time.process_time() - written) * 1e6 / len(values)


def main() -> None:
    """Measure the filters in turn, print a table."""
    arguments = arguments_parser(__doc__, quick="64 cells, 2 rounds").parse_args()
    cells, rounds = (64, 2) if arguments.quick else (2048, 32)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=FEATURES)
    values = round_to_bfloat16((shared + 0.3 * rng.normal(size=(cells, FEATURES))).astype(np.float32))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FILTERS}
    for _ in range(rounds):
        for name in random.sample(list(FILTERS), len(FILTERS)):
            found[name].append(work(FILTERS[name], values))
    print(f"{cells:,} cells, {FEATURES:,} features, {rounds} rounds, one thread; microseconds of CPU a cell")
    least = {name: np.min(times, axis=0) for name, times in found.items()}
    median = {name: np.median(times, axis=0) for name, times in found.items()}
    more = {name: least[name].sum() - least["none"].sum() for name in FILTERS}
    rows = [
        [name, *(f"{kind[name][way]:.1f}" for kind in (least, median) for way in (0, 1)), f"{more[name]:.1f}"]
        for name in FILTERS
    ]
    table(["", "write, least", "read, least", "write, median", "read, median", "more than none, least"], rows)
    if arguments.json:
        ours, reference = (float(least[name].sum()) for name in ("SHA-256", "none"))
        print(
            json.dumps(
                {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "us", "rows": found},
            )
        )


if __name__ == "__main__":
    main()
