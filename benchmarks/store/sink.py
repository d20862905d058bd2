"""Measure committing embeddings: this project's write against the reference workflow's, on the same values.

    python -m benchmarks.store.sink [--quick] [--json]

The reference workflow (tools/models/transcriptformer in chanzuckerberg/cellxgene-census) writes a COO tensor of a scipy
matrix into an array with tiledbsoma's default filters. Interleaved, one thread each. Values are normal around a mean
that all cells share, as embeddings are. Figures are CPU seconds of the process, so other work on the machine counts
little.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import array_identity
from benchmarks.reference_workflow import create_array, write_coo
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16

FEATURES = 2048


def reference_workflow(uri: str, joinids: np.ndarray, values: np.ndarray) -> None:
    """Create and write an array as the reference workflow does."""
    create_array(uri, FEATURES)
    write_coo(uri, joinids, values)


def folder_bytes(folder: str) -> int:
    """Return the size of an array's fragments."""
    return sum(file.stat().st_size for file in (Path(folder) / "__fragments").rglob("*") if file.is_file())


def main() -> None:
    """Write in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 cells, 2 rounds")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    arguments = parser.parse_args()
    cells, rounds = (512, 2) if arguments.quick else (4096, 5)
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 1, FEATURES)
    values = (mean + 0.3 * rng.normal(0, 1, (cells, FEATURES))).astype(np.float32)
    joinids = np.arange(cells, dtype=np.int64)
    storage = Storage()
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:

        def ours(name: str) -> Callable[[str], None]:
            def write(uri: str) -> None:
                identity = array_identity(name, FEATURES)
                array = EmbeddingsArray.create(uri, storage, identity, cells)
                array.write(joinids, round_to_bfloat16(values) if name == "bfloat16" else values)

            return write

        ways: dict[str, Callable[[str], None]] = {
            "ours, bfloat16": ours("bfloat16"),
            "ours, float32": ours("float32"),
            "reference workflow, float32": lambda uri: reference_workflow(uri, joinids, values),
        }
        for number in range(rounds):
            for name, write in ways.items():
                uri = f"{place}/{number}-{name.replace(', ', '-')}"
                started = time.process_time()
                write(uri)
                seconds = time.process_time() - started
                row = rows.setdefault(name, {"cells_per_cpu_second": [], "bytes_per_cell": []})
                row["cells_per_cpu_second"].append(cells / seconds)
                row["bytes_per_cell"].append(folder_bytes(uri) / cells)
    print(f"{cells} cells x {FEATURES}, {rounds} rounds, interleaved")
    print(f"{'':<22} cells per CPU second (median, min to max)   bytes a cell   bytes a value")
    for name, row in rows.items():
        rate, size = row["cells_per_cpu_second"], np.median(row["bytes_per_cell"])
        figures = f"{np.median(rate):>8.0f} {min(rate):>8.0f} {max(rate):>8.0f}"
        print(f"{name:<22} {figures} {size:>27.0f} {size / FEATURES:>15.2f}")
    if arguments.json:
        ours_rate, reference = (
            float(np.median(rows[name]["cells_per_cpu_second"]))
            for name in ("ours, bfloat16", "reference workflow, float32")
        )
        answer = {"ours": ours_rate, "reference": reference, "ratio": ours_rate / reference, "unit": "cells/CPU s"}
        print(json.dumps({**answer, "rows": rows}))


if __name__ == "__main__":
    main()
