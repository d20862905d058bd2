"""A tiny project with synthetic cells: a Census, a checkpoint and a set, in well under a second."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.steps.job import Job
from census_tf_dagster.steps.planning import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.proof import prove_shard
from tests.support import RELEASE, Project

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
    """Return values that tell of which cell and feature they are, instead of a model's: float32, exact."""
    return (ids[:, None] * 64 + np.arange(n_features) + 1).astype(np.float32)


def age(folder: Path, seconds: float = 3600) -> None:
    """Let everything below a folder have been written some time ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def fill(job: Job) -> EmbeddingsArray:
    """Plan, and commit and prove values of `value_of`."""
    make_plan(job)
    plan = read_plan(job.store, job.folder.plan)
    array = EmbeddingsArray.open(job.folder.array, job.store, job.identity)
    with array.writing() as write:
        for ids in plan.read_ids(job.store, plan.megabatches):
            write(ids, value_of(ids, array.n_features))
    for shard in range(plan.totals.shards):
        assert not prove_shard(array, plan, job.folder, shard)
    return array
