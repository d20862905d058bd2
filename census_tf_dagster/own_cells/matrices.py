"""Reads blocks of rows from a matrix of counts, whatever holds it: scipy, numpy, HDF5, zarr or SOMA."""

from collections.abc import Callable
from typing import Any, TypeAlias

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse
import tiledbsoma
import zarr
from anndata.abc import CSCDataset, CSRDataset

from census_tf_dagster.errors import UserError

Rows: TypeAlias = "Callable[[int, int], scipy.sparse.csr_matrix]"
"""Returns the rows from the first position to before the second, columns ascending, each at most once."""

VALUES_AT_ONCE = 2**24
"""Stored values of a CSC matrix that are read together."""
MOST_VALUES_KEPT = 2**26
"""Stored values that a group of rows of a CSC matrix may have on average; 12 bytes each."""


def row_reader(matrix: Any, where: str) -> Rows:
    """Return the function that reads rows of a matrix.

    Parameters
    ----------
    matrix
        A sparse matrix of scipy, a numpy array, or a matrix in an open HDF5 or zarr file.
    where
        Name of the matrix, for the error.

    Raises
    ------
    UserError
        When it is another object, or its values are not numbers.
    """
    if not isinstance(matrix, (CSRDataset, CSCDataset, np.ndarray, h5py.Dataset, zarr.Array)) and not (
        scipy.sparse.issparse(matrix)
    ):
        raise UserError(
            f"{where} is a {type(matrix).__module__}.{type(matrix).__qualname__}; expected a numpy array or a CSR or "
            "CSC matrix. Convert it first, for example with `adata.to_memory()`."
        )
    if matrix.dtype.kind not in "fiu":
        raise UserError(f"{where} has values of type {matrix.dtype}; expected numbers. Give the layer with raw counts.")
    if isinstance(matrix, CSCDataset):
        return _RowsOfColumns(matrix)
    if scipy.sparse.issparse(matrix):
        matrix = matrix.tocsr()
    # scipy knows neither half precision nor another order of bytes.
    odd = (matrix.dtype.itemsize == 2 and matrix.dtype.kind == "f") or not matrix.dtype.isnative
    if odd and not isinstance(matrix, CSRDataset):
        return lambda start, stop: scipy.sparse.csr_matrix(np.asarray(matrix[start:stop], np.float32))
    return lambda start, stop: _canonical(scipy.sparse.csr_matrix(matrix[start:stop]))


def _canonical(rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Sort the columns of each row. A value that is stored in parts is their sum, as in a dense matrix."""
    if not rows.has_canonical_format:
        # The arrays may be those of the caller.
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


class _RowsOfColumns:
    """Rows of a CSC matrix in a file.

    The whole file is read for each group of rows, because the values of a row are everywhere in it. Groups are as large
    as the memory allows that `MOST_VALUES_KEPT` stands for.
    """

    def __init__(self, matrix: CSCDataset) -> None:
        self._group = matrix.group
        self._shape = matrix.shape
        self._offsets = np.asarray(self._group["indptr"][:], np.int64)
        per_row = max(self._offsets[-1] / max(self._shape[0], 1), 1.0)
        self._at_once = max(int(MOST_VALUES_KEPT / per_row), 1)
        self._start = 0
        self._rows: scipy.sparse.csr_matrix | None = None

    def __call__(self, start: int, stop: int) -> scipy.sparse.csr_matrix:
        kept = self._rows
        if kept is None or start < self._start or stop > self._start + kept.shape[0]:
            self._start = start
            self._rows = kept = self._read(start, min(max(stop, start + self._at_once), self._shape[0]))
        return kept[start - self._start : stop - self._start]

    def _read(self, start: int, stop: int) -> scipy.sparse.csr_matrix:
        nothing = np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int32)
        parts = [nothing]
        for first in range(0, int(self._offsets[-1]), VALUES_AT_ONCE):
            last = min(first + VALUES_AT_ONCE, int(self._offsets[-1]))
            rows = self._group["indices"][first:last]
            at = np.flatnonzero((rows >= start) & (rows < stop))
            columns = np.searchsorted(self._offsets, at + first, side="right") - 1
            values = self._group["data"][first:last][at]
            parts.append((values.astype(np.float32), (rows[at] - start).astype(np.int32), columns.astype(np.int32)))
        values, rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
        return _canonical(scipy.sparse.csr_matrix((values, (rows, columns)), shape=(stop - start, self._shape[1])))


def soma_rows(matrix: tiledbsoma.SparseNDArray, joinids: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Rows:
    """Return the function that reads rows of a SOMA matrix.

    Parameters
    ----------
    matrix
        The matrix.
    joinids, columns
        The soma_joinids of its rows and of its columns, ascending.
    """

    def read(start: int, stop: int) -> scipy.sparse.csr_matrix:
        wanted = joinids[start:stop]
        contiguous = len(wanted) and wanted[-1] - wanted[0] + 1 == len(wanted)
        coords = slice(int(wanted[0]), int(wanted[-1])) if contiguous else pa.array(wanted)
        table = matrix.read((coords, slice(None))).tables().concat()
        rows, genes = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1"))
        at = np.searchsorted(wanted, rows), np.searchsorted(columns, genes)
        shape = len(wanted), len(columns)
        return _canonical(scipy.sparse.csr_matrix((table["soma_data"].to_numpy(), at), shape=shape))

    return read


def in_file(container: Any) -> Any:
    """Return a matrix of an open HDF5 or zarr file, without reading it."""
    if isinstance(container, (h5py.Dataset, zarr.Array)):
        return container
    return anndata.io.sparse_dataset(container)
