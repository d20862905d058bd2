"""Local files: replaced as a whole, whatever reads them meanwhile or cuts the power; and temporary ones."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from census_tf_dagster.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes that name, synced to the disk, if the block ends without error.

    The folder is made where there is none.

    Raises
    ------
    OSError
        When the folder or its disk does not take it; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed with the object that is returned.

    Raises
    ------
    UserError
        When none can be made.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="census-tf-")
    except OSError as error:
        raise UserError(
            f"no temporary folder can be made ({error}): set TMPDIR to a folder that can be written, with free space."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
