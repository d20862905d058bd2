"""Packs several cells into rows of fixed length: chooses which cells share a row, and assembles the row.

A cell is never split, so the end of a row stays empty if no cell fits. Each row is filled with the longest cell that
still fits, which leaves almost no space unused (docs/performance.md). Making tokens belongs in `tokens`.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PackedCells:
    """The token sequences of cells, one after the other, without padding.

    Attributes
    ----------
    tokens
        Rows of the embedding table, int32 ``(n_tokens,)``.
    bias
        Value added to the attention score of each token as a key, float32 ``(n_tokens,)``.
    offsets
        Start of each cell and end of the last, int64 ``(n_cells + 1,)``.
    """

    tokens: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each cell, int64 ``(n_cells,)``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Row:
    """The cells that the model computes at once, one after the other.

    Attributes
    ----------
    cells
        Positions of the cells in their `PackedCells`, int64 ``(n,)``.
    tokens, bias
        Table rows (int32) and attention biases (float32), ``(n_tokens,)``.
    offsets
        Start of each cell and end of the last, int64 ``(n + 1,)``.
    """

    cells: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]


def choose_cells(
    lengths: npt.NDArray[np.int64], row_length: int, most_cells: int | None = None
) -> list[npt.NDArray[np.int64]]:
    """Distribute cells over rows.

    Parameters
    ----------
    lengths
        Tokens of each cell, int64 ``(n,)``.
    row_length
        Most tokens in a row.
    most_cells
        Most cells in a row; None: any number.

    Returns
    -------
    list of ndarray
        Positions in `lengths` of each row's cells, int64, ascending; each position occurs once.

    Raises
    ------
    ValueError
        When a cell is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a cell of {lengths.max()} tokens does not fit a row of {row_length}")
    waiting: dict[int, deque[int]] = {}
    for cell, length in enumerate(lengths.tolist()):
        waiting.setdefault(length, deque()).append(cell)
    sizes = sorted(waiting)
    limit = most_cells or len(lengths)
    rows = []
    while sizes:
        free = row_length
        row: list[int] = []
        while len(row) < limit and (fitting := bisect_right(sizes, free)):
            size = sizes[fitting - 1]
            row.append(waiting[size].popleft())
            free -= size
            if not waiting[size]:
                sizes.pop(fitting - 1)
        rows.append(np.sort(np.array(row, np.int64)))
    return rows


def assemble(packed: PackedCells, cells: npt.NDArray[np.int64]) -> Row:
    """Assemble the cells at these positions into a row."""
    parts = [slice(packed.offsets[cell], packed.offsets[cell + 1]) for cell in cells.tolist()]
    return Row(
        cells=cells,
        tokens=np.concatenate([packed.tokens[part] for part in parts]),
        bias=np.concatenate([packed.bias[part] for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(packed.lengths()[cells])]),
    )
