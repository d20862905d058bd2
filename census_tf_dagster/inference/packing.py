"""Several cells in one row of fixed length: which go together, and the row itself.

A cell is never split, so a row's end is lost where no cell fits. Rows are filled with the longest cell that
still fits, which leaves almost nothing (docs/performance.md).
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PackedCells:
    """The sequences of some cells, one after the other, without padding.

    Attributes
    ----------
    tokens
        Rows of the embedding table, int32 ``(n_tokens,)``.
    bias
        Added to the attention score of each token as a key, float32 ``(n_tokens,)``.
    offsets
        Where each cell starts, int64 ``(n_cells + 1,)``.
    """

    tokens: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each cell, int64 ``(n_cells,)``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Row:
    """Some cells, one after the other.

    Attributes
    ----------
    cells
        Positions of the cells in what was packed, int64 ``(n,)``.
    tokens, bias
        Table rows (int32) and attention biases (float32), ``(n_tokens,)``.
    offsets
        Where each cell starts, int64 ``(n + 1,)``.
    """

    cells: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    bias: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]


def choose_cells(
    lengths: npt.NDArray[np.int64], row_length: int, most_cells: int | None = None
) -> list[npt.NDArray[np.int64]]:
    """Divide cells among rows.

    Parameters
    ----------
    lengths
        Tokens of each cell, ``(n,)``.
    row_length
        Tokens in a row at most.
    most_cells
        Cells in a row at most; None: any number.

    Returns
    -------
    list of ndarray
        Positions in `lengths` of each row's cells, ascending; each position once.

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
    """Gather some cells into a row."""
    parts = [slice(packed.offsets[cell], packed.offsets[cell + 1]) for cell in cells.tolist()]
    return Row(
        cells=cells,
        tokens=np.concatenate([packed.tokens[part] for part in parts]),
        bias=np.concatenate([packed.bias[part] for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(packed.lengths()[cells])]),
    )
