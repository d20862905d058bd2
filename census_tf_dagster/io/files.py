"""Replaces local files atomically, so that a reader or a power failure never sees a part; locks; temporary folders."""

import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from census_tf_dagster.errors import UserError


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Let other processes that name the same file wait until the block ends. The lock ends with its process.

    A missing folder is created.

    Raises
    ------
    OSError
        When the file cannot be written.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block ends without error, sync that file and rename it to `path`.

    A missing folder is created.

    Raises
    ------
    OSError
        When the file cannot be written. No temporary file is left.
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
    """Make a temporary folder. It is removed together with the returned object.

    Raises
    ------
    UserError
        When it cannot be made.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="census-tf-")
    except OSError as error:
        raise UserError(
            f"no temporary folder can be made ({error}). Expected a writable folder with free space: set TMPDIR to one."
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
