"""Measure a worker at the true size of a model: how soon it computes, and how much memory it takes.

    python -m benchmarks.inference.worker [--quick] [--json] [--model metazoa] [--device cuda]

One shard of two megabatches (of 16,384 cells by default), 60,000 genes, median 1,800 expressed, embeddings of 2,048
values, random weights in the full width, depth and vocabulary of the model. So that a CPU can do it, the vocabulary has
only three of the genes that cells express (and names of other species). A cell then has about five tokens, and
everything else has its true size, except the rows on the device. The program runs the shard twice: the first run
prepares the checkpoint, the second finds it prepared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import VOCABULARIES, Shape, children_peak_gib, peak_gib, table

GENES, KNOWN, RELEASE = 60_000, 3, "2025-11-08"


def build(folder: Path, model: str, cells: int, layers: int) -> None:
    """Build Census and checkpoint."""
    from census_tf_dagster.demo.census import build_census
    from census_tf_dagster.demo.synthetic import synthetic_organism

    drawn = synthetic_organism("homo_sapiens", "Homo sapiens", cells, GENES, "ENSG", seed=1)
    build_census(str(folder / "census" / RELEASE), RELEASE, [drawn])
    often = np.argsort(-drawn.counts.getnnz(axis=0), kind="stable")[:KNOWN]
    known = [str(drawn.genes["feature_id"].iloc[gene]) for gene in often]
    shape = Shape(model, 1, layers)
    shape.build(folder / "checkpoint", known + [f"OTHER{i:011d}" for i in range(shape.vocabulary - KNOWN)])


def run(folder: Path, started: float, megabatch: int, device: str) -> dict[str, float]:
    """Plan and embed the only shard; return seconds since the process was started, and peaks."""
    from census_tf_dagster.embedding_set import EmbeddingSet
    from census_tf_dagster.orchestration.asset_support import release_context
    from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
    from census_tf_dagster.pipeline import plan_release as planning
    from census_tf_dagster.pipeline.embed_shard import ShardSummary, embed_shard

    planning.LEAST_KNOWN_SHARE = 0.0
    declared = EmbeddingSet(
        name="worker",
        organism="homo_sapiens",
        checkpoint=str(folder / "checkpoint"),
        shards=1,
        megabatch_size=megabatch,
        compute_precision="fp32" if device == "cpu" else "fp16",
        device="cpu" if device == "cpu" else "cuda",
    )
    census = CensusResource(location=str(folder / "census" / "{release}"))
    store = StoreResource(location=str(folder / f"store-{started}"), cache=str(folder / "cache"))
    found: dict[str, float] = {}

    def first(summary: ShardSummary) -> None:
        (counters,) = summary.times.counters.values()
        found.setdefault("computing_after", time.monotonic() - summary.times.stages["write"].busy - counters["elapsed"])
        found["device_gib"] = children_peak_gib()

    with release_context(declared, RELEASE, census, store) as context:
        planning.make_plan(context)
        planned = time.monotonic()
        summary = embed_shard(context, 0, report=first)
    return {
        "planned_after": planned - started,
        "load": summary.times.load,
        "computing_after": found["computing_after"] - planned,
        "shard_gib": peak_gib(),
        "device_gib": found["device_gib"],
        **{f"busy_{name}": stage.busy for name, stage in summary.times.stages.items()},
    }


def main() -> None:
    """Build, run twice in processes of their own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tf_sapiens with 1 of 12 layers, megabatches of 1,024")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--megabatch", type=int, default=16_384, help="cells")
    parser.add_argument("--model", choices=list(VOCABULARIES), default="metazoa")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--step", nargs=2, help="(internal) folder, request")
    arguments = parser.parse_args()
    if arguments.step:
        request = json.loads(arguments.step[1])
        step = {"build": build, "run": run}[request.pop("step")]
        print(json.dumps(step(Path(arguments.step[0]), **request)))
        return
    model, layers, megabatch = ("sapiens", 1, 1024) if arguments.quick else (arguments.model, 12, arguments.megabatch)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:

        def step(**request: Any) -> Any:
            command = [sys.executable, "-m", "benchmarks.inference.worker", "--step", folder, json.dumps(request)]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

        step(step="build", model=model, cells=2 * megabatch, layers=layers)
        for _ in range(2):
            rows.append(step(step="run", started=time.monotonic(), megabatch=megabatch, device=arguments.device))
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        importing = time.monotonic() - begun
    print(f"tf_{model}, {layers} layers, 2 megabatches of {megabatch:,} cells, {arguments.device}")
    names = {
        "planned_after": "process start to planned, s",
        "load": "from there: all devices loaded, s",
        "computing_after": "from there: first batch begins, s",
        "shard_gib": "peak memory of the shard's process, GiB",
        "device_gib": "peak memory of the device's process, GiB",
    }
    names |= {name: f"busy: {name.removeprefix('busy_')}, s" for name in rows[0] if name.startswith("busy_")}
    table(
        ["", "first run", "prepared"],
        [[text, *(f"{row[name]:.2f}" for row in rows)] for name, text in names.items()],
    )
    print(f"importing torch alone: {importing:.1f} s")
    if arguments.json:
        ours = rows[1]["shard_gib"] + rows[1]["device_gib"]
        answer = {"ours": ours, "reference": 8.0, "ratio": ours / 8.0, "unit": "GiB"}
        print(json.dumps({**answer, "import_torch": importing, "rows": rows}))


if __name__ == "__main__":
    main()
