"""Measure tokenizing: this project's tokenizer against upstream's dataset, on the same counts.

    python -m benchmarks.inference.tokens [--quick] [--json] [--upstream COMMAND]

Cells of median 1,800 expressed genes on axes of 20,000 and 60,000 genes, nine tenths of which are in the vocabulary.
Each has one thread and one process. Figures are CPU seconds, so other work on the machine counts little. Upstream gets
the counts in memory (reading its file is not timed) and is timed from there to its collated batches; ours is timed from
CSR to packed tokens. The program asserts gene by gene that both end with the same tokens and counts. Peak memory is
that of the process, with libraries and the counts themselves; ``before`` is its value when tokenizing began.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import (
    Upstream,
    arguments_parser,
    gene_ids,
    peak_gib,
    ratios,
    sample,
    spread,
    table,
    thread_environment,
    upstream_python,
)
from census_tf_dagster.census.cells import Cells
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS

AXES = (20_000, 60_000)
MEDIAN = 1800
OUR_REPEATS = 20
"""Calls that one of our rounds times, for one lasts milliseconds."""


def build(folder: Path, genes: int, cells: int) -> None:
    """Write the counts in both forms, and a checkpoint that knows nine genes of ten."""
    drawn = sample(cells, genes, MEDIAN)
    fields = {name: getattr(drawn.cells, name) for name in ("joinids", "indptr", "columns", "values")}
    np.savez(folder / "cells.npz", assays=np.array(drawn.cells.assays), **fields)
    drawn.adata.write_h5ad(folder / "cells.h5ad")
    known = [gene for i, gene in enumerate(gene_ids(genes)) if i % 10]
    sizes = {"embed_dim": 16, "num_heads": 1, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
    build_checkpoint(folder / "checkpoint", {"homo_sapiens": known}, KNOWN_ASSAYS, **sizes)


def ours(folder: Path, genes: int) -> dict[str, Any]:
    """Tokenize in this process; save the tokens as gene ids and counts, padded as upstream's are."""
    from census_tf_dagster.inference.checkpoint import read_checkpoint
    from census_tf_dagster.inference.tokens import Tokenizer

    with np.load(folder / "cells.npz") as found:
        assays = tuple(found["assays"].tolist())
        cells = Cells(found["joinids"], found["indptr"], found["columns"], found["values"], assays)
    tokenizer = Tokenizer.build(gene_ids(genes), read_checkpoint(folder / "checkpoint"))
    # Compiled code is loaded before the clock starts.
    tokenizer(Cells(cells.joinids[:1], cells.indptr[:2], cells.columns, cells.values, cells.assays[:1]))
    before = peak_gib()
    cpu, wall = time.process_time(), time.monotonic()
    for _ in range(OUR_REPEATS):
        packed = tokenizer(cells)
    cpu, wall = (time.process_time() - cpu) / OUR_REPEATS, (time.monotonic() - wall) / OUR_REPEATS
    after = peak_gib()

    name_of_row = np.array([b"", *(gene.encode() for gene in tokenizer.known_genes)])
    shape = (len(cells.assays), tokenizer.seq_len - 1)
    names, counts, assay_rows = np.full(shape, b"[PAD]", "S15"), np.zeros(shape, np.float32), np.zeros(shape[0], int)
    for cell in range(shape[0]):
        part = slice(packed.offsets[cell], packed.offsets[cell + 1])
        rows, bias = packed.tokens[part], packed.bias[part]
        if rows[0] != tokenizer.start_row:
            assay_rows[cell], rows, bias = rows[0], rows[1:], bias[1:]
        assert rows[0] == tokenizer.start_row
        genes_here = len(rows) - 1
        names[cell, :genes_here] = name_of_row[rows[1:] - tokenizer.start_row]
        counts[cell, :genes_here] = np.rint(np.expm1(bias[1:]))
    np.savez(folder / "ours.npz", genes=names, counts=counts, assays=assay_rows)
    return {"cpu_seconds": cpu, "seconds": wall, "peak_gib_before": before, "peak_gib": after}


def assert_identical(folder: Path) -> None:
    """Compare gene ids, counts and assays of both; upstream's last position is never an input of the model."""
    with np.load(folder / "ours.npz") as mine, np.load(folder / "upstream.npz") as other:
        np.testing.assert_array_equal(mine["genes"], other["genes"][:, :-1])
        np.testing.assert_array_equal(mine["counts"], other["counts"][:, :-1])
        np.testing.assert_array_equal(mine["assays"], other["assays"])


def measure(folder: Path, genes: int, rounds: int, upstream_path: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Measure both in turn, each round in fresh processes; assert that their arrays are identical."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "upstream": []}
    for _ in range(rounds):
        command = [sys.executable, "-m", "benchmarks.inference.tokens", "--step", str(folder), str(genes)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=thread_environment(1))
        found["ours"].append(json.loads(done.stdout.splitlines()[-1]))
        if upstream_path:
            with Upstream(upstream_path, threads=1) as upstream:
                places = {"checkpoint": str(folder / "checkpoint"), "cells": str(folder / "cells.h5ad")}
                found["upstream"].append(upstream.ask("tokens", **places, save=str(folder / "upstream.npz")))
            assert_identical(folder)
    return found


def main() -> None:
    """Build, measure in turn, print a table."""
    parser = arguments_parser(__doc__, quick="512 cells, one round")
    parser.add_argument("--step", nargs=2, help="(internal) folder and genes: measure ours")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(ours(Path(arguments.step[0]), int(arguments.step[1]))))
        return
    cells, rounds = (512, 1) if arguments.quick else (4096, 3)
    upstream_path = upstream_python(arguments.upstream)
    rows, answer = [], {}
    for genes in AXES:
        with tempfile.TemporaryDirectory() as place:
            build(Path(place), genes, cells)
            found = measure(Path(place), genes, rounds, upstream_path)
        rates = {who: [cells / one["cpu_seconds"] for one in each] for who, each in found.items() if each}
        for who, rate in rates.items():
            before, peak = (max(one[key] for one in found[who]) for key in ("peak_gib_before", "peak_gib"))
            rows.append([f"{genes:,} genes, {who}", spread(rate, 0), f"{before:.2f}", f"{peak:.2f}"])
        figures: dict[str, Any] = {"ours": float(np.median(rates["ours"])), "unit": "cells/CPU s", "rounds": found}
        if upstream_path:
            ratio = ratios(rates["ours"], rates["upstream"])
            rows.append([f"{genes:,} genes, ratio", spread(ratio, 0), "", ""])
            figures |= {"reference": float(np.median(rates["upstream"])), "ratio": float(np.median(ratio))}
        answer[str(genes)] = figures
    print(f"{cells} cells, median {MEDIAN} expressed genes, {rounds} rounds, interleaved, one thread each")
    table(["", "cells per CPU second", "GiB before", "GiB at peak"], rows)
    if upstream_path:
        print("tokens, counts and assays of all cells: identical")
    if arguments.json:
        largest = answer[str(AXES[-1])]
        print(json.dumps({**{key: largest[key] for key in largest if key != "rounds"}, "axes": answer}))


if __name__ == "__main__":
    main()
