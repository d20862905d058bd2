"""Opens the cells of an AnnData, an h5ad or zarr file, or a SOMA experiment, and finds their counts.

What the counts are belongs in `counts`, which genes the model knows in `genes`.
"""

import hashlib
import importlib
import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import tiledbsoma
import zarr

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local, require_location
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.own_cells.local_copy import ZARR_MARKS, file_version, local_copy
from census_tf_dagster.own_cells.matrices import Rows, in_file, row_reader, soma_rows

RAW = "raw"
X = "X"


@dataclass(frozen=True)
class Matrix:
    """A matrix that may hold counts, with its gene axis.

    Attributes
    ----------
    name
        Its name for a person, such as ``raw.X``.
    var
        Its genes.
    rows
        Reads its rows.
    """

    name: str
    var: pd.DataFrame
    rows: Rows


@dataclass(frozen=True)
class CellSource:
    """Opened cells.

    Attributes
    ----------
    name
        Address for a person.
    n_cells
        Number of cells.
    obs
        Reads the metadata of all cells; its index names them.
    matrices
        Opens each matrix that may hold counts, by the name that a user gives.
    default
        The one that is read unless a user names another.
    version
        Size and time of the last write of a file, before it was opened; empty for an AnnData.
    read_version
        Reads the version again.
    """

    name: str
    n_cells: int
    obs: Callable[[], pd.DataFrame]
    matrices: Mapping[str, Callable[[], Matrix]]
    default: str
    version: str = ""
    read_version: Callable[[], str] = lambda: ""

    def require_unchanged(self) -> None:
        """Raise an error if the file was written to since it was opened.

        Raises
        ------
        UserError
            When its version is another one.
        """
        now = self.read_version()
        if now != self.version:
            raise UserError(
                f"{self.name} changed while it was read (size and time of the last write were {self.version}, and are "
                f"{now}); expected a file that stays as it is. Nothing of it counts as finished: embed it again."
            )

    def matrix(self, layer: str | None) -> Matrix:
        """Open a matrix.

        Raises
        ------
        UserError
            When there is none of that name.
        """
        name = layer or self.default
        if name not in self.matrices:
            raise UserError(
                f"{self.name} has no matrix {name!r}; expected one of: {', '.join(self.matrices) or 'none is there'}. "
                "Name one with `layer`."
            )
        return self.matrices[name]()

    def fingerprint(self, matrix: Matrix) -> str:
        """Return a SHA-256 over version and names of cells and genes, which tells whether a file is still the same."""
        digest = hashlib.sha256(f"{self.n_cells} {matrix.name} {self.version}".encode())
        for index in (self.obs().index, matrix.var.index):
            digest.update(pd.util.hash_array(np.asarray(index, object)).tobytes())
        return digest.hexdigest()


@contextmanager
def open_cells(
    cells: anndata.AnnData | str | Path, storage: Storage, cache: Path, *, whole: bool
) -> Iterator[CellSource]:
    """Open cells.

    Parameters
    ----------
    cells
        An AnnData, or the path or S3 address of an h5ad file, a zarr folder or a SOMA experiment.
    storage
        The storage that reads S3.
    cache
        Local folder for copies of files on S3.
    whole
        Whether all counts will be read. Otherwise an h5ad file on S3 is not copied.

    Raises
    ------
    UserError
        When there is nothing, or something else.
    """
    if isinstance(cells, anndata.AnnData):
        yield _from_anndata(cells)
        return
    if not isinstance(cells, (str, os.PathLike)):
        raise UserError(f"cells is a {type(cells).__name__}; expected an AnnData, or the path or S3 address of a file.")
    uri = require_location(str(cells), "cells")
    if is_local(uri) and not Path(uri.removeprefix("file://")).exists():
        raise UserError(f"{uri} does not exist; expected an h5ad or zarr file, or a SOMA experiment.")
    with ExitStack() as stack:
        version = file_version(uri, storage)
        read_there = not whole and not is_local(uri) and storage.find_object(uri) is not None
        here = uri if read_there else stack.enter_context(local_copy(uri, storage, cache))
        path = Path(here.removeprefix("file://"))
        if read_there:
            found = _from_container(uri, _open_h5ad(stack, uri, stack.enter_context(storage.open(uri))))
        elif is_local(here) and path.is_file():
            found = _from_container(uri, _open_h5ad(stack, uri, path))
        elif is_local(here) and any((path / mark).exists() for mark in ZARR_MARKS):
            found = _from_container(uri, zarr.open_group(path, mode="r"))
        else:
            found = _from_experiment(uri, _open_experiment(stack, uri, storage))
        yield replace(found, version=version, read_version=lambda: file_version(uri, storage))


def _open_h5ad(stack: ExitStack, uri: str, file: Path | io.BufferedReader) -> h5py.File:
    # With it, HDF5 reads zstd. It is the extra `zstd`, because it is large.
    with suppress(ImportError):
        importlib.import_module("hdf5plugin")
    try:
        return stack.enter_context(h5py.File(file))
    except OSError as error:
        raise UserError(
            f"{uri} cannot be read as HDF5 ({error}); expected an h5ad or zarr file, or a SOMA experiment. If it was "
            "copied, copy it again."
        ) from error


