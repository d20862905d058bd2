"""Sets that stand on S3: fetched when definitions are loaded, so that a changed YAML needs no new image."""

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
"""Bytes of a file at most: whoever points at the wrong prefix is told so at once."""

_FETCHED: list[tempfile.TemporaryDirectory[str]] = []
"""Kept until this process ends."""


@cache
def fetch_sets(uri: str, s3: S3Settings) -> Path:
    """Copy the sets below an S3 prefix to a folder of this process: ``placement.yaml`` and ``<set>/defs.yaml``.

    A process sees one state of them, however often it asks. Other objects below the prefix are left alone.

    Parameters
    ----------
    uri
        ``s3://bucket/prefix``.
    s3
        How it is reached.

    Raises
    ------
    UserError
        When there is no set below `uri`, a file is larger than a YAML can be, or access is denied.
    """
    objects = S3Objects(s3)
    prefix = uri.rstrip("/")
    wanted = {name: size for name, size in objects.list_below(prefix).items() if _is_set_file(name)}
    if not any(name != FILE for name in wanted):
        raise UserError(f"no sets below {prefix}: expected objects such as {prefix}/human_tf_sapiens/{SET_FILE}.")
    for name, size in wanted.items():
        if size > LARGEST:
            raise UserError(f"{prefix}/{name} has {size} bytes, and the YAML of a set has {LARGEST} at most.")
    held = temporary_folder()
    _FETCHED.append(held)
    folder = Path(held.name)
    for name in wanted:
        content = objects.read(f"{prefix}/{name}")
        if content is None:
            raise UserError(f"{prefix}/{name} went away while sets were fetched; load them again.")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _is_set_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    of_a_set = len(parts) == 2 and parts[0] != ".." and parts[1] == SET_FILE
    return "/".join(parts) == name and (name == FILE or of_a_set)
