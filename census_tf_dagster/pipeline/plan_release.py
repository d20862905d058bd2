"""Plans a release: lists the cells, checks a sample, divides the cells, writes the plan and creates the array.

The format of a plan belongs in `census.plan`, finding an earlier array to copy from in `reuse_source`.
"""

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
from census_tf_dagster.pipeline.planned_identity import write_planned_identity
from census_tf_dagster.pipeline.reuse_source import NO_SOURCE, FoundSource, find_source
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.obs_ids import write_planned
from census_tf_dagster.store.removal import require_no_removal

BYTES_PER_VALUE = {"bfloat16": 1.6, "float32": 3.8}
"""Stored bytes of a value with its coordinates, compressed; measured with 2,048 features (docs/performance.md)."""

LEAST_KNOWN_SHARE = 0.25
"""Least share of expressed genes that the checkpoint must know. With less, an embedding says little: the share of human
genes in a human model is near 0.9, that of other species near 0."""
SAMPLED_CELLS = 64
"""Number of cells whose counts are checked before anything is written."""


@dataclass(frozen=True)
class PlanSummary:
    """Facts about a plan that a person needs before the shards run.

    Attributes
    ----------
    totals
        Cells, tokens, shards.
    estimated_bytes
        Estimated size of the array, from measured bytes per value.
    expressed_genes, known_genes
        Genes that any cell expresses, and how many of those the checkpoint knows.
    known_share
        Share of all expressed (cell, gene) pairs whose gene the checkpoint knows, over the whole organism.
    storage_versions
        TileDB storage versions of the array and of the Census. If they differ, the Census's tool refuses the embedding.
    root, identity
        Folder of the array in the store, and digest of the identity.
    passed_over
        Earlier arrays from which cells could not be copied, each with the reason.
    warnings
        Messages that a person should read before the shards run: labels that the value filter misses, gene ids that
        do not seem to belong to the counts, facts that the release does not state.
    gene_check
        Evidence for the gene ids.
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
        """Return a sentence about how much is reused, from which array, and how much is computed."""
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
        """Number of cells that are copied from `totals.source`."""
        return self.totals.cells_reused

    @property
    def tokens_to_compute(self) -> int:
        """Largest number of tokens that go through the model."""
        return self.totals.tokens_to_compute


@dataclass(frozen=True)
class DraftPlan:
    """A plan before it is written.

    Attributes
    ----------
    joinids, zero_counts
        Ascending soma_joinids, int64 ``(n,)``, and which of these cells have no counts; None if obs does not state it.
    megabatches, order
        The megabatches, and the positions of the cells in their order; None: the order did not change.
    summary
        Facts about the plan.
    keys
        Keys with which a later release finds these cells; None for sets without `reuse`.
    sources
        Joinid of each cell in the earlier array, -1 for cells that are computed; None if nothing is reused.
    """

    joinids: npt.NDArray[np.int64]
    zero_counts: npt.NDArray[np.bool_] | None
    megabatches: tuple[Megabatch, ...]
    order: npt.NDArray[np.int64] | None
    summary: PlanSummary
    keys: Keys | None
    sources: npt.NDArray[np.int64] | None


def draft_plan(context: ReleaseContext) -> DraftPlan:
    """List, check and divide the cells; write nothing.

    Raises
    ------
    UserError
        When no cell matches, the checkpoint knows too few of the organism's genes, or the counts are not raw counts.
    """
    settings, release = context.settings, context.release
    require_organism(context.genes.ids, settings.organism)
    known = np.array([context.checkpoint.knows(gene) for gene in context.genes.ids])
    expressing = context.genes.cells_expressing
    if expressing is not None:
        _require_known(context, known, expressing)
    cells = list_cells(context)
    joinids = cells.joinids
    # Checking a sample here saves the start of a shard on a GPU node if the Census holds normalised values.
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
            f"obs of this release does not state how many genes cells express (schema 1.0). So tokens are estimated "
            f"from {len(sample.joinids)} cells, shards have equal numbers of cells, and no list names cells without "
            "counts."
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
    return DraftPlan(joinids, cells.zero_counts, megabatches, division.order, summary, cells.keys, sources)


def _look_at_counts(context: ReleaseContext, sample: npt.NDArray[np.int64]) -> Cells:
    """Read the sampled cells; raise an error if most of them would be set aside."""
    whole = context.settings.fractional_counts == "set_aside"
    cells = read_cells(context.release, sample, context.checkpoint.aux_column, whole_counts=whole)
    if len(cells.set_aside) > len(sample) / 2:
        joinid, reason = next(iter(cells.set_aside.items()))
        raise UserError(
            f"{len(cells.set_aside)} of {len(sample)} sampled cells of {context.release.organism} in "
            f"{context.release.uri} cannot be embedded, e.g. joinid {joinid}: {reason}. Expected raw counts: use a "
            "Census that has them."
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
    """Raise an error if the checkpoint knows too few of the organism's genes."""
    settings, share = context.settings, _share(expressing, known)
    if share < LEAST_KNOWN_SHARE:
        raise UserError(
            f"{settings.checkpoint} knows {share:.1%} of the genes that cells of {settings.organism} express "
            f"({np.count_nonzero(known)} of {len(known)} genes; the Census has {', '.join(context.genes.ids[:3])}, "
            f"...); expected at least {LEAST_KNOWN_SHARE:.0%}. For a species outside its vocabulary, set "
            "`pretrained_embeddings`, or choose another checkpoint."
        )


