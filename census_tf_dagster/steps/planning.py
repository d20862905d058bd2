"""Step 1: list the cells, split them, write the plan, create the array."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import tiledb

from census_tf_dagster.census.cell_keys import KEY_COLUMNS, OPTIONAL_COLUMNS, KeyMaker, Keys, dataset_digests
from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.division import Division, divide
from census_tf_dagster.census.key_file import find_cells, write_keys
from census_tf_dagster.census.plan import Plan, PlanTotals, plan_totals, write_obs_ids, write_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.tokens import genes_in_order
from census_tf_dagster.steps.job import Job
from census_tf_dagster.steps.reuse import NO_SOURCE, FoundSource, find_source
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.removal import require_not_begun

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
    passed_over
        Earlier arrays that cells could not be copied from, and why.
    """

    totals: PlanTotals
    estimated_bytes: int
    expressed_genes: int
    known_genes: int
    known_share: float
    storage_versions: tuple[int, int]
    root: str
    identity: str
    passed_over: tuple[str, ...] = ()

    def reuse(self) -> str:
        """Say how much is reused and how much computed, and from which array."""
        totals = self.totals
        rest = f"computes {totals.cells_to_compute:,} cells ({totals.tokens_to_compute:,} tokens)"
        if totals.source is None:
            return f"reuses nothing, {rest}"
        share = totals.cells_reused / totals.cells
        return (
            f"reuses {totals.cells_reused:,} cells ({share:.1%}; {totals.tokens_reused:,} tokens) of release "
            f"{totals.source.release}, {rest}; copies from {totals.source.root}"
        )

    @property
    def cells_reused(self) -> int:
        """Cells that are copied from `totals.source`."""
        return self.totals.cells_reused

    @property
    def tokens_to_compute(self) -> int:
        """Tokens of the cells that go through the model, at most."""
        return self.totals.tokens_to_compute


