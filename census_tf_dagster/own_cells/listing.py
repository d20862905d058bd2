"""Finds the files of a folder or prefix that hold cells."""

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.storage import FileFacts, Storage
from census_tf_dagster.own_cells.local_copy import ZARR_MARKS, version_of

FOLDER_MARKS = (*ZARR_MARKS, "__tiledb_group.tdb")
"""A folder with one of these files is a zarr group or a SOMA experiment."""


def list_files(folder: str, storage: Storage) -> dict[str, str]:
    """Return the version of each file directly below a folder or prefix: h5ad files, zarr folders, SOMA experiments.

    A version consists of the number of files, their size in bytes, and the time of the last write.

    Raises
    ------
    UserError
        When a local folder does not exist.
    StoreError
        When S3 cannot be reached.
    """
    if is_local(folder) and not storage.is_folder(folder):
        raise UserError(f"the folder {folder} does not exist; expected the folder with the files: correct `files`.")
    below: dict[str, dict[str, FileFacts]] = {}
    for path, facts in storage.files(folder).items():
        name, _, inside = path.partition("/")
        below.setdefault(name, {})[inside] = facts
    return {
        name: version_of(files.values())
        for name, files in sorted(below.items())
        if (name.endswith(".h5ad") and "" in files) or any(mark in files for mark in FOLDER_MARKS)
    }
