"""Reads the counts of a megabatch's cells from the Census as CSR, and sets aside cells with impossible counts.

Turning counts into tokens belongs in `inference.tokens`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import LAYER, NNZ, OrganismRelease
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.compiled import compiled


@dataclass(frozen=True)
class Cells:
    """Cells whose counts can be embedded, in ascending order of joinid.

    Attributes
    ----------
    joinids
        soma_joinid of each cell, int64 ``(n,)``.
    indptr, columns, values
        Raw counts as CSR: int64 ``(n + 1,)``, int32 and float32 ``(nnz,)``. Columns are var joinids,
        ascending within a cell.
    assays
        Assay label of each cell.
    set_aside
        The reason for each requested cell that is missing here, by joinid.
    fractional
        How many of these cells have counts that are not whole numbers. Upstream uses such counts as they are.
    """

    joinids: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    assays: tuple[str, ...]
    set_aside: dict[int, str] = field(default_factory=dict)
    fractional: int = 0


def read_cells(
    release: OrganismRelease,
    joinids: npt.NDArray[np.int64],
    assay_column: str = "assay",
    *,
    whole_counts: bool = False,
) -> Cells:
    """Read raw counts and assays of the given cells; set aside cells whose counts cannot be right.

    A cell is set aside when a count is negative or not finite, when a gene occurs twice, or when obs and X/raw disagree
    about the number of its counts.

    Parameters
    ----------
    release
        The release to read from.
    joinids
        Ascending soma_joinids, int64 ``(n,)``.
    assay_column
        The obs column whose value becomes the auxiliary token.
    whole_counts
        Whether to set aside also cells with counts that are not whole numbers.

    Raises
    ------
    UserError
        When a cell is not in obs.
    """
    # A contiguous range is read several times faster as a slice than as a list of points.
    contiguous = len(joinids) == joinids[-1] - joinids[0] + 1
    coords = slice(int(joinids[0]), int(joinids[-1])) if contiguous else pa.array(joinids)

    names = ["soma_joinid", assay_column, *([NNZ] if release.has_nnz else [])]
    obs = release.obs.read(coords=(coords,), column_names=names).concat().sort_by("soma_joinid")
    found = obs["soma_joinid"].to_numpy()
    if not np.array_equal(found, joinids):
        missing = np.setdiff1d(joinids, found)
        raise UserError(
            f"{len(missing)} planned cells are not in obs of {release.organism} in {release.uri}, e.g. joinids "
            f"{missing[:10].tolist()}. Expected the Census that was planned, but it has changed since: restore it, or "
            "materialize obs_id_plan again."
        )

    tables = [
        (
            table["soma_dim_0"].to_numpy(),
            table["soma_dim_1"].to_numpy(),
            table["soma_data"].to_numpy().astype(np.float32, copy=False),
        )
        for table in release.counts.read(coords=(coords, slice(None))).tables()
    ]
    rows = [
        (ids - joinids[0] if contiguous else np.searchsorted(joinids, ids)).astype(np.int32) for ids, _, _ in tables
    ]
    stored, expressed = np.zeros((2, len(joinids)), np.int64)
    for row, (_, _, values) in zip(rows, tables, strict=True):
        _count(row, values, stored, expressed)
    # This finds a Census that was copied in part or written twice. The Census builder counts stored values, which may
    # include zeros, so fewer expressed genes than obs states are not an error.
    stated = obs[NNZ].to_numpy() if release.has_nnz else expressed
    reasons = {
        row: f"X/{LAYER} holds {expressed[row]} counts, and obs.{NNZ} states {stated[row]}"
        for row in np.flatnonzero((expressed > stated) | ((expressed == 0) & (stated > 0))).tolist()
    }
    indptr = np.concatenate([[0], np.cumsum(stored)])
    columns, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    filled = indptr[:-1].copy()
    for row, (_, genes, values) in zip(rows, tables, strict=True):
        _scatter(row, genes, values, filled, columns, counts)
    assays = obs[assay_column].to_pylist()
    return check_counts(joinids, indptr, columns, counts, assays, f"X/{LAYER}", reasons, whole_counts=whole_counts)


def check_counts(
    joinids: npt.NDArray[np.int64],
    indptr: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    counts: npt.NDArray[np.float32],
    assays: Sequence[str],
    where: str,
    reasons: Mapping[int, str] | None = None,
    *,
    whole_counts: bool = False,
) -> Cells:
    """Sort each cell's counts by column, in place, and set aside cells whose counts cannot be right.

    Parameters
    ----------
    joinids, indptr, columns, counts, assays
        As in `Cells`, with the columns in any order.
    where
        The matrix, for the reasons.
    reasons
        Reasons to set cells aside that are known already, by row.
    whole_counts
        Whether to set aside also cells with counts that are not whole numbers.
    """
    found = dict(reasons or {})

    def set_aside(wrong: npt.NDArray[np.bool_], why: Callable[[int], str]) -> None:
        for row in np.flatnonzero(wrong).tolist():
            found.setdefault(row, why(row))

    set_aside(_sort_rows(indptr, columns, counts), lambda _: f"{where} holds a gene twice")
    impossible, fractional = _check_counts(indptr, counts)
    set_aside(impossible >= 0, lambda row: f"{where} holds {counts[impossible[row]]!s}, which is not a count")
    if whole_counts:
        set_aside(
            fractional >= 0, lambda row: f"{where} holds {counts[fractional[row]]!s}, which is not a whole number"
        )
    kept = np.ones(len(joinids), np.bool_)
    kept[list(found)] = False
    if found:
        of_kept = np.repeat(kept, np.diff(indptr))
        columns, counts = columns[of_kept], counts[of_kept]
        indptr = np.concatenate([[0], np.cumsum(np.diff(indptr)[kept])])
        assays = [assay for assay, one in zip(assays, kept.tolist(), strict=True) if one]
    return Cells(
        joinids=joinids[kept],
        indptr=indptr,
        columns=columns,
        values=counts,
        assays=tuple(assays),
        set_aside={int(joinids[row]): why for row, why in sorted(found.items())},
        fractional=int(np.count_nonzero((fractional >= 0) & kept)),
    )


@compiled()
def _count(rows, values, stored, expressed):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        stored[rows[i]] += 1
        expressed[rows[i]] += values[i] != 0


@compiled()
def _scatter(rows, genes, values, filled, columns, counts):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        at = filled[rows[i]]
        columns[at] = genes[i]
        counts[at] = values[i]
        filled[rows[i]] = at + 1


@compiled()
def _sort_rows(indptr, columns, counts):  # type: ignore[no-untyped-def]
    """Sort each row by column, in place; return which rows have a column twice, bool ``(rows,)``."""
    twice = np.zeros(len(indptr) - 1, np.bool_)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        ascending = True
        for i in range(start + 1, stop):
            if columns[i] <= columns[i - 1]:
                ascending = False
                break
        if ascending:
            continue
        order = np.argsort(columns[start:stop])
        columns[start:stop] = columns[start:stop][order]
        counts[start:stop] = counts[start:stop][order]
        for i in range(start + 1, stop):
            if columns[i] == columns[i - 1]:
                twice[row] = True
    return twice


@compiled()
def _check_counts(indptr, counts):  # type: ignore[no-untyped-def]
    """Return where each row has its first impossible count, and its first fractional one; -1 if it has none."""
    impossible = np.full(len(indptr) - 1, -1, np.int64)
    fractional = np.full(len(indptr) - 1, -1, np.int64)
    for row in range(len(indptr) - 1):
        for i in range(indptr[row], indptr[row + 1]):
            if not (counts[i] >= 0 and np.isfinite(counts[i])):
                if impossible[row] < 0:
                    impossible[row] = i
            elif counts[i] != np.rint(counts[i]) and fractional[row] < 0:
                fractional[row] = i
    return impossible, fractional
