"""Step 3: prove that the array is exactly the plan, then write identity and record into it."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from census_tf_dagster.census.plan import PlanTotals, read_plan
from census_tf_dagster.steps.job import Job
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.proof import prove_release, release_state

RECORDED_PACKAGES = ("census-tf-dagster", "tiledbsoma", "tiledb", "cellxgene-census", "dagster")


@dataclass(frozen=True)
class ArraySummary:
    """A proved array.

    Attributes
    ----------
    totals
        The plan that it equals.
    shape
        Rows (obs domain) and features.
    fragments, excess_fragments
        Committed writes, and how many more there are than megabatches planned: recomputed shards, or two workers
        on one shard. Harmless (the later value of a cell counts), but paid twice.
    read_again
        Shards whose fragments had changed since their proof.
    uri
        Where readers find it.
    """

    totals: PlanTotals
    shape: tuple[int, int]
    fragments: int
    excess_fragments: int
    read_again: tuple[int, ...]
    uri: str
    identity: str


def finish_array(job: Job) -> ArraySummary:
    """Prove the array of the current plan, and record how it was made.

    Raises
    ------
    UserError
        When shards have not finished.
    ProofError
        When the array does not hold exactly the planned cells, each with all its values, all finite.
    """
    plan = read_plan(job.store, job.folder.plan)
    array = EmbeddingsArray.open(job.folder.array, job.store, job.identity)
    proof = prove_release(array, plan, job.folder)
    array.write_record(
        {
            "plan": plan.totals.plan,
            "covered": proof.covered,
            "cells": plan.totals.cells,
            "proved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in RECORDED_PACKAGES},
        }
    )
    fragments = len(array.fragments())
    return ArraySummary(
        totals=plan.totals,
        shape=(array.rows, array.n_features),
        fragments=fragments,
        excess_fragments=max(fragments - plan.totals.megabatches, 0),
        read_again=proof.read_again,
        uri=array.uri,
        identity=job.identity.digest,
    )


def array_state(job: Job) -> str:
    """Tell whether the array is ``unproved``, ``stale`` (plan or commits have changed) or ``proved``."""
    plan = read_plan(job.store, job.folder.plan)
    return release_state(EmbeddingsArray.open(job.folder.array, job.store, job.identity), plan)
