"""Fetches the files of sets from S3 when definitions are loaded, so that a changed YAML needs no new image.

The files are only copied here; `set_files` checks them.
"""

import tempfile
from functools import cache
from pathlib import Path, PurePosixPath

from census_tf_dagster.config.placement import FILE
from census_tf_dagster.config.yaml_reading import MOST_BYTES
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.files import temporary_folder
from census_tf_dagster.io.s3 import S3Objects, S3Settings

SET_FILE = "defs.yaml"
LARGEST = MOST_BYTES
"""The largest file, in bytes. A wrong prefix with large objects is refused before anything is fetched."""

_FETCHED: list[tempfile.TemporaryDirectory[str]] = []
"""The fetched folders. They exist until this process ends."""


@cache
def fetch_sets(uri: str, s3: S3Settings) -> Path:
    """Copy ``placement.yaml`` and each ``<set>/defs.yaml`` below an S3 prefix to a folder of this process.

    A process fetches a prefix once, so that it always sees the same state. Other objects are ignored.

    Parameters
    ----------
    uri
        ``s3://bucket/prefix``.
    s3
        How to reach S3.

    Raises
    ------
    UserError
        When there is no set below `uri`, a file is too large, or access is denied.
    """
    objects = S3Objects(s3)
    prefix = uri.rstrip("/")
    wanted = {name: found.size for name, found in objects.named_below(prefix).items() if _is_set_file(name)}
    if not any(name != FILE for name in wanted):
        raise UserError(
            f"no sets below {prefix}: expected objects such as {prefix}/human_tf_sapiens/{SET_FILE}. "
            "Upload the sets, or correct CENSUS_TF_SETS."
        )
    for name, size in wanted.items():
        if size > LARGEST:
            raise UserError(
                f"{prefix}/{name} has {size} bytes; expected the YAML of a set, of at most {LARGEST} bytes. Correct "
                "the file, or CENSUS_TF_SETS."
            )
    held = temporary_folder()
    _FETCHED.append(held)
    folder = Path(held.name)
    for name in wanted:
        content = objects.read(f"{prefix}/{name}")
        if content is None:
            raise UserError(f"{prefix}/{name} was deleted while the sets were fetched. Reload the code location.")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _is_set_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    of_a_set = len(parts) == 2 and parts[0] != ".." and parts[1] == SET_FILE
    return "/".join(parts) == name and (name == FILE or of_a_set)
