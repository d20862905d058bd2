"""Measure what embedding an h5ad file takes, beside a shard of the same cells, and its peak memory against its size.

    python -m benchmarks.pipeline.own_cells [--quick] [--small] [--json]

The cells have 60,000 genes, of which the median cell expresses 500; the file is CSR, compressed with gzip. The model is
one small layer with a window of 255, so that reading and tokens weigh as much as they can. Rates count from when the
model is loaded. Each run is a process of its own, with another for the device, whose peak is added. The large file
repeats the cells of the small one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

from benchmarks.common import children_peak_gib, peak_gib, ratios, spread, table
from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism

GENES = 60_000
RELEASE = "2025-11-08"


def build(folder: Path, cells: int, repeats: int) -> None:
    """Write a Census of some cells, a file of the same ones, a file that repeats them, and a checkpoint."""
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", cells, GENES, "ENSG", seed=1, median_genes=500)
    build_census(str(folder / RELEASE), RELEASE, [organism])
    genes = organism.genes["feature_id"].tolist()
    sizes = {"embed_dim": 16, "num_heads": 1, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
    build_checkpoint(
        folder / "checkpoint", {"homo_sapiens": genes[:20_000]}, KNOWN_ASSAYS, seq_len=255, block_len=128, **sizes
    )
    counts, assays = organism.counts.tocsr().astype(np.float32), organism.cells["assay"].astype(str).to_numpy()
    for name, times in (("small", 1), ("large", repeats)):
        names = np.char.add("cell-", np.arange(cells * times).astype(str)).astype(object)
        obs = pd.DataFrame({"assay": pd.Categorical(np.tile(assays, times))}, index=names)
        path = folder / f"{name}.h5ad"
        anndata.AnnData(obs=obs, var=pd.DataFrame({"ensembl_id": genes}, index=genes)).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            x = file.create_group("X")
            x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            x.attrs["shape"] = np.array([cells * times, GENES])
            offsets = [counts.indptr[1:].astype(np.int64) + i * counts.nnz for i in range(times)]
            x.create_dataset("indptr", data=np.concatenate([[0], *offsets]), compression="gzip")
            for part, values in (("data", counts.data), ("indices", counts.indices)):
                total = counts.nnz * times
                stored = x.create_dataset(part, total, values.dtype, chunks=(65536,), compression="gzip")
                for i in range(times):
                    stored[i * counts.nnz : (i + 1) * counts.nnz] = values


def embed(folder: Path, name: str) -> dict[str, float]:
    """Embed a file; return its rate, seconds and peak memory."""
    from census_tf_dagster.own_cells.embed import Options, embed_file, open_options
    from census_tf_dagster.own_cells.model import Access

    options = Options(str(folder / "checkpoint"), device="cpu")
    access = Access.of_environment(folder / "cache")
    device: list[float] = [0.0]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Path(place) / "out.npy"
        done = embed_file(
            str(folder / f"{name}.h5ad"),
            output,
            options,
            access,
            open_options(options, access),
            lambda _: device.append(children_peak_gib()),
        )
    return {
        "cells": done.cells,
        "rate": done.embedded / done.seconds,
        "seconds": time.monotonic() - began,
        "cpu_seconds": sum(os.times()[:4]),
        "peak_gib": peak_gib() + max(device),
    }


def shard(folder: Path) -> dict[str, float]:
    """Embed the same cells as the only shard of a release; return its rate, seconds and peak memory."""
    from census_tf_dagster.config.settings import SetSettings
    from census_tf_dagster.orchestration.asset_support import release_context
    from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
    from census_tf_dagster.pipeline.embed_shard import embed_shard
    from census_tf_dagster.pipeline.plan_release import make_plan

    settings = SetSettings(
        name="same",
        organism="homo_sapiens",
        checkpoint=str(folder / "checkpoint"),
        shards=1,
        megabatch_size=4096,
        compute_precision="fp32",
        device="cpu",
    )
    census = CensusResource(location=str(folder / "{release}"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = StoreResource(location=place, cache=str(folder / "cache"))
        with release_context(settings, RELEASE, census, store) as context:
            make_plan(context)
            began = time.monotonic()
            device: list[float] = [0.0]
            summary = embed_shard(context, 0, report=lambda _: device.append(children_peak_gib()))
    return {
        "cells": summary.cells,
        "rate": summary.cells_per_second(),
        "seconds": time.monotonic() - began,
        "cpu_seconds": sum(os.times()[:4]),
        "peak_gib": peak_gib() + max(device),
    }


def main() -> None:
    """Build, run each way in turn, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4,000 against 16,000 cells, one round")
    parser.add_argument("--small", action="store_true", help="without the file of 1,000,000 cells")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder, *rest = arguments.step
        place = Path(folder)
        if step == "build":
            build(place, int(rest[0]), int(rest[1]))
        else:
            print(json.dumps(shard(place) if step == "shard" else embed(place, rest[0])))
        return
    cells, repeats, rounds = (4_000, 4, 1) if arguments.quick else (50_000, 20, 5)
    with tempfile.TemporaryDirectory() as folder:

        def run(step: str, *rest: object) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.pipeline.own_cells", "--step", step, folder, *map(str, rest)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return dict(json.loads(done.stdout.splitlines()[-1])) if done.stdout else {}

        run("build", cells, repeats)
        run("embed", "small")  # It prepares the checkpoint and compiles.
        files, shards = [], []
        for number in range(rounds):
            # Neither always follows the other.
            for way in ("file", "shard") if number % 2 else ("shard", "file"):
                if way == "file":
                    files.append(run("embed", "small"))
                else:
                    shards.append(run("shard"))
        large = [] if arguments.small else [run("embed", "large")]
    keys = ("rate", "cpu_seconds", "peak_gib")
    rows = [
        [name, f"{found[0]['cells']:,}", *(spread([one[key] for one in found], 2) for key in keys)]
        for name, found in (("file", files), ("shard", shards), ("large file", large))
        if found
    ]
    print(f"{GENES:,} genes, window of 255, {rounds} rounds, interleaved")
    table(["", "cells", "cells/s", "CPU s", "peak GiB"], rows)
    rate = ratios([one["rate"] for one in files], [one["rate"] for one in shards])
    print(f"rate of the file over that of the shard: {spread(rate, 3)}")
    cpu = ratios([one["cpu_seconds"] for one in files], [one["cpu_seconds"] for one in shards])
    print(f"CPU seconds of the file over those of the shard, with imports and loading: {spread(cpu, 3)}")
    for one in large:
        print(f"seconds of the large file, with writing the output: {one['seconds']:.0f}")
    if arguments.json:
        ours, reference = (float(np.median([one["rate"] for one in found])) for found in (files, shards))
        found = {"file": files, "shard": shards, "large": large}
        print(json.dumps({"ours": ours, "reference": reference, "ratio": float(np.median(rate)), "rows": found}))


if __name__ == "__main__":
    main()
