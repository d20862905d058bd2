"""Copies the cells of a shard that the array of an earlier release already has. It needs no model and no Census.

Finding the earlier array belongs in `reuse_source`, computing the other cells in `embed_shard`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.plan import Megabatch, Source, read_plan
from census_tf_dagster.pipeline.context import PlannedContext
from census_tf_dagster.pipeline.reuse_source import open_source, source_error
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.mending import mend_shard
from census_tf_dagster.store.verification import require_shard
from census_tf_dagster.store.write_notes import NoteWriter, Written, read_notes

CELLS_AT_ONCE = 4096
"""Cells read at once. Several such reads make a megabatch, which one write commits."""


@dataclass
class CopySummary:
    """The progress of a run that copies a shard's cells.

    Attributes
    ----------
    plan, source
        Hash of the plan, and the array that cells are copied from; None if nothing is reused.
    cells, cells_copied, cells_before
        Reused cells of the shard, cells that this run copied, and cells that were committed before it.
    verified
        Whether the shard was read back. The function that completes the shard reads it back, this one or
        `embed_shard`.
    """

    plan: str
    source: Source | None
    cells: int
    cells_before: int
    megabatches: int
    megabatches_copied: int = 0
    cells_copied: int = 0
    seconds: float = 0.0
    verification_seconds: float = 0.0
    verified: bool = False

    def cells_per_second(self) -> float:
        """Return the rate of this run; 0 before the first commit."""
        return self.cells_copied / self.seconds if self.seconds else 0.0


def copy_shard(
    context: PlannedContext,
    shard: int,
    *,
    recompute: bool = False,
    report: Callable[[CopySummary], None] = lambda _: None,
) -> CopySummary:
    """Copy the reused cells of a shard of the current plan. A later run copies only what is missing or damaged.

    Parameters
    ----------
    context
        The planned set and release.
    shard
        Number of the shard.
    recompute
        Copy all reused cells again, even those that are committed.
    report
        Called after each committed megabatch.

    Raises
    ------
    UserError
        When the earlier array is no longer the verified one that the plan names.
    VerificationError
        When the values that were read back are not those of the plan.
    """
    plan = read_plan(context.store, context.folder.plan)
    batches = [batch for batch in plan.shard(shard) if batch.reused]
    array = EmbeddingsArray.repair(context.folder.array, context.store, context.identity)
    notes = read_notes(context.store, context.folder, plan, [shard])
    todo = list(batches) if recompute else missing_megabatches(array, plan, batches, notes)
    cells = sum(batch.cells for batch in batches)
    summary = CopySummary(
        plan.totals.plan, plan.totals.source, cells, cells - sum(batch.cells for batch in todo), len(batches)
    )
    notes_of_run = NoteWriter(context.store, context.folder, plan, shard)

    def copy(some: Sequence[Megabatch]) -> None:
        source = plan.totals.source
        if not some or source is None:
            return
        earlier = open_source(context, source)
        began = time.monotonic() - summary.seconds
        with earlier.reading() as values_of, array.writing() as write:
            for batch in some:
                ids, sources = plan.read_copies(context.store, batch)
                values = _gather(values_of, array.n_features, source, sources)
                notes_of_run.note(Written.of(batch, ids, values))
                write(ids, values)
                summary.seconds = time.monotonic() - began
                summary.megabatches_copied += 1
                summary.cells_copied += batch.cells
                report(summary)
        array.gather_metadata()

    copy(todo)
    started = time.monotonic()
    found = require_shard(array, plan, context.folder, shard)
    if found is not None and found.problems:
        mend_shard(array, plan, context.folder, shard, found, batches, copy)
    summary.verified = found is not None
    summary.verification_seconds = time.monotonic() - started
    return summary


def _gather(
    values_of: Callable[[slice | pa.Array], Iterator[pa.Table]],
    n_features: int,
    source: Source,
    joinids: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Read cells of the earlier array, in the order of `joinids`; float32 ``(n, n_features)``."""
    values = np.full((len(joinids), n_features), np.nan, np.float32)
    # Datasets stay together in each release, so ascending ids are near each other.
    order = np.argsort(joinids)
    ascending = joinids[order]
    for start in range(0, len(joinids), CELLS_AT_ONCE):
        wanted = ascending[start : start + CELLS_AT_ONCE]
        # Ids without a gap are read several times faster as a slice.
        whole = len(wanted) == wanted[-1] - wanted[0] + 1
        for table in values_of(slice(int(wanted[0]), int(wanted[-1])) if whole else pa.array(wanted)):
            rows = order[start + np.searchsorted(wanted, table["soma_dim_0"].to_numpy())]
            values[rows, table["soma_dim_1"].to_numpy()] = table["soma_data"].to_numpy()
    if (lacking := np.isnan(values).any(axis=1)).any():
        raise source_error(
            source, f"it lacks values of {np.count_nonzero(lacking)} cells, joinids {joinids[lacking][:10].tolist()}"
        )
    return values
