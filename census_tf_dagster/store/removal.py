"""Removing the folder of an identity, so that a removal that was cut short is recognised and finished.

The first thing that a removal writes is its mark, and the last thing that it deletes; the plan goes first, so that no
shard starts in between.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.s3 import StoreError
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.layout import ReleaseFolder

QUIET_SECONDS = 900.0
"""A folder that was written to more recently may have a worker."""
MARK = "removal"
"""The folder of the mark, below that which is removed."""
CLOCKS_SECONDS = 2.0
"""By how much the times of two files that are written one after the other may be off."""


def begin(storage: Storage, root: str, word: str = "") -> None:
    """Mark a folder as being removed.

    Parameters
    ----------
    storage, root
        The folder of an identity.
    word
        What a person confirmed, if it was that of several removals.
    """
    storage.write(_mark(root), json.dumps({"confirmed": word}).encode())


def begun(storage: Storage, root: str) -> str | None:
    """Return the word with which the removal of a folder was begun; None when it was not."""
    if not storage.exists(_mark(root)):
        return None
    try:
        return str(json.loads(storage.read(_mark(root)))["confirmed"])
    except (ValueError, KeyError, TypeError):
        return ""


def finish(storage: Storage, root: str) -> None:
    """Delete a folder that is marked, or what is left of it."""
    folder = ReleaseFolder(root)
    for one in (folder.plan, folder.array):
        if storage.is_folder(one):
            storage.remove_folder(one)
    storage.remove_folder(root)


def require_quiet(storage: Storage, root: str) -> None:
    """Refuse to remove a folder that something may be writing to.

    Raises
    ------
    UserError
        When it was written to in the last quarter of an hour, be it since its removal was begun.
    """
    last = storage.last_written(root)
    if begun(storage, root) is not None and last <= storage.last_written(f"{root}/{MARK}") + CLOCKS_SECONDS:
        return
    idle = time.time() - last
    if idle < QUIET_SECONDS:
        raise UserError(
            f"{root} was written to {duration(max(0.0, idle))} ago, so a worker may be at work there; expected "
            f"{duration(QUIET_SECONDS)} without a write. Nothing was removed. End its runs (`status` shows them), and "
            "repeat the command then."
        )


def require_no_removal(storage: Storage, folder: ReleaseFolder) -> None:
    """Refuse to plan in a folder whose removal was cut short.

    Raises
    ------
    UserError
        With the command that finishes the removal.
    """
    if begun(storage, folder.root) is not None:
        raise UserError(f"the removal of {folder.root} was begun and not finished. {how_to_finish(folder.root)}")


def how_to_finish(root: str) -> str:
    """Return the sentence that says how the removal of a folder is finished."""
    name, release, identity = root.split("/")[-3:]
    command = f"python -m census_tf_dagster remove {name} {release} {identity} --confirm {identity}"
    return f"Finish it: {command}"


@contextmanager
def noticing_removal(storage: Storage, folder: ReleaseFolder) -> Iterator[None]:
    """Say so when work in a folder fails because somebody removes the folder.

    Raises
    ------
    UserError
        Instead of what was raised, when the plan that was there in the beginning is gone.
    """
    current = f"{folder.plan}/current.json"
    planned = storage.exists(current)
    try:
        yield
    except Exception as error:
        try:
            gone = planned and not storage.exists(current)
        except (UserError, StoreError):
            raise error from None
        if not gone:
            raise
        raise UserError(
            f"{folder.root} was removed while this run worked in it (by `remove` or `prune`), and what it had "
            "committed is gone. It may have written since: `inspect` shows what is left, and `remove` deletes it. Then "
            "launch the release again, if it is wanted."
        ) from error


def _mark(root: str) -> str:
    return f"{root}/{MARK}/begun.json"