def _find_copies(context: ReleaseContext, keys: Keys | None) -> tuple[FoundSource, npt.NDArray[np.int64] | None]:
    """Find the earlier array, and each cell's joinid in it; -1 for a computed cell, None if all are computed."""
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
        reason = f"{found.source.root}: it has no cell with the same counts and the same genes in the same order"
        return FoundSource(None, "", (*found.passed_over, reason)), None
    return found, sources


def _storage_version(context: ReleaseContext) -> int:
    """Return the storage version of the existing array, or else the one that this TileDB would create."""
    if context.store.holds_files(context.folder.array):
        found, _ = EmbeddingsArray.look(context.folder.array, context.store)
        return context.store.storage_version(found.uri)
    # A schema that is not stored has the version of the library. tiledbsoma contains the same core.
    domain = tiledb.Domain(tiledb.Dim("soma_dim_0", domain=(0, 1), dtype="int64"))
    return int(tiledb.ArraySchema(domain, [tiledb.Attr("soma_data", dtype="float32")], sparse=True).version)


def make_plan(context: ReleaseContext) -> PlanSummary:
    """Plan a release. Equal inputs give an equal plan, and earlier plans do not change.

    Raises
    ------
    UserError
        When `draft_plan` raises it, or when an array of another identity, an unfinished removal or other files are in
        the folder.
    """
    require_no_removal(context.store, context.folder)
    draft = draft_plan(context)
    # This comes first, so that nothing is written if an array of another identity exists.
    context.store.make_place(context.folder.root)
    EmbeddingsArray.create(context.folder.array, context.store, context.identity, context.release.obs_rows())
    listed = write_planned(context.store, context.folder, draft.joinids, draft.zero_counts)
    totals = replace(draft.summary.totals, obs_ids=listed)
    if draft.keys is not None:
        write_keys(context.store, Plan(totals, (), context.folder.plan).keys, draft.joinids, draft.keys)
    joinids, sources = _in_order(draft.order, draft.joinids, draft.sources)
    write_planned_identity(context.store, context.folder, context.settings, context.identity)
    # This comes last, so that a current plan is complete.
    write_plan(context.store, context.folder.plan, joinids, draft.megabatches, totals, sources)
    return replace(draft.summary, totals=totals)
