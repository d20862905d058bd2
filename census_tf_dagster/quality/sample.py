"""Chooses a fixed sample of a plan's cells, and reads cells of the array.

The sample consists of runs of adjacent cells. TileDB reads whole tiles (64 cells of 2,048 features), so reading single
cells would cost 64 times their size. Runs of 16 cost 4 times their size, and still include every large dataset.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.plan import Plan
from census_tf_dagster.store.array import EmbeddingsArray

SAMPLE_CELLS = 20_000
RUN = 16
SEED = 0
CELLS_AT_ONCE = 2048
MEGABATCHES_AT_ONCE = 256

Ids = npt.NDArray[np.int64]


def sampled_positions(megabatch_cells: npt.NDArray[np.int64], cells: int = SAMPLE_CELLS) -> list[Ids]:
    """Choose the sampled cells of each megabatch. The choice depends only on the numbers of cells.

    Parameters
    ----------
    megabatch_cells
        Number of cells of each megabatch, int64 ``(n_megabatches,)``.
    cells
        Size of the sample; all cells if there are no more.

    Returns
    -------
    list of ndarray
        Ascending positions within each megabatch.
    """
    if megabatch_cells.sum() <= cells:
        return [np.arange(count) for count in megabatch_cells]
    # Runs are counted from each megabatch's start, so that a run lies within one tile.
    runs = -(-megabatch_cells // RUN)
    chosen = np.sort(np.random.default_rng(SEED).choice(runs.sum(), size=-(-cells // RUN), replace=False))
    ends = np.cumsum(runs)
    megabatch_of_run = np.searchsorted(ends, chosen, side="right")
    starts = (chosen - (ends - runs)[megabatch_of_run]) * RUN
    positions = []
    for megabatch, count in enumerate(megabatch_cells):
        mine = megabatch_of_run == megabatch
        found = (starts[mine][:, None] + np.arange(RUN)).reshape(-1) if mine.any() else starts[:0]
        positions.append(found[found < count])
    return positions


def iter_planned(plan: Plan, array: EmbeddingsArray) -> Iterator[tuple[int, Ids]]:
    """Yield the index and the ids of each megabatch, with a bounded number of megabatches in memory."""
    for start in range(0, len(plan.megabatches), MEGABATCHES_AT_ONCE):
        batches = plan.megabatches[start : start + MEGABATCHES_AT_ONCE]
        yield from zip((batch.index for batch in batches), plan.read_ids(array.storage, batches), strict=True)


def read_embeddings(array: EmbeddingsArray, joinids: Ids) -> npt.NDArray[np.float32]:
    """Read the embeddings of cells.

    Parameters
    ----------
    array
        The array to read from.
    joinids
        Ascending joinids, int64 ``(n,)``. Each must be in the array with all its values.

    Returns
    -------
    ndarray
        float32 ``(n, n_features)``.

    Raises
    ------
    ValueError
        When cells are missing.
    """
    values = np.full((len(joinids), array.n_features), np.nan, np.float32)
    with array.reading() as read:
        for start in range(0, len(joinids), CELLS_AT_ONCE):
            ids = joinids[start : start + CELLS_AT_ONCE]
            for table in read(pa.array(ids)):
                rows = np.searchsorted(ids, table["soma_dim_0"].to_numpy()) + start
                values[rows, table["soma_dim_1"].to_numpy()] = table["soma_data"].to_numpy()
    missing = joinids[np.isnan(values).any(axis=1)]
    if len(missing):
        raise ValueError(f"{len(missing)} cells are not in {array.uri}, e.g. joinids {missing[:10].tolist()}")
    return values


def digest(joinids: Ids) -> str:
    """Return a digest of the joinids of a sample."""
    return hashlib.sha256(joinids.astype("<i8").tobytes()).hexdigest()[:16]
