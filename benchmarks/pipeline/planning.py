"""Measure planning: time and peak memory, with and without an earlier release to reuse.

    python -m benchmarks.pipeline.planning [--quick] [--json] [--largest CELLS]

Three plans, each in a process of its own: 2 million cells against an earlier 1.8 million, 20 million against 18
million, and as many as the largest release (162 million) with nothing to reuse. The last runs once without `reuse` and
once with it (which writes its keys). A synthetic Census has obs with the columns that planning reads, in 1,000 datasets
over 60,000 genes, half of which each dataset has. A tenth of the earlier datasets is withdrawn, a tenth revised; the
rest stays, all in another order. X/raw has only the cells that planning looks at. The earlier array is empty, and
recorded as verified: planning reads nothing but its metadata. The program asserts how many cells are reused.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.common import arguments_parser, peak_gib, table

RELEASES = ("2025-01-30", "2025-11-08")
DATASETS = 1000
GENES = 60_000
ASSAYS = ("10x 3' v3", "10x 3' v2", "Smart-seq2", "assay of no vocabulary")
ALPHABET = np.frombuffer(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~", np.uint8
)


def datasets_of(release: int, *, alone: bool) -> list[tuple[int, int]]:
    """Return (number, version) of a release's datasets in their order."""
    if alone or release == 0:
        kept = [(number, 0) for number in range(DATASETS if alone else DATASETS * 9 // 10)]
    else:
        kept = [(number, int(number < 200)) for number in range(100, DATASETS + 100)]
    return [kept[i] for i in np.random.default_rng(release).permutation(len(kept))]


def build(folder: Path, release: int, each: int, *, alone: bool) -> None:
    """Write a Census of datasets with so many cells each."""
    import pandas as pd
    import tiledbsoma as soma

    from census_tf_dagster.demo import schema
    from census_tf_dagster.pipeline.plan_release import SAMPLED_CELLS

    chosen = datasets_of(release, alone=alone)
    cells = each * len(chosen)
    uri = str(folder / "census" / RELEASES[release])
    text = pa.dictionary(pa.int16(), pa.string())
    obs_schema = pa.schema(
        [
            ("soma_joinid", pa.int64()),
            ("dataset_id", text),
            ("assay", text),
            ("observation_joinid", pa.large_string()),
            ("is_primary_data", pa.bool_()),
            ("nnz", pa.int64()),
            ("raw_sum", pa.float64()),
        ]
    )
    names = [schema.stable_uuid("dataset", str(number)) for number in range(DATASETS + 100)]
    versions = [schema.stable_uuid("version", str(n), str(v)) for n, v in chosen]
    genes = np.random.default_rng(release + 7).permutation(GENES)
    with soma.Collection.create(uri) as root:
        with root.add_new_collection("census_info") as info:
            tables = {
                "summary": pd.DataFrame({"label": ["census_build_date"], "value": [RELEASES[release]]}),
                "datasets": pd.DataFrame({"dataset_id": [names[n] for n, _ in chosen], "dataset_version_id": versions}),
            }
            for name, frame in tables.items():
                content = pa.Table.from_pandas(frame.assign(soma_joinid=np.arange(len(frame))), preserve_index=False)
                created = info.add_new_dataframe(
                    name, schema=content.schema, index_column_names=["soma_joinid"], domain=[(0, len(frame) - 1)]
                )
                created.write(content)
        with root.add_new_collection("census_data") as data:
            experiment = data.add_new_collection("homo_sapiens", soma.Experiment)
            obs = experiment.add_new_dataframe(
                "obs", schema=obs_schema, index_column_names=["soma_joinid"], domain=[(0, cells - 1)]
            )
            rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
            var = pa.table(
                {
                    "soma_joinid": np.arange(GENES),
                    "feature_id": [f"ENSG{gene:011d}" for gene in genes],
                    "nnz": np.full(GENES, cells),
                }
            )
            rna.add_new_dataframe(
                "var", schema=var.schema, index_column_names=["soma_joinid"], domain=[(0, GENES - 1)]
            ).write(var)
            matrix = rna.add_new_sparse_ndarray(
                "feature_dataset_presence_matrix", type=pa.bool_(), shape=(len(chosen), GENES)
            )
            for row, (number, _) in enumerate(chosen):
                # By gene, whatever its column is in this release.
                present = np.flatnonzero(np.random.default_rng(number).random(GENES)[genes] < 0.5)
                if row % 50 == 0:
                    parts: list[tuple[int, Any]] = []
                parts.append((row, present))
                if row % 50 == 49 or row == len(chosen) - 1:
                    columns = np.concatenate([part for _, part in parts])
                    rows = np.repeat([each_row for each_row, _ in parts], [len(part) for _, part in parts])
                    matrix.write(
                        pa.table({"soma_dim_0": rows, "soma_dim_1": columns, "soma_data": np.ones(len(rows), np.bool_)})
                    )
            raw = rna.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=(cells, GENES))
            looked_at = np.arange(0, cells, -(-cells // SAMPLED_CELLS))
            raw.write(
                pa.table(
                    {
                        "soma_dim_0": looked_at,
                        "soma_dim_1": np.zeros(len(looked_at), np.int64),
                        "soma_data": np.ones(len(looked_at), np.float32),
                    }
                )
            )
            where = obs.uri
    # Values of enumerations are lost through the handle that creates the dataframe.
    with soma.DataFrame.open(where, "w") as opened:
        together = max(1, 2_000_000 // each)
        for start in range(0, len(chosen), together):
            part = chosen[start : start + together]
            opened.write(_obs(obs_schema, names, part, start * each, each))


def _obs(obs_schema: pa.Schema, names: list[str], part: list[tuple[int, int]], first: int, each: int) -> pa.Table:
    n = each * len(part)
    drawn = [np.random.default_rng([number, version]) for number, version in part]
    letters = np.concatenate([ALPHABET[rng.integers(0, 85, (each, 10))] for rng in drawn])
    expressed = np.concatenate([1 + rng.integers(0, 4000, each) for rng in drawn])
    joinids = pa.Array.from_buffers(
        pa.large_string(), n, [None, pa.py_buffer(np.arange(0, 10 * n + 1, 10)), pa.py_buffer(letters)]
    )
    dataset = np.repeat(np.array([number for number, _ in part], np.int16), each)
    assay = (expressed % len(ASSAYS)).astype(np.int16)
    return pa.table(
        [
            np.arange(first, first + n),
            pa.DictionaryArray.from_arrays(dataset, pa.array(names)),
            pa.DictionaryArray.from_arrays(assay, pa.array(ASSAYS)),
            joinids,
            pa.array(expressed % 10 > 0),
            expressed,
            expressed * 3.0,
        ],
        schema=obs_schema,
    )


def plan(folder: Path, release: int, *, reuse: bool, verified: bool) -> dict[str, Any]:
    """Plan a release in this process; return what it took. `verified`: record its array as verified."""
    from census_tf_dagster.census.plan import read_plan
    from census_tf_dagster.config.settings import SetSettings
    from census_tf_dagster.orchestration.asset_support import release_context
    from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
    from census_tf_dagster.pipeline.plan_release import make_plan
    from census_tf_dagster.store.array import EmbeddingsArray
    from census_tf_dagster.store.verification import coverage

    settings = SetSettings(
        name="planning",
        organism="homo_sapiens",
        checkpoint=str(folder / "checkpoint"),
        gene_order="vocabulary",
        reuse=reuse,
    )
    census = CensusResource(location=str(folder / "census" / "{release}"))
    store = StoreResource(location=str(folder / "store"), cache=str(folder / "cache"))
    with release_context(settings, RELEASES[release], census, store) as context:
        before, cpu, wall = peak_gib(), time.process_time(), time.monotonic()
        totals = make_plan(context).totals
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        if verified:
            array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
            array.write_record(
                {"plan": read_plan(context.store, context.folder.plan).totals.plan, "covered": coverage([])}
            )
        size = sum(path.stat().st_size for path in Path(context.folder.plan).iterdir())
    return {
        "cells": totals.cells,
        "reused": totals.cells_reused,
        "megabatches": totals.megabatches,
        "plan_bytes": size,
        "seconds": wall,
        "cpu_seconds": cpu,
        "before_gib": before,
        "peak_gib": peak_gib(),
    }


def step(*arguments: object) -> dict[str, Any]:
    """Run a step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.pipeline.planning", "--step", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer = done.stdout.splitlines()[-1]
    print(*arguments[1:], answer, file=sys.stderr)
    return dict(json.loads(answer))


def _step(folder: Path, what: str, release: int, each: int, kind: str) -> dict[str, Any]:
    if what == "plan":
        return plan(folder, release, reuse=kind != "without", verified=release == 0)
    if not (folder / "checkpoint").exists():
        from census_tf_dagster.demo.checkpoint import build_checkpoint

        sizes = {"embed_dim": 16, "num_heads": 1, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
        known = np.random.default_rng(0).permutation(GENES)[:24_000]
        build_checkpoint(folder / "checkpoint", [f"ENSG{gene:011d}" for gene in known], ASSAYS[:3], **sizes)
    build(folder, release, each, alone=kind == "alone")
    return {}


def main() -> None:
    """Build, plan, print a table."""
    parser = arguments_parser(__doc__, quick="200,000 against 180,000 cells, and 400,000")
    parser.add_argument("--largest", type=int, default=162_000_000, help="cells of the plan without reuse")
    parser.add_argument("--step", nargs=5, help="(internal) folder, step, release, cells each, kind")
    arguments = parser.parse_args()
    if arguments.step:
        folder, what, release, each, kind = arguments.step
        print(json.dumps(_step(Path(folder), what, int(release), int(each), kind)))
        return
    sizes, largest = ((200_000,), 400_000) if arguments.quick else ((2_000_000, 20_000_000), arguments.largest)
    rows: list[dict[str, Any]] = []
    for cells in sizes:
        each = cells // DATASETS
        with tempfile.TemporaryDirectory() as folder:
            for release in (0, 1):
                step(folder, "build", release, each, "pair")
                found = step(folder, "plan", release, each, "pair")
                if release:
                    assert found["reused"] == each * DATASETS * 7 // 10, found
                    rows.append({"what": f"{cells:,} cells against {cells * 9 // 10:,}", **found})
    if largest:
        with tempfile.TemporaryDirectory() as folder:
            step(folder, "build", 0, largest // DATASETS, "alone")
            for kind, said in (("without", "without `reuse`"), ("alone", "with `reuse`, nothing earlier")):
                rows.append({"what": f"{largest:,} cells, {said}", **step(folder, "plan", 0, 0, kind)})
                shutil.rmtree(Path(folder) / "store")
    head = ["", "reused", "seconds", "CPU s", "GiB before", "GiB at peak", "MB of plan"]
    table(
        head,
        [
            [
                row["what"],
                f"{row['reused']:,}",
                f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['before_gib']:.2f}",
                f"{row['peak_gib']:.2f}",
                f"{row['plan_bytes'] / 1e6:,.0f}",
            ]
            for row in rows
        ],
    )
    if arguments.json:
        ours, reference = rows[len(sizes) - 1]["seconds"], rows[0]["seconds"]
        print(json.dumps({"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "s", "rows": rows}))


if __name__ == "__main__":
    main()
