"""Step 1: list the cells, split them, write the plan, create the array."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import tiledb

from census_tf_dagster.census.cell_keys import Keys
from census_tf_dagster.census.cells import Cells, read_cells
from census_tf_dagster.census.division import divide
from census_tf_dagster.census.gene_check import expressing_cells, look_at_genes, require_organism
from census_tf_dagster.census.key_file import find_cells, write_keys
from census_tf_dagster.census.plan import Megabatch, Plan, PlanTotals, plan_totals, with_checksums, write_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.list_cells import filter_warnings, list_cells
from census_tf_dagster.pipeline.reuse_source import NO_SOURCE, FoundSource, find_source
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.obs_ids import write_planned
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
    warnings
        What a person should look at before the shards run: labels that the value filter misses, gene ids that hardly
        belong to the counts, what the release does not say.
    gene_check
        What speaks for the gene ids.
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
    warnings: tuple[str, ...] = ()
    gene_check: str = ""

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
    joinids, zero_counts
        Ascending soma_joinids, int64, and which of these cells have no counts; None where obs does not say.
    megabatches, order
        How they are divided, and their positions in that order; None: as they are.
    summary
        What it amounts to.
    keys
        By which a later release finds these cells; None for sets without `reuse`.
    sources
        Where each cell stands in the earlier array, -1 where it is computed; None when nothing is reused.
    """

    joinids: npt.NDArray[np.int64]
    zero_counts: npt.NDArray[np.bool_] | None
    megabatches: tuple[Megabatch, ...]
    order: npt.NDArray[np.int64] | None
    summary: PlanSummary
    keys: Keys | None
    sources: npt.NDArray[np.int64] | None


