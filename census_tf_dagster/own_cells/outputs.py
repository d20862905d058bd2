"""Writes finished embeddings as h5ad, Parquet or numpy file, in blocks, and reads back which identity a file has."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.files import replacing
from census_tf_dagster.own_cells.partial_result import PartialResult

KEY = "X_transcriptformer"
"""Name of the embeddings in obsm."""
UNS = "transcriptformer"
"""Name of the identity in uns, and in the metadata of a Parquet file."""
ROWS_AT_ONCE = 4096

Description = dict[str, Any]


def require_space(output: Path, shape: tuple[int, int]) -> None:
    """Raise an error if the disk has no space for embeddings of a shape, while they are computed and finished.

    Raises
    ------
    UserError
        With the bytes that are free and those that are needed.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    # A numpy file is what is written while they are computed; the other formats are written beside it.
    copies = 1 if output.suffix == ".npy" else 2
    needed, free = shape[0] * shape[1] * 4 * copies, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:,.1f} GiB free; expected {needed / 2**30:,.1f} GiB for {shape[0]:,} cells. "
            "Free space, or give another `--out`."
        )


def write_output(path: Path, result: PartialResult, obs: pd.DataFrame, description: Description) -> None:
    """Write a finished result in the format of the path's suffix, atomically.

    Parameters
    ----------
    path
        Ends in ``.h5ad``, ``.parquet`` or ``.npy``.
    result
        The embeddings of all cells, NaN for cells that were set aside.
    obs
        Metadata of the cells, in the same order. Its index names them.
    description
        Identity and facts, which can be written as JSON. For ``.npy``, they go to a file ``.json`` beside it.
    """
    if path.suffix == ".npy":
        with replacing(sidecar(path)) as partial:
            partial.write_text(json.dumps(description, indent=1))
    with replacing(path) as partial:
        WRITERS[path.suffix](partial, result, obs, description)


def _write_npy(path: Path, result: PartialResult, obs: pd.DataFrame, description: Description) -> None:  # noqa: ARG001
    path.hardlink_to(result.values)


def _write_parquet(path: Path, result: PartialResult, obs: pd.DataFrame, description: Description) -> None:
    width = result.shape[1]
    schema = pa.schema(
        [("cell", pa.string()), ("embedding", pa.list_(pa.float32(), width))], {UNS: json.dumps(description)}
    )
    names = np.asarray(obs.index, object)
    with pq.ParquetWriter(path, schema) as writer:
        for start, values in _blocks(result):
            cells = pa.array(map(str, names[start : start + len(values)]), pa.string())
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
            writer.write_table(pa.table([cells, embeddings], schema=schema))


def _write_h5ad(path: Path, result: PartialResult, obs: pd.DataFrame, description: Description) -> None:
    try:
        _write_hdf5(path, result, obs, description)
    except RuntimeError as error:
        # HDF5 writes late, and h5py then raises this for a disk without space.
        raise OSError(str(error).partition("\n")[0]) from error


def _write_hdf5(path: Path, result: PartialResult, obs: pd.DataFrame, description: Description) -> None:
    anndata.AnnData(obs=obs, uns={UNS: json.dumps(description)}).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        chunks = (max(min(ROWS_AT_ONCE, result.shape[0]), 1), result.shape[1])
        embeddings = file["obsm"].create_dataset(KEY, result.shape, np.float32, chunks=chunks)
        embeddings.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start, values in _blocks(result):
            embeddings[start : start + len(values)] = values


def _blocks(result: PartialResult) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    for start in range(0, result.shape[0], ROWS_AT_ONCE):
        yield start, result.read(start, min(start + ROWS_AT_ONCE, result.shape[0]))


WRITERS: dict[str, Callable[[Path, PartialResult, pd.DataFrame, Description], None]] = {
    ".h5ad": _write_h5ad,
    ".parquet": _write_parquet,
    ".npy": _write_npy,
}


def sidecar(path: Path) -> Path:
    """Return the file beside a numpy file that describes it."""
    return path.with_suffix(".json")


def read_description(path: Path) -> Description | None:
    """Return the description of a finished output; None if the file is something else.

    Raises
    ------
    UserError
        When the suffix is none of a format.
    """
    if path.suffix not in WRITERS:
        raise UserError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(WRITERS)}.")
    try:
        if path.suffix == ".npy":
            text = sidecar(path).read_text()
        elif path.suffix == ".parquet":
            text = pq.read_metadata(path).metadata[UNS.encode()].decode()
        else:
            with h5py.File(path) as file:
                text = file["uns"][UNS][()].decode()
        found = json.loads(text)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowInvalid):
        return None
    return found if isinstance(found, dict) else None
