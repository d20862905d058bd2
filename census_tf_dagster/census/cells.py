"""Counts of a megabatch's cells, read from the Census as CSR."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import OrganismRelease
from census_tf_dagster.compiled import compiled
from census_tf_dagster.errors import UserError


@dataclass(frozen=True)
class Cells:
    """Some cells, in ascending order of joinid.

    Attributes
    ----------
    joinids
        soma_joinid of each cell, int64 ``(n,)``.
    indptr, columns, values
        Raw counts as CSR: int64 ``(n + 1,)``, int32 and float32 ``(nnz,)``. Columns are var joinids,
        ascending within a cell.
    assays
        Assay label of each cell.
    """

    joinids: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    assays: tuple[str, ...]


def read_cells(release: OrganismRelease, joinids: npt.NDArray[np.int64], assay_column: str = "assay") -> Cells:
    """Read raw counts and assays of the given cells.

    Parameters
    ----------
    release
        Where to read.
    joinids
        Ascending soma_joinids.
    assay_column
        The obs column whose value becomes the auxiliary token.

    Raises
    ------
    UserError
        When a cell is missing, has more counts than obs says or none of them, or a count is negative, not an
        integer or not finite.
    """
    # A contiguous range is read several times faster as a slice than as a list of points.
    contiguous = len(joinids) == joinids[-1] - joinids[0] + 1
    coords = slice(int(joinids[0]), int(joinids[-1])) if contiguous else pa.array(joinids)

    names = ["soma_joinid", "nnz", assay_column]
    obs = release.obs.read(coords=(coords,), column_names=names).concat().sort_by("soma_joinid")
    found = obs["soma_joinid"].to_numpy()
    if not np.array_equal(found, joinids):
        missing = np.setdiff1d(joinids, found)
        raise UserError(
            f"{len(missing)} planned cells are not in {release.uri} {release.organism}, e.g. joinids "
            f"{missing[:10].tolist()}: the Census has changed since it was planned."
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
    # A Census that was copied in part, or written twice, shows here. The Census builder counts stored values, which
    # may include zeros, so fewer alone is no fault.
    stated = obs["nnz"].to_numpy()
    wrong = np.flatnonzero((expressed > stated) | ((expressed == 0) & (stated > 0)))
    if len(wrong):
        raise UserError(
            f"{len(wrong)} cells of {release.organism} in {release.uri} have other counts in X/raw than obs.nnz says, "
            f"joinids {joinids[wrong[:10]].tolist()} (the first: {expressed[wrong[0]]}, obs says {stated[wrong[0]]}). "
            "The Census is damaged or was copied only in part."
        )
    indptr = np.concatenate([[0], np.cumsum(stored)])
    columns, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    filled = indptr[:-1].copy()
    for row, (_, genes, values) in zip(rows, tables, strict=True):
        _scatter(row, genes, values, filled, columns, counts)
    twice = _sort_rows(indptr, columns, counts)
    if twice >= 0:
        raise UserError(
            f"X/raw of {release.organism} in {release.uri} holds a gene twice for the cell with joinid "
            f"{joinids[twice]}; expected one value for each cell and gene."
        )
    _require_raw_counts(indptr, counts, joinids, release)
    return Cells(joinids, indptr, columns, counts, tuple(obs[assay_column].to_pylist()))


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
    """Sort each row by column; return a row that has a column twice, or -1."""
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
                return row
    return -1


def _require_raw_counts(
    indptr: npt.NDArray[np.int64],
    counts: npt.NDArray[np.float32],
    joinids: npt.NDArray[np.int64],
    release: OrganismRelease,
) -> None:
    wrong = np.flatnonzero(~((counts >= 0) & (counts == np.rint(counts)) & np.isfinite(counts)))
    if len(wrong):
        rows = np.unique(np.searchsorted(indptr, wrong, side="right") - 1)
        raise UserError(
            f"X/raw of {release.organism} in {release.uri} holds {len(wrong)} values that are no counts, e.g. "
            f"{counts[wrong[0]]!r} in cells with joinids {joinids[rows[:10]].tolist()}; expected "
            "non-negative integers."
        )
