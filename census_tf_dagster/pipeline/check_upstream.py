"""Compares a few cells of a shard with upstream's own code, on the shard's device, while the shard is read back.

Starting upstream belongs in `upstream`, the comparison itself in `quality.upstream_comparison`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.plan import Plan, to_compute
from census_tf_dagster.config.thresholds import upstream_bound
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import EmbeddingContext
from census_tf_dagster.pipeline.upstream import upstream_running
from census_tf_dagster.quality.sample import SEED, read_embeddings
from census_tf_dagster.quality.upstream_comparison import NOT_INSTALLED, UpstreamComparison
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.write_notes import read_notes

CELLS = 8
PATIENCE_SECONDS = 1800.0
"""How long upstream may take. A process that hangs must not occupy a GPU node."""


@contextmanager
def checking_upstream(
    context: EmbeddingContext, plan: Plan, array: EmbeddingsArray, shard: int, command: Path | None, *, anew: bool
) -> Iterator[Callable[[], UpstreamComparison | None]]:
    """Start upstream on a few cells of a committed shard.

    An error of upstream is reported in the result and never raised, because the shard is complete and verified without
    this comparison.

    Parameters
    ----------
    context, plan, array, shard
        The shard whose cells are compared.
    command
        Upstream's ``transcriptformer``; None: it is not installed.
    anew
        Whether values have changed, so that an earlier comparison no longer holds.

    Yields
    ------
    Callable
        Waits for upstream, compares, stores and returns the comparison; None for a shard that computes no cells.
    """
    uri = context.folder.comparison(plan.totals.plan, shard)
    stored = None if anew else UpstreamComparison.read(context.store, uri)
    if not to_compute(plan.shard(shard)) or (stored is not None and (command is None or not stored.not_done)):
        yield lambda: stored
        return
    bound = upstream_bound(context.settings.compute_precision, context.settings.storage_precision)
    with ExitStack() as stack:
        try:
            compare = _start(context, plan, array, shard, command, bound, stack)
        except Exception as error:
            compare = _not_done(shard, bound, error)

        def finish() -> UpstreamComparison:
            try:
                found = compare()
            except Exception as error:
                found = _not_done(shard, bound, error)()
            found.write(context.store, uri)
            return found

        yield finish


def _start(
    context: EmbeddingContext,
    plan: Plan,
    array: EmbeddingsArray,
    shard: int,
    command: Path | None,
    bound: float,
    stack: ExitStack,
) -> Callable[[], UpstreamComparison]:
    if command is None:
        raise UserError(NOT_INSTALLED)
    began = time.monotonic()
    joinids = _choose(context, plan, shard)
    cells = context.read_cells(joinids)
    # The heads that upstream computes for each cell take a GB of memory in the published models.
    answer = stack.enter_context(upstream_running(context, cells, command, batch_size=1))

    def compare() -> UpstreamComparison:
        upstreams = answer(PATIENCE_SECONDS)
        seconds = time.monotonic() - began
        return UpstreamComparison.compare(shard, joinids, read_embeddings(array, joinids), upstreams, bound, seconds)

    return compare


def _not_done(shard: int, bound: float, error: Exception) -> Callable[[], UpstreamComparison]:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return lambda: UpstreamComparison(shard, (), bound, not_done=reason)


def _choose(context: EmbeddingContext, plan: Plan, shard: int) -> npt.NDArray[np.int64]:
    """Choose cells of megabatches that are spread over the shard; the choice is always the same."""
    batches = to_compute(plan.shard(shard))
    spread = [batches[i] for i in np.unique(np.linspace(0, len(batches) - 1, CELLS).astype(int))]
    ids = np.concatenate(plan.read_ids(context.store, spread))
    noted = read_notes(context.store, context.folder, plan, [shard])
    without = [joinid for notes in noted.values() for note in notes for joinid in note.set_aside]
    ids = np.setdiff1d(ids, np.array(without, np.int64))
    rng = np.random.default_rng([SEED, shard])
    return np.sort(rng.choice(ids, min(CELLS, len(ids)), replace=False))
