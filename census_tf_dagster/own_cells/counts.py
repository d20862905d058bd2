"""Tells counts from values that were made of counts, by looking at a few cells."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse

from census_tf_dagster.errors import UserError
from census_tf_dagster.own_cells.source import CellSource, Matrix

LOOKED_AT = 200
"""Cells that are looked at, the first ones."""
LEAST_JUDGED = 3
MOST_CELLS = 0.5
"""Share of cells from which on a finding is one about the matrix, not about some cells."""
HIGHEST_LEVEL = 50
CLOSE = 0.02


def require_counts(source: CellSource, matrix: Matrix) -> None:
    """Raise an error if a matrix holds normalised or scaled values.

    Counts that are not whole numbers pass: methods that remove ambient RNA give such counts.

    Raises
    ------
    UserError
        With the other matrices of these cells that hold counts.
    """
    cells = min(LOOKED_AT, source.n_cells)
    rows = matrix.rows(0, cells)
    found = describe(rows) if rows.count_nonzero() else f"no count in the first {cells} cells"
    if found is None:
        return
    others = [name for name in source.matrices if _holds_counts(source, name, matrix.name)]
    remedy = (
        f"Give `layer={others[0]!r}`, which has whole numbers."
        if others
        else f"No other matrix of it has whole numbers (it has {', '.join(source.matrices)}): get the counts."
    )
    raise UserError(f"{matrix.name} of {source.name} holds {found}; expected raw counts. {remedy}")


def _holds_counts(source: CellSource, name: str, but: str) -> bool:
    try:
        matrix = source.matrices[name]()
        values = matrix.rows(0, min(LOOKED_AT, source.n_cells)).data
    except UserError:
        return False
    return matrix.name != but and bool(len(values) and np.array_equal(values, np.rint(values)) and values.min() >= 0)


def describe(rows: scipy.sparse.csr_matrix) -> str | None:
    """Say what the values of some cells are if they are no counts; None if they may be counts."""
    cells = [np.asarray(rows.data[a:b], np.float64) for a, b in zip(rows.indptr[:-1], rows.indptr[1:], strict=True)]
    cells = [cell[cell != 0] for cell in cells]
    cells = [cell for cell in cells if len(cell) and np.isfinite(cell).all()]
    negative = [cell for cell in cells if cell.min() < 0]
    if len(negative) > MOST_CELLS * len(cells):
        return f"scaled values (for example {negative[0].min():.3g})"
    fractional = [cell for cell in cells if cell.min() > 0 and not np.array_equal(cell, np.rint(cell))]
    if len(fractional) <= MOST_CELLS * len(cells):
        return None
    kinds: dict[str, Callable[[Any], Any]] = {
        "log-normalised values": np.expm1,
        "log2-normalised values": lambda values: np.exp2(values) - 1,
        "normalised values": lambda values: values,
    }
    for kind, undo in kinds.items():
        with np.errstate(over="ignore"):
            judged = [fits for cell in fractional if (fits := _are_multiples(undo(cell))) is not None]
        if len(judged) >= min(LEAST_JUDGED, len(fractional)) and sum(judged) > 0.9 * len(judged):
            return f"{kind} (for example {fractional[0].min():.6g})"
    return None


def _are_multiples(values: Any) -> bool | None:
    """Tell whether all values are whole multiples of the least one, as counts times a factor are; None: too few."""
    if not np.isfinite(values).all():
        return False
    levels = values / values.min()
    levels = levels[levels < HIGHEST_LEVEL]
    if len(np.unique(np.rint(levels))) < 2:
        return None
    return bool((np.abs(levels - np.rint(levels)) < CLOSE).all())