def _open_experiment(stack: ExitStack, uri: str, storage: Storage) -> tiledbsoma.Experiment:
    try:
        return stack.enter_context(tiledbsoma.Experiment.open(uri, context=storage.soma_context))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, TypeError) as error:
        raise UserError(
            f"{uri} cannot be opened as a SOMA experiment ({str(error).partition(chr(10))[0][:200]}); expected one, or "
            "an h5ad or zarr file."
        ) from error


def _from_anndata(adata: anndata.AnnData) -> CellSource:
    def of(name: str, var: pd.DataFrame, matrix: Callable[[], Any]) -> Callable[[], Matrix]:
        return lambda: Matrix(name, var, row_reader(matrix(), name))

    matrices = {}
    if adata.raw is not None:
        matrices[RAW] = of("raw.X", adata.raw.var, lambda: adata.raw.X)
    # AnnData reads X of a view of a file into memory; it offers no part of it.
    if adata.isbacked or adata.X is not None:
        matrices[X] = of(X, adata.var, lambda: adata.X)
    for name in adata.layers:
        matrices.setdefault(name, of(f"layers[{name!r}]", adata.var, partial(adata.layers.__getitem__, name)))
    return CellSource("the AnnData", adata.n_obs, lambda: adata.obs, matrices, _default(matrices))


def _default(matrices: Collection[str]) -> str:
    """Return `raw` if it is there, as upstream does, then X, then the only one."""
    return next((name for name in (RAW, X) if name in matrices), next(iter(matrices), X) if len(matrices) == 1 else X)


def _from_container(uri: str, container: Any) -> CellSource:
    missing = [name for name in ("obs", "var") if name not in container]
    if missing:
        raise UserError(f"{uri} has no {' and no '.join(missing)}; expected an AnnData file.")

    def of(name: str, var: str, path: str) -> Callable[[], Matrix]:
        def opened() -> Matrix:
            with _naming_damage(uri):
                rows = row_reader(in_file(container[path]), f"{name} of {uri}")

            def read(start: int, stop: int) -> scipy.sparse.csr_matrix:
                with _naming_damage(uri):
                    return rows(start, stop)

            return Matrix(name, _frame(uri, container[var]), read)

        return opened

    matrices = {}
    if "raw/X" in container:
        matrices[RAW] = of("raw.X", "raw/var", "raw/X")
    if "X" in container:
        matrices[X] = of(X, "var", "X")
    for name in container.get("layers", ()):
        matrices.setdefault(name, of(f"layers[{name!r}]", "var", f"layers/{name}"))
    obs = _frame(uri, container["obs"])
    return CellSource(uri, len(obs), lambda: obs, matrices, _default(matrices))


@contextmanager
def _naming_damage(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{uri} cannot be read ({str(error).partition(chr(10))[0][:200]}); expected a whole AnnData file. If a "
            "compression other than gzip and lzf was used, such as zstd, `pip install hdf5plugin`. If it was copied, "
            "copy it again."
        ) from error


def _frame(uri: str, element: Any) -> pd.DataFrame:
    with _naming_damage(uri):
        frame = anndata.io.read_elem(element)
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            f"{uri} was written by an anndata before 0.7; expected a newer form: read it with `anndata.read_h5ad`, and "
            "write it again."
        )
    return frame


def _from_experiment(uri: str, experiment: tiledbsoma.Experiment) -> CellSource:
    found = sorted(experiment.ms)
    if not found:
        raise UserError(f"{uri} has no measurement; expected one with counts.")
    measurement = "RNA" if "RNA" in found else found[0]
    table = experiment.obs.read().concat().sort_by("soma_joinid")
    joinids = table["soma_joinid"].to_numpy()
    obs = table.to_pandas().set_index("obs_id" if "obs_id" in table.column_names else "soma_joinid", drop=False)
    obs.index = obs.index.astype(str)
    obs.index.name = None

    def of(name: str) -> Callable[[], Matrix]:
        def opened() -> Matrix:
            matrix = experiment.ms[measurement].X[name]
            where = f"ms[{measurement!r}].X[{name!r}]"
            if not isinstance(matrix, tiledbsoma.SparseNDArray):
                raise UserError(f"{where} of {uri} is dense; expected a sparse array: store it sparse.")
            var = experiment.ms[measurement].var.read().concat().sort_by("soma_joinid").to_pandas()
            columns = var["soma_joinid"].to_numpy()
            var = var.set_index("var_id" if "var_id" in var else "soma_joinid", drop=False)
            return Matrix(where, var, soma_rows(matrix, joinids, columns))

        return opened

    names = list(experiment.ms[measurement].X)
    matrices = {name: of(name) for name in names}
    return CellSource(uri, len(obs), lambda: obs, matrices, RAW if RAW in names else (names or [RAW])[0])
