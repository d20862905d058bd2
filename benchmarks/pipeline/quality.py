"""Measure what the quality report of a finished array costs: time, peak memory, and how they grow with the array.

    python -m benchmarks.pipeline.quality [--quick] [--json]

100,000 and 1,000,000 synthetic cells x 2,048 features, 100 expressed genes a cell of 20,000, 100 cell types in 50
datasets; bfloat16 storage, megabatches of 16,384, local disk. The report is made in a process of its own, so that its
peak memory is its own. For both sizes it reads the same number of sampled cells, and all of obs.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from benchmarks.common import arguments_parser, gene_ids, peak_gib, table
from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS
from census_tf_dagster.orchestration.asset_support import release_context
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from census_tf_dagster.pipeline.assess_quality import assess
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.verification import verify_shard

RELEASE = "2025-11-08"
FEATURES, GENES, EXPRESSED, TYPES, DATASETS, TISSUES = 2048, 20_000, 100, 100, 50, 20


def context(place: Path) -> Any:
    """Open the only set below a folder."""
    settings = SetSettings(
        name="synthetic",
        organism="homo_sapiens",
        checkpoint=str(place / "checkpoint"),
        shards=4,
        device="cpu",
    )
    census = CensusResource(location=str(place / "census" / "{release}"))
    return release_context(settings, RELEASE, census, StoreResource(location=str(place / "store")))


def build(place: Path, cells: int) -> None:
    """Write a Census, and an array of values that lie around a centre of their cell's type."""
    rng = np.random.default_rng(0)
    kind = rng.integers(TYPES, size=cells)
    # Evenly apart from a random gene on: distinct, and cheap to draw.
    first, step = rng.integers(GENES, size=(2, cells))[:, :, None] % [[[GENES]], [[GENES // EXPRESSED]]]
    genes = np.sort((first + (step + 1) * np.arange(EXPRESSED)) % GENES, axis=1).astype(np.int32)
    counts = scipy.sparse.csr_matrix(
        (
            rng.integers(1, 6, size=cells * EXPRESSED).astype(np.float32),
            genes.reshape(-1),
            np.arange(0, cells * EXPRESSED + 1, EXPRESSED),
        ),
        shape=(cells, GENES),
    )
    counts.sum_duplicates()
    ids = gene_ids(GENES)
    of = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(kind, [f"cell type {i}" for i in range(TYPES)]),
            "dataset_id": pd.Categorical.from_codes(
                np.arange(cells) * DATASETS // cells, [f"d{i}" for i in range(DATASETS)]
            ),
            "tissue": pd.Categorical.from_codes(kind % TISSUES, [f"tissue {i}" for i in range(TISSUES)]),
            "assay": pd.Categorical.from_codes(kind % len(KNOWN_ASSAYS), list(KNOWN_ASSAYS)),
        }
    ).astype(str)
    var = pd.DataFrame({"feature_id": ids, "feature_name": ids, "feature_length": 1000})
    build_census(str(place / "census" / RELEASE), RELEASE, [Organism("homo_sapiens", "Homo sapiens", counts, var, of)])
    sizes = {"embed_dim": FEATURES, "num_heads": 16, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
    build_checkpoint(place / "checkpoint", {"homo_sapiens": ids[: GENES // 2]}, KNOWN_ASSAYS, **sizes)
    centres = rng.normal(size=(TYPES, FEATURES)).astype(np.float32) / 4 + rng.normal(size=FEATURES).astype(np.float32)
    with context(place) as opened:
        make_plan(opened)
        plan = read_plan(opened.store, opened.folder.plan)
        array = EmbeddingsArray.open(opened.folder.array, opened.store, opened.identity)
        for batch, joinids in zip(plan.megabatches, plan.read_ids(opened.store, plan.megabatches), strict=True):
            noise = rng.normal(size=(batch.cells, FEATURES)).astype(np.float32) / 4
            array.write(joinids, round_to_bfloat16(centres[kind[joinids]] + noise))
        for shard in range(plan.totals.shards):
            assert not verify_shard(array, plan, opened.folder, shard)
        finish_array(opened)


def run(place: Path) -> dict[str, Any]:
    """Make the report; return seconds of each part and this process's peak memory."""
    with context(place) as opened:
        before = peak_gib()
        cpu, wall = time.process_time(), time.monotonic()
        report = assess(opened)
        return {
            "wall": time.monotonic() - wall,
            "cpu": time.process_time() - cpu,
            "gib_before": before,
            "gib": peak_gib(),
            "sampled": report.about["sample"]["cells"],
            "parts": dict(report.seconds),
            "bytes": {name: len(content) for name, content in report.pictures.items()},
            "checks": {name: verdict.text for name, verdict in report.verdicts.items()},
        }


def main() -> None:
    """Build and measure each size, print a table."""
    parser = arguments_parser(__doc__, quick="2,000 and 20,000 cells")
    parser.add_argument("--step", nargs=3)
    arguments = parser.parse_args()
    if arguments.step:
        step, place, cells = arguments.step[0], Path(arguments.step[1]), int(arguments.step[2])
        print(json.dumps(run(place)) if step == "run" else build(place, cells))
        return
    answers = {}
    for cells in (2_000, 20_000) if arguments.quick else (100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as place:
            for step in ("build", "run"):
                command = [sys.executable, "-m", "benchmarks.pipeline.quality", "--step", step, place, str(cells)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            answers[cells] = json.loads(done.stdout.splitlines()[-1])
    small, large = answers.values()
    rows = [[part, *(f"{one['parts'][part]:.1f}" for one in (small, large))] for part in large["parts"]]
    rows += [
        [name, f"{small[key]:.1f}", f"{large[key]:.1f}"]
        for name, key in (("all, wall s", "wall"), ("all, CPU s", "cpu"))
    ]
    rows += [["peak memory, GiB", f"{small['gib']:.2f}", f"{large['gib']:.2f}"]]
    rows += [["  of it before the report", f"{small['gib_before']:.2f}", f"{large['gib_before']:.2f}"]]
    rows += [["cells sampled", f"{small['sampled']:,}", f"{large['sampled']:,}"]]
    table(["wall s of each part", *(f"{cells:,} cells" for cells in answers)], rows)
    for name, text in large["checks"].items():
        print(f"{name}: {text}")
    print("pictures, bytes: " + ", ".join(f"{name} {size:,}" for name, size in large["bytes"].items()))
    if arguments.json:
        ours, reference = large["gib"], small["gib"]
        print(
            json.dumps(
                {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "GiB", "rows": answers}
            )
        )


if __name__ == "__main__":
    main()
