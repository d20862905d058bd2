"""Divides the cells of a plan into shards of about equal cost, and each shard into megabatches.

It works on arrays alone. Choosing the cells belongs in `pipeline.list_cells`, writing the plan in `plan`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.plan import Megabatch

Int64Array = npt.NDArray[np.int64]

COPY_TOKENS = 100
"""Cost of copying a cell, in tokens. In time a copy is worth several hundred tokens (about 1,500 cells/s per core
against 750,000 tokens/s per GPU), in money a few. With this value, a shard of copies takes about as long as others."""

_BLOCK = 2**16


@dataclass(frozen=True)
class Division:
    """The result of `divide`.

    Attributes
    ----------
    megabatches
        In the plan's order.
    order
        Positions of the cells in that order, int64 ``(n,)``; None: the order did not change.
    """

    megabatches: tuple[Megabatch, ...]
    order: Int64Array | None


def divide(
    joinids: Int64Array,
    tokens: npt.NDArray[np.integer],
    shards: int,
    megabatch_size: int,
    reused: npt.NDArray[np.bool_] | None = None,
) -> Division:
    """Cut ascending joinids into shards of about equal cost, and those into megabatches.

    Parameters
    ----------
    joinids
        Ascending soma_joinids, ``(n,)``.
    tokens
        Tokens of each of those cells, ``(n,)``.
    shards
        Number of shards; some are empty if there are fewer cells than shards.
    megabatch_size
        Cells in a megabatch; the last one of a shard may be smaller.
    reused
        Which cells are copied, bool ``(n,)``; None: no cell is. Copied and computed cells never share a megabatch. A
        megabatch never spans `megabatch_size` or more consecutive cells of the other kind. So ranges interleave little,
        and there are at most twice as many megabatches as without reuse.
    """
    weights = tokens if reused is None else np.where(reused, tokens.dtype.type(COPY_TOKENS), tokens)
    batches: list[Megabatch] = []
    chosen: list[Int64Array] = []
    for shard, (start, stop) in enumerate(_shard_edges(weights, shards)):
        # Each piece is (first position, positions, copied or not).
        pieces: list[tuple[int, slice | Int64Array, bool]] = []
        if reused is None:
            pieces += [
                (at, slice(at, min(at + megabatch_size, stop)), False) for at in range(start, stop, megabatch_size)
            ]
        else:
            for kind in (False, True):
                mine = start + np.flatnonzero(reused[start:stop] == kind)
                for stretch in np.split(mine, 1 + np.flatnonzero(np.diff(mine) > megabatch_size)):
                    parts = (stretch[at : at + megabatch_size] for at in range(0, len(stretch), megabatch_size))
                    pieces += [(int(part[0]), part, kind) for part in parts]
        for _, cells, kind in sorted(pieces, key=lambda piece: piece[0]):
            ids = joinids[cells]
            batches.append(
                Megabatch(
                    index=len(batches),
                    shard=shard,
                    first=int(ids[0]),
                    last=int(ids[-1]),
                    cells=len(ids),
                    tokens=int(tokens[cells].sum(dtype=np.int64)),
                    reused=kind,
                )
            )
            if not isinstance(cells, slice):
                chosen.append(cells)
    return Division(tuple(batches), np.concatenate(chosen) if chosen else None)


def _shard_edges(weights: npt.NDArray[np.integer], shards: int) -> list[tuple[int, int]]:
    """Return start and stop of each shard. It sums block by block: running sums would take 8 bytes per cell."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.int64)
    running = np.cumsum(sums)
    edges = [0]
    for target in running[-1] * np.arange(1, shards, dtype=np.float64) / shards:
        block = int(np.searchsorted(running, target, side="left"))
        inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.int64)
        before = running[block] - sums[block]
        edges.append(block * _BLOCK + int(np.searchsorted(inside + before, target, side="left")))
    return list(zip(edges, [*edges[1:], len(weights)], strict=True))