def survey(context: ReleaseContext) -> Survey:
    """List and divide the cells; write nothing.

    Raises
    ------
    UserError
        When no cell matches, the checkpoint hardly knows the organism, or counts are none.
    """
    settings, release = context.settings, context.release
    require_organism(context.genes.ids, settings.organism)
    known = np.array([context.checkpoint.knows(gene) for gene in context.genes.ids])
    expressing = context.genes.cells_expressing
    if expressing is not None:
        _require_known(context, known, expressing)
    cells = list_cells(context)
    joinids = cells.joinids
    # A Census of normalised values should not cost a shard's start on a GPU node first.
    sample = _look_at_counts(context, joinids[:: -(-len(joinids) // SAMPLED_CELLS)])
    sampled = expressing_cells(sample, len(known))
    tokens = cells.tokens
    if expressing is None:
        expressing = sampled
        _require_known(context, known, expressing)
    if tokens is None:
        window = context.checkpoint.shape.seq_len - 1
        mean = np.minimum(np.diff(sample.indptr), window).mean() + 2
        tokens = np.full(len(joinids), round(mean), np.int32)
    genes = look_at_genes(context.genes, settings.organism, sampled, len(sample.joinids))
    warnings = [*filter_warnings(context, len(joinids)), *genes.doubts]
    if not release.has_nnz:
        warnings.append(
            f"obs of this release does not say how many genes cells express (schema 1.0): tokens are those of "
            f"{len(sample.joinids)} cells, shards have equal numbers of cells, and cells without counts are not named."
        )
    if sample.fractional:
        warnings.append(
            f"{sample.fractional} of {len(sample.joinids)} sampled cells have counts that are not whole numbers. They "
            "are embedded as they are, as upstream does; to leave such cells out, set `fractional_counts: set_aside`."
        )

    found, sources = _find_copies(context, cells.keys)
    reused = None if sources is None else sources >= 0
    division = divide(joinids, tokens, settings.shards, settings.megabatch_size, reused)
    ids, copied = _in_order(division.order, joinids, sources)
    megabatches = with_checksums(division.megabatches, ids, copied)
    summary = PlanSummary(
        totals=replace(
            plan_totals(megabatches, settings.shards, cells.primary, found.source),
            cells_without_counts=None if cells.zero_counts is None else int(cells.zero_counts.sum()),
        ),
        estimated_bytes=int(
            len(joinids) * context.identity.embedding_dim * BYTES_PER_VALUE[settings.storage_precision]
        ),
        expressed_genes=int(np.count_nonzero(expressing)),
        known_genes=int(np.count_nonzero(expressing[known])),
        known_share=_share(expressing, known),
        storage_versions=(_storage_version(context), context.release.storage_version()),
        root=context.folder.root,
        identity=context.identity.digest,
        passed_over=found.passed_over,
        warnings=tuple(warnings),
        gene_check=str(genes),
    )
    return Survey(joinids, cells.zero_counts, megabatches, division.order, summary, cells.keys, sources)


def _look_at_counts(context: ReleaseContext, sample: npt.NDArray[np.int64]) -> Cells:
    """Read some cells; refuse a Census that would have most of them set aside."""
    whole = context.settings.fractional_counts == "set_aside"
    cells = read_cells(context.release, sample, context.checkpoint.aux_column, whole_counts=whole)
    if len(cells.set_aside) > len(sample) / 2:
        joinid, reason = next(iter(cells.set_aside.items()))
        raise UserError(
            f"{len(cells.set_aside)} of {len(sample)} sampled cells of {context.release.organism} in {context.release.uri} "
            f"cannot be embedded, e.g. joinid {joinid}: {reason}. Expected raw counts: use a Census that has them."
        )
    return cells


def _in_order(
    order: npt.NDArray[np.int64] | None, joinids: npt.NDArray[np.int64], sources: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    if order is None:
        return joinids, sources
    return joinids[order], None if sources is None else sources[order]


def _share(expressing: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> float:
    """Return the share of expressed (cell, gene) pairs whose gene is known."""
    return float(expressing[known].sum() / max(expressing.sum(), 1))


def _require_known(context: ReleaseContext, known: npt.NDArray[np.bool_], expressing: npt.NDArray[np.int64]) -> None:
    """Refuse a checkpoint that hardly knows the organism's genes."""
    settings, share = context.settings, _share(expressing, known)
    if share < LEAST_KNOWN_SHARE:
        raise UserError(
            f"{settings.checkpoint} knows {share:.1%} of what cells of {settings.organism} express "
            f"({np.count_nonzero(known)} of {len(known)} genes; the Census has {', '.join(context.genes.ids[:3])}, ...); "
            f"at least {LEAST_KNOWN_SHARE:.0%} is expected. For a species outside its vocabulary set "
            "`pretrained_embeddings`, or choose another checkpoint."
        )


def _find_copies(context: ReleaseContext, keys: Keys | None) -> tuple[FoundSource, npt.NDArray[np.int64] | None]:
    """Find the earlier array to copy from, and where each cell stands in it; -1: it is computed, None: all are."""
    if keys is None:
        return NO_SOURCE, None
    found = find_source(context)
    if found.source is None:
        return found, None
    try:
        sources = find_cells(context.store, found.keys, keys)
    except UserError as error:
        return FoundSource(None, "", (*found.passed_over, str(error))), None
    sources[np.isin(sources, np.array(found.set_aside, np.int64))] = -1
    if not (sources >= 0).any():
        reason = f"{found.source.root}: no cell is the same, with the same genes in the same order"
        return FoundSource(None, "", (*found.passed_over, reason)), None
    return found, sources


def _storage_version(context: ReleaseContext) -> int:
    """Return the storage version of the array that is there, else the one that TileDB here would create."""
    if context.store.holds_files(context.folder.array):
        found, _ = EmbeddingsArray.look(context.folder.array, context.store)
        return context.store.storage_version(found.uri)
    # A schema that was not stored has the version of the library; tiledbsoma carries the same core.
    domain = tiledb.Domain(tiledb.Dim("soma_dim_0", domain=(0, 1), dtype="int64"))
    return int(tiledb.ArraySchema(domain, [tiledb.Attr("soma_data", dtype="float32")], sparse=True).version)


def make_plan(context: ReleaseContext) -> PlanSummary:
    """Plan a release. Equal inputs give an equal plan; nothing of an earlier one changes.

    Raises
    ------
    UserError
        As `survey` does, or when an array of another identity, an unfinished removal or something else is in the
        way.
    """
    require_not_begun(context.store, context.folder)
    found = survey(context)
    # First, so that nothing is written when an array of another identity is there.
    context.store.make_place(context.folder.root)
    EmbeddingsArray.create(context.folder.array, context.store, context.identity, context.release.obs_rows())
    listed = write_planned(context.store, context.folder, found.joinids, found.zero_counts)
    totals = replace(found.summary.totals, obs_ids=listed)
    if found.keys is not None:
        write_keys(context.store, Plan(totals, (), context.folder.plan).keys, found.joinids, found.keys)
    joinids, sources = _in_order(found.order, found.joinids, found.sources)
    # Last: a current plan is a complete one.
    write_plan(context.store, context.folder.plan, joinids, found.megabatches, totals, sources)
    return replace(found.summary, totals=totals)
