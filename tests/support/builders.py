"""A tiny project with synthetic cells: a Census, a checkpoint and a set, in well under a second."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from census_tf_dagster.census.plan import Megabatch, read_plan
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.mending import mend_shard
from census_tf_dagster.store.verification import require_shard
from census_tf_dagster.store.write_notes import NoteWriter, Written, read_notes
from tests.support.project import RELEASE, Project

N_GENES = 120

PUBLICATION = {
    "id": "CxG-contrib-99",
    "embedding_name": "tf_tiny",
    "title": "Tiny embeddings",
    "description": "Random weights on synthetic cells.",
    "primary_contact": {"name": "Ada", "email": "ada@example.org", "affiliation": "Analytical Engines"},
}


def tiny(
    project: Project, *, cells: int = 200, change: Callable[[Organism], None] = lambda _: None, **attributes: Any
) -> Project:
    """Add a Census of human cells, a checkpoint with a window of 63 genes, and the set `tiny`.

    `change` alters the cells before the Census is written.
    """
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", cells, N_GENES, "ENSG", seed=1, median_genes=40)
    change(organism)
    build_census(str(project.census), RELEASE, [organism])
    genes = organism.genes["feature_id"].tolist()
    build_checkpoint(
        project.checkpoint, {"homo_sapiens": genes[6:]}, KNOWN_ASSAYS, embed_dim=16, seq_len=63, block_len=64
    )
    project.add_set("tiny", organism="homo_sapiens", **{"megabatch_size": 16, **attributes})
    return project


def value_of(ids: np.ndarray, n_features: int) -> np.ndarray:
    """Return values that name their cell and feature, in place of a model's: exact in float32."""
    return (ids[:, None] * 64 + np.arange(n_features) + 1).astype(np.float32)


def age(folder: Path, seconds: float = 3600) -> None:
    """Set the modification times of everything below a folder to an earlier time."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def fill(context: ReleaseContext) -> EmbeddingsArray:
    """Plan, and commit and verify values of `value_of`."""
    make_plan(context)
    for shard in range(context.settings.shards):
        fill_shard(context, shard)
    return EmbeddingsArray.open(context.folder.array, context.store, context.identity)


def fill_shard(context: ReleaseContext, shard: int) -> int:
    """Write as a shard does, with values of `value_of`. Return how many megabatches were repaired."""
    plan = read_plan(context.store, context.folder.plan)
    array = EmbeddingsArray.repair(context.folder.array, context.store, context.identity)
    notebook = NoteWriter(context.store, context.folder, plan, shard)

    def commit(some: Sequence[Megabatch]) -> None:
        with array.writing() as write:
            for batch, ids in zip(some, plan.read_ids(context.store, some), strict=True):
                values = value_of(ids, array.n_features)
                notebook.note(Written.of(batch, ids, values))
                write(ids, values)

    notes = read_notes(context.store, context.folder, plan, [shard])
    if missing := missing_megabatches(array, plan, plan.shard(shard), notes):
        commit(missing)
        array.gather_metadata()
    found = require_shard(array, plan, context.folder, shard)
    assert found is not None
    return mend_shard(array, plan, context.folder, shard, found, plan.shard(shard), commit) if found else 0
