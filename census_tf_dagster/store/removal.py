"""Removes the folder of an identity in a way that an interrupted removal can be recognised and finished.

A removal first writes a mark, and deletes the mark last. After the mark it deletes the plan, so that no shard starts in
between. Choosing what to remove belongs in `inventory` and `prune`.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from census_tf_dagster.durations import duration
from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.layout import ReleaseFolder

QUIET_SECONDS = 900.0
"""Least time since the last write. A worker may still use a folder that was written to more recently."""
MARK = "removal"
"""Name of the folder with the mark, below the removed folder."""
CLOCKS_SECONDS = 2.0
"""Largest difference between the times of two files that are written one after the other."""


def mark_for_removal(storage: Storage, root: str, word: str = "") -> None:
    """Mark a folder as being removed.

    Parameters
    ----------
    storage, root
        The storage, and the folder of an identity.
    word
        The word that a person confirmed, if it confirmed several removals at once.
    """
    storage.write(_mark(root), json.dumps({"confirmed": word}).encode())


def removal_word(storage: Storage, root: str) -> str | None:
    """Return the word in the mark of a folder, which may be empty; None if the folder is not marked for removal."""
    if not storage.exists(_mark(root)):
        return None
    try:
        return str(json.loads(storage.read(_mark(root)))["confirmed"])
    except (ValueError, KeyError, TypeError):
        return ""


def delete_marked(storage: Storage, root: str) -> None:
    """Delete a folder that is marked for removal, or the rest of it."""
    folder = ReleaseFolder(root)
    for part in (folder.plan, folder.array):
        if storage.is_folder(part):
            storage.remove_folder(part)
    storage.remove_folder(root)


def require_quiet(storage: Storage, root: str) -> None:
    """Raise an error if something may be writing to a folder.

    Raises
    ------
    UserError
        When something was written in the last 15 minutes; in a folder that is marked for removal, after the mark.
    """
    last = storage.last_written(root)
    if removal_word(storage, root) is not None and last <= storage.last_written(f"{root}/{MARK}") + CLOCKS_SECONDS:
        return
    idle = time.time() - last
    if idle < QUIET_SECONDS:
        raise UserError(
            f"{root} was written to {duration(max(0.0, idle))} ago, so a worker may be using it; expected "
            f"{duration(QUIET_SECONDS)} without a write. Nothing was removed. End its runs (`status` shows them), then "
            "repeat the command."
        )


def require_no_removal(storage: Storage, folder: ReleaseFolder) -> None:
    """Raise an error if the removal of a folder was interrupted, because nothing may be planned in it.

    Raises
    ------
    UserError
        When it was. The message has the command that finishes the removal.
    """
    if removal_word(storage, folder.root) is not None:
        raise UserError(
            f"the removal of {folder.root} was started but not finished; expected a folder that is not being removed. "
            f"{how_to_finish(folder.root)}"
        )


def how_to_finish(root: str) -> str:
    """Return a sentence with the command that finishes the removal of a folder."""
    name, release, identity = root.split("/")[-3:]
    command = f"census-tf-dagster remove {name} {release} {identity} --confirm {identity}"
    return f"Finish it: {command}"


@contextmanager
def noticing_removal(storage: Storage, folder: ReleaseFolder) -> Iterator[None]:
    """Replace the error of work in a folder by a clear message if somebody removed the folder meanwhile.

    Raises
    ------
    UserError
        Instead of the original error, when the plan existed at the start and is gone.
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
            f"{folder.root} was removed (by `remove` or `prune`) while this run used it; expected it to stay. The "
            "committed embeddings are gone, but this run may have written other files since. Run `inspect` to see them "
            "and `remove` to delete them. Then launch the release again, if you need it."
        ) from error


def _mark(root: str) -> str:
    return f"{root}/{MARK}/begun.json"
