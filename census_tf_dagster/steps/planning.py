"""Step 1: list the cells, split them, write the plan, create the array."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tiledb

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.plan import Megabatch, PlanTotals, divide, plan_totals, write_obs_ids, write_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.steps.job import Job
from census_tf_dagster.store.array import EmbeddingsArray

BYTES_PER_VALUE = {"bfloat16": 1.6, "float32": 3.8}
"""Stored bytes of a value with its coordinates, compressed: measured on 2,048 features (docs/performance.md)."""

LEAST_KNOWN_SHARE = 0.25
"""Below this the embedding says little: human genes in a human model are near 0.9, other species' near 0."""
SAMPLED_CELLS = 64
"""Cells whose counts are looked at before anything is written."""


@dataclass(frozen=True)
class PlanSummary:
    """What a person wants to know before the shards run.

    Attributes
    ----------
    totals
        Cells, tokens, shards.
    estimated_bytes
        What the array will take, from measured bytes a value.
    expressed_genes, known_genes
        Genes that any cell expresses, and how many of those the checkpoint knows.
    known_share
        Share of all expressed (cell, gene) pairs whose gene the checkpoint knows, over the whole organism.
    storage_versions
        TileDB's, of the array and of the Census. Where they differ, the Census's tool refuses the embedding.
    """

    totals: PlanTotals
    estimated_bytes: int
    expressed_genes: int
    known_genes: int
    known_share: float
    storage_versions: tuple[int, int]
    root: str
    identity: str


@dataclass(frozen=True)
class Survey:
    """The cells that a plan would hold, before anything is written.

    Attributes
    ----------
    joinids
        Ascending soma_joinids, int64.
    megabatches
        How they are divided.
    summary
        What it amounts to.
    """

    joinids: npt.NDArray[np.int64]
    megabatches: tuple[Megabatch, ...]
    summary: PlanSummary


def survey(job: Job) -> Survey:
    """List and divide the cells; write nothing.

    Raises
    ------
    UserError
        When no cell matches, the checkpoint hardly knows the organism, or counts are none.
    """
    settings = job.settings
    known = np.array([job.checkpoint.knows(gene) for gene in job.genes.ids])
    expressing = job.genes.cells_expressing
    known_share = float(expressing[known].sum() / max(expressing.sum(), 1))
    if known_share < LEAST_KNOWN_SHARE:
        raise UserError(
            f"{settings.checkpoint} knows {known_share:.1%} of what cells of {settings.organism} express "
            f"({np.count_nonzero(known)} of {len(known)} genes; the Census has {', '.join(job.genes.ids[:3])}, ...); "
            f"at least {LEAST_KNOWN_SHARE:.0%} is expected. For a species outside its vocabulary set "
            "`pretrained_embeddings`, or choose another checkpoint."
        )

    ids, expressed, primary_cells = [], [], 0
    for table in job.release.iter_obs(settings.value_filter):
        joinids = table["soma_joinid"].to_numpy()
        chosen = joinids % settings.mod == 0
        ids.append(joinids[chosen])
        expressed.append(table["nnz"].to_numpy()[chosen].astype(np.int32))
        primary_cells += int(np.count_nonzero(table["is_primary_data"].to_numpy()[chosen]))
    joinids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(joinids):
        raise UserError(
            f"no cell of {settings.organism} in {job.release.uri} matches value_filter {settings.value_filter!r} with "
            f"mod {settings.mod}. The organism has {job.release.obs_rows()} cells."
        )
    order = np.argsort(joinids, kind="stable")
    joinids = joinids[order]
    # Assay and START, and the window's genes: an upper bound, as genes outside the vocabulary make no token.
    tokens = np.minimum(np.concatenate(expressed)[order], job.checkpoint.shape.seq_len - 1) + 2

    # A Census of normalised values should not cost a shard's start on a GPU node first.
    read_cells(job.release, joinids[:: -(-len(joinids) // SAMPLED_CELLS)], job.checkpoint.aux_column)

    megabatches = divide(joinids, tokens, settings.shards, settings.megabatch_size)
    summary = PlanSummary(
        totals=plan_totals(joinids, megabatches, settings.shards, primary_cells),
        estimated_bytes=int(len(joinids) * job.identity.embedding_dim * BYTES_PER_VALUE[settings.storage_precision]),
        expressed_genes=int(np.count_nonzero(expressing)),
        known_genes=int(np.count_nonzero(expressing[known])),
        known_share=known_share,
        storage_versions=(_storage_version(job), job.release.storage_version()),
        root=job.folder.root,
        identity=job.identity.digest,
    )
    return Survey(joinids, megabatches, summary)


def _storage_version(job: Job) -> int:
    """Return the storage version of the array that is there, else the one that TileDB here would create."""
    if job.store.holds_files(job.folder.array):
        found, _ = EmbeddingsArray.look(job.folder.array, job.store)
        return job.store.storage_version(found.uri)
    # A schema that was not stored has the version of the library; tiledbsoma carries the same core.
    domain = tiledb.Domain(tiledb.Dim("soma_dim_0", domain=(0, 1), dtype="int64"))
    return int(tiledb.ArraySchema(domain, [tiledb.Attr("soma_data", dtype="float32")], sparse=True).version)


def make_plan(job: Job) -> PlanSummary:
    """Plan a release. Equal inputs give an equal plan; nothing of an earlier one changes.

    Raises
    ------
    UserError
        As `survey` does, or when an array of another identity, or something else, is in the way.
    """
    found = survey(job)
    # First, so that nothing is written when an array of another identity is there.
    job.store.make_place(job.folder.root)
    EmbeddingsArray.create(job.folder.array, job.store, job.identity, job.release.obs_rows())
    write_obs_ids(job.store, job.folder.obs_ids, found.joinids)
    # Last: a current plan is a complete one.
    write_plan(job.store, job.folder.plan, found.joinids, found.megabatches, found.summary.totals)
    return found.summary
