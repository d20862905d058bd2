"""Counts of a megabatch's cells, read from the Census as CSR."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse

from census_tf_dagster.census.release import OrganismRelease
from census_tf_dagster.errors import UserError

_T = TypeVar("_T", bound=np.generic)


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

    rows, columns, values = [], [], []
    for table in release.counts.read(coords=(coords, slice(None))).tables():
        rows.append(np.searchsorted(joinids, table["soma_dim_0"].to_numpy()).astype(np.int32))
        columns.append(table["soma_dim_1"].to_numpy().astype(np.int32))
        values.append(table["soma_data"].to_numpy().astype(np.float32, copy=False))
    shape = (len(joinids), release.counts.shape[1])
    all_rows, all_values = _joined(rows, np.int32), _joined(values, np.float32)
    # Counted before duplicates are summed: a Census that was copied in part, or written twice, shows here. The
    # Census builder counts stored values, which may include zeros, so fewer alone is no fault.
    expressed, stated = np.bincount(all_rows[all_values != 0], minlength=len(joinids)), obs["nnz"].to_numpy()
    wrong = np.flatnonzero((expressed > stated) | ((expressed == 0) & (stated > 0)))
    if len(wrong):
        raise UserError(
            f"{len(wrong)} cells of {release.organism} in {release.uri} have other counts in X/raw than obs.nnz says, "
            f"joinids {joinids[wrong[:10]].tolist()} (the first: {expressed[wrong[0]]}, obs says {stated[wrong[0]]}). "
            "The Census is damaged or was copied only in part."
        )
    csr = scipy.sparse.coo_array((all_values, (all_rows, _joined(columns, np.int32))), shape=shape).tocsr()
    csr.sort_indices()
    _require_raw_counts(csr, joinids, release)
    return Cells(
        joinids=joinids,
        indptr=csr.indptr.astype(np.int64),
        columns=csr.indices.astype(np.int32, copy=False),
        values=csr.data,
        assays=tuple(obs[assay_column].to_pylist()),
    )


def _joined(parts: list[npt.NDArray[_T]], dtype: type[_T]) -> npt.NDArray[_T]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _require_raw_counts(csr: scipy.sparse.csr_array, joinids: npt.NDArray[np.int64], release: OrganismRelease) -> None:
    wrong = np.flatnonzero(~((csr.data >= 0) & (csr.data == np.rint(csr.data)) & np.isfinite(csr.data)))
    if len(wrong):
        rows = np.unique(np.searchsorted(csr.indptr, wrong, side="right") - 1)
        raise UserError(
            f"X/raw of {release.organism} in {release.uri} holds {len(wrong)} values that are no counts, e.g. "
            f"{csr.data[wrong[0]]!r} in cells with joinids {joinids[rows[:10]].tolist()}; expected "
            "non-negative integers."
        )
