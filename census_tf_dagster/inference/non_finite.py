"""Finds the cells that cause values that are not finite in a row, and computes those cells again in float32.

In a packed row, a cell whose values are not finite harms its neighbours: a masked key still multiplies its value, and
0 x NaN is NaN. Cells that are computed one by one do not influence each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.packing import PackedCells, Row, assemble, choose_cells

Positions = npt.NDArray[np.int64]
Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowResult:
    """The final embeddings of a row.

    Attributes
    ----------
    embeddings
        float32 ``(n_cells, embed_dim)``, NaN for cells that are set aside.
    set_aside
        The reason for each cell without an embedding, by its position in the packed cells.
    widened
        Positions of the cells that were computed in float32.
    """

    embeddings: Embeddings
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: list[int] = field(default_factory=list)


@dataclass
class NonFiniteCells:
    """Recomputes the cells of a row that has values that are not finite.

    Attributes
    ----------
    model, precision
        The model that computed the row, and its precision.
    load_wider
        Loads the model in float32; None if `precision` is float32.
    most_tokens
        Most tokens that are computed at once, cell by cell. No cell has more.
    """

    model: Model
    precision: str
    load_wider: Callable[[], Model] | None
    most_tokens: int
    _wider: Model | None = None

    def __call__(self, row: Row, embeddings: Embeddings, row_length: int | None) -> RowResult:
        """Return the final embeddings of a row, after recomputing cells whose values are not finite.

        Parameters
        ----------
        row
            The cells.
        embeddings
            The model's embeddings of the row, float32 ``(n_cells, embed_dim)``.
        row_length
            The row length that the model used; None if it computed cell by cell.

        Raises
        ------
        torch.OutOfMemoryError
            When memory does not suffice in `precision`.
        """
        found = RowResult(embeddings.copy())
        culprits = _not_finite(embeddings)
        if row_length is not None:
            culprits = self._without_neighbours(row, found.embeddings, culprits, row_length)
        if len(culprits):
            self._widen(row, found, culprits)
        return found

    def _without_neighbours(self, row: Row, embeddings: Embeddings, suspects: Positions, row_length: int) -> Positions:
        """Write the embeddings of cells that only their neighbours harmed; return the other suspects."""
        alone = self._cell_by_cell(self.model, row, suspects)
        culprits = suspects[_not_finite(alone)]
        harmed = np.setdiff1d(suspects, culprits)
        # Rounding may keep a cell in range in one way of computing but not in the other.
        embeddings[harmed] = alone[np.isin(suspects, harmed)]
        if len(harmed) and len(culprits):
            # The row keeps its shape, so that values do not depend on the other cells in the row.
            again = self.model.embed(_with_harmless(row, culprits, self.model.pooled_from), row_length).cpu().numpy()
            sound = np.setdiff1d(harmed, _not_finite(again))
            embeddings[sound] = again[sound]
        return culprits

    def _widen(self, row: Row, found: RowResult, culprits: Positions) -> None:
        reason = f"Its embedding is not finite in {self.precision}"
        found.embeddings[culprits] = np.nan
        given_up = culprits
        if self.load_wider is None:
            reason += "."
        else:
            try:
                self._wider = self._wider or self.load_wider()
                wide = self._cell_by_cell(self._wider, row, culprits)
                given_up = culprits[_not_finite(wide)]
                saved = np.setdiff1d(culprits, given_up)
                found.embeddings[saved] = wide[np.isin(culprits, saved)]
                found.widened.extend(row.cells[saved].tolist())
                reason += ", nor in fp32."
            except torch.OutOfMemoryError:
                reason += ", and the device's memory does not suffice to compute it in fp32."
        found.set_aside.update(dict.fromkeys(row.cells[given_up].tolist(), reason))

    def _cell_by_cell(self, model: Model, row: Row, cells: Positions) -> Embeddings:
        """Embed cells of a row independently of each other; float32 ``(len(cells), embed_dim)``."""
        packed = PackedCells(row.tokens, row.bias, row.offsets)
        embeddings = np.empty((len(cells), model.shape.embed_dim), np.float32)
        for part in choose_cells(packed.lengths()[cells], self.most_tokens):
            embeddings[part] = model.embed(assemble(packed, cells[part])).cpu().numpy()
        return embeddings


def _not_finite(embeddings: Embeddings) -> Positions:
    return np.flatnonzero(~np.isfinite(embeddings).all(axis=1))


def _with_harmless(row: Row, cells: Positions, start: int) -> Row:
    """Return the row with all tokens of the given cells replaced by START."""
    tokens, bias = row.tokens.copy(), row.bias.copy()
    for cell in cells.tolist():
        part = slice(row.offsets[cell], row.offsets[cell + 1])
        tokens[part], bias[part] = start, math.log1p(1)
    return replace(row, tokens=tokens, bias=bias)
