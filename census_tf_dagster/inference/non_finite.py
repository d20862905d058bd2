"""A second look at a row in which values are not finite: which cells are to blame, and whether float32 helps them.

In a packed row a cell whose values are not finite harms its neighbours: a masked key still multiplies its value, and
0 x NaN is NaN. Computed cell by cell, each is on its own.
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
    """What became of the cells of a row.

    Attributes
    ----------
    embeddings
        float32 ``(n_cells, embed_dim)``, NaN for cells that are set aside.
    set_aside
        Why a cell has no embedding, by its position in what was packed.
    widened
        Positions of the cells that were computed in float32.
    """

    embeddings: Embeddings
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: list[int] = field(default_factory=list)


@dataclass
class SecondLook:
    """Judges rows with values that are not finite.

    Attributes
    ----------
    model, precision
        What computed the row.
    load_wider
        Loads the model in float32; None where nothing is wider.
    most_tokens
        Tokens that are computed at once, cell by cell; no cell has more.
    """

    model: Model
    precision: str
    load_wider: Callable[[], Model] | None
    most_tokens: int
    _wider: Model | None = None

    def __call__(self, row: Row, embeddings: Embeddings, row_length: int | None) -> RowResult:
        """Judge the cells of a row.

        Parameters
        ----------
        row
            The cells.
        embeddings
            What the model made of them, float32 ``(n_cells, embed_dim)``.
        row_length
            As the model was given it: None where cells were computed one by one.

        Raises
        ------
        torch.OutOfMemoryError
            When memory does not suffice in the row's own precision.
        """
        found = RowResult(embeddings.copy())
        culprits = _not_finite(embeddings)
        if row_length is not None:
            culprits = self._without_neighbours(row, found.embeddings, culprits, row_length)
        if len(culprits):
            self._widen(row, found, culprits)
        return found

    def _without_neighbours(self, row: Row, embeddings: Embeddings, suspects: Positions, row_length: int) -> Positions:
        """Give the cells that were only harmed their values; return the others."""
        alone = self._cell_by_cell(self.model, row, suspects)
        culprits = suspects[_not_finite(alone)]
        harmed = np.setdiff1d(suspects, culprits)
        # Rounding may keep a cell in range in one way of computing and not in the other.
        embeddings[harmed] = alone[np.isin(suspects, harmed)]
        if len(harmed) and len(culprits):
            # In the same shape, so that values do not depend on who was in the row.
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
        """Embed some cells of a row, each independent of the others; float32 ``(len(cells), embed_dim)``."""
        packed = PackedCells(row.tokens, row.bias, row.offsets)
        embeddings = np.empty((len(cells), model.shape.embed_dim), np.float32)
        for part in choose_cells(packed.lengths()[cells], self.most_tokens):
            embeddings[part] = model.embed(assemble(packed, cells[part])).cpu().numpy()
        return embeddings


def _not_finite(embeddings: Embeddings) -> Positions:
    return np.flatnonzero(~np.isfinite(embeddings).all(axis=1))


def _with_harmless(row: Row, cells: Positions, start: int) -> Row:
    """Replace the tokens of some cells by START."""
    tokens, bias = row.tokens.copy(), row.bias.copy()
    for cell in cells.tolist():
        part = slice(row.offsets[cell], row.offsets[cell + 1])
        tokens[part], bias[part] = start, math.log1p(1)
    return replace(row, tokens=tokens, bias=bias)