@dataclass(frozen=True)
class Survey:
    """The cells that a plan would hold, before anything is written.

    Attributes
    ----------
    joinids
        Ascending soma_joinids, int64.
    division
        How they are divided.
    summary
        What it amounts to.
    keys
        By which a later release finds these cells; None for sets without `reuse`.
    sources
        Where each cell stands in the earlier array, -1 where it is computed; None when nothing is reused.
    """

    joinids: npt.NDArray[np.int64]
    division: Division
    summary: PlanSummary
    keys: Keys | None
    sources: npt.NDArray[np.int64] | None


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

    cells = _list_cells(job)
    joinids = cells.joinids
    # A Census of normalised values should not cost a shard's start on a GPU node first.
    read_cells(job.release, joinids[:: -(-len(joinids) // SAMPLED_CELLS)], job.checkpoint.aux_column)

    found, sources = _find_copies(job, cells.keys)
    reused = None if sources is None else sources >= 0
    division = divide(joinids, cells.tokens, settings.shards, settings.megabatch_size, reused)
    summary = PlanSummary(
        totals=plan_totals(joinids, division.megabatches, settings.shards, cells.primary, sources, found.source),
        estimated_bytes=int(len(joinids) * job.identity.embedding_dim * BYTES_PER_VALUE[settings.storage_precision]),
        expressed_genes=int(np.count_nonzero(expressing)),
        known_genes=int(np.count_nonzero(expressing[known])),
        known_share=known_share,
        storage_versions=(_storage_version(job), job.release.storage_version()),
        root=job.folder.root,
        identity=job.identity.digest,
        passed_over=found.passed_over,
    )
    return Survey(joinids, division, summary, cells.keys, sources)


def _find_copies(job: Job, keys: Keys | None) -> tuple[FoundSource, npt.NDArray[np.int64] | None]:
    """Find the earlier array to copy from, and where each cell stands in it; -1: it is computed, None: all are."""
    if keys is None:
        return NO_SOURCE, None
    found = find_source(job)
    if found.source is None:
        return found, None
    try:
        sources = find_cells(job.store, found.keys, keys)
    except UserError as error:
        return FoundSource(None, "", (*found.passed_over, str(error))), None
    if not (sources >= 0).any():
        reason = f"{found.source.root}: no cell is the same, with the same genes in the same order"
        return FoundSource(None, "", (*found.passed_over, reason)), None
    return found, sources


@dataclass(frozen=True)
class _Cells:
    """Matching cells, ascending: ids int64 ``(n,)``, tokens at most ``(n,)``, keys where the set reuses cells."""

    joinids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.integer]
    keys: Keys | None
    primary: int


def _list_cells(job: Job) -> _Cells:
    settings, window = job.settings, job.checkpoint.shape.seq_len - 1
    make_keys, columns = None, []
    if settings.reuse:
        make_keys = _key_maker(job)
        columns = [*KEY_COLUMNS, job.checkpoint.aux_column] if make_keys else []
        columns += [name for name in OPTIONAL_COLUMNS if make_keys and name in job.release.obs.keys()]  # noqa: SIM118
    # As many as there can be: the system gives memory to what is filled alone.
    most = job.release.obs_rows()
    joinids = np.empty(most, np.int64)
    tokens = np.empty(most, np.min_scalar_type(window + 2))
    keys = np.zeros((most, 2), np.uint64) if settings.reuse else None
    n = primary = 0
    for table in job.release.iter_obs(settings.value_filter, columns):
        ids = table["soma_joinid"].to_numpy()
        if settings.mod > 1:
            table = table.filter(pa.array(ids % settings.mod == 0))
            ids = table["soma_joinid"].to_numpy()
        part = slice(n, n + len(ids))
        joinids[part] = ids
        # Assay and START, and the window's genes: an upper bound, as genes outside the vocabulary make no token.
        tokens[part] = np.minimum(table["nnz"].to_numpy(), window) + 2
        primary += pc.sum(table["is_primary_data"]).as_py() or 0
        if keys is not None and make_keys is not None:
            keys[part] = make_keys(table)
        n += len(ids)
    if not n:
        raise UserError(
            f"no cell of {settings.organism} in {job.release.uri} matches value_filter {settings.value_filter!r} with "
            f"mod {settings.mod}. The organism has {job.release.obs_rows()} cells."
        )
    joinids, tokens, keys = joinids[:n], tokens[:n], None if keys is None else keys[:n]
    if (joinids[1:] <= joinids[:-1]).any():
        order = np.argsort(joinids, kind="stable")
        joinids, tokens, keys = joinids[order], tokens[order], None if keys is None else keys[order]
    return _Cells(joinids, tokens, keys, primary)


def _key_maker(job: Job) -> KeyMaker | None:
    """Return what makes keys; None when obs lacks what they are made of: then every cell is computed."""
    if not set(KEY_COLUMNS) <= set(job.release.obs.keys()):
        return None
    seen = genes_in_order(job.genes.ids, job.checkpoint, job.settings.gene_order)
    return KeyMaker(dataset_digests(job.release, job.genes.ids, seen), job.checkpoint.aux_column)


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
        As `survey` does, or when an array of another identity, an unfinished removal or something else is in the
        way.
    """
    require_not_begun(job.store, job.folder)
    found = survey(job)
    # First, so that nothing is written when an array of another identity is there.
    job.store.make_place(job.folder.root)
    EmbeddingsArray.create(job.folder.array, job.store, job.identity, job.release.obs_rows())
    write_obs_ids(job.store, job.folder.obs_ids, found.joinids)
    totals, division, sources = found.summary.totals, found.division, found.sources
    if found.keys is not None:
        write_keys(job.store, Plan(totals, (), job.folder.plan).keys, found.joinids, found.keys)
    joinids = found.joinids
    if division.order is not None:
        joinids, sources = joinids[division.order], None if sources is None else sources[division.order]
    # Last: a current plan is a complete one.
    write_plan(job.store, job.folder.plan, joinids, division.megabatches, totals, sources)
    return found.summary
