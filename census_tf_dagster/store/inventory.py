"""Lists the releases that a store holds, and removes one of them.

Removing old releases by policy belongs in `prune`, the removal itself in `removal`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import tiledb
import tiledbsoma

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import require_name
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.removal import (
    delete_marked,
    how_to_finish,
    mark_for_removal,
    removal_word,
    require_quiet,
)
from census_tf_dagster.store.verification import release_state, verified_shards


@dataclass(frozen=True)
class Holding:
    """One set, release and identity in a store.

    Attributes
    ----------
    set, release, identity
        Names of set and release, and the identity's first 12 hexadecimal digits.
    shards, shards_done
        Number of shards of its plan, and of those whose verification covers all committed fragments.
    cells_planned, cells_stored
        Number of cells in its plan, and in committed fragments (a cell that was written twice counts twice).
    bytes
        Size of all files below its folder.
    state
        ``unverified``, ``stale`` or ``verified``; ``removing`` if its removal was started but not finished; ``damaged``
        if it cannot be read, with the reason in `problem`.
    of_file
        Whether this is the array of a file of a set of files, not of a release.
    """

    set: str
    release: str
    identity: str
    shards: int = 0
    shards_done: int = 0
    cells_planned: int = 0
    cells_stored: int = 0
    bytes: int = 0
    state: str = "damaged"
    problem: str = ""
    of_file: bool = False


def inspect_store(store: str, storage: Storage) -> Iterator[Holding]:
    """Yield all sets, releases and identities that a store holds. Reads only metadata.

    Raises
    ------
    UserError
        When there is no store.
    """
    if not storage.is_folder(store):
        raise UserError(f"there is no store at {store}; expected a folder with releases: correct the store's address.")
    for set_folder in _folders(storage, store):
        for release_folder in _folders(storage, set_folder):
            for root in _folders(storage, release_folder):
                yield _inspect(storage, root)


def remove_release(store: str, storage: Storage, name: str, release: str, identity: str, confirm: str | None) -> str:
    """Remove plan, array and verifications of one identity, or the rest of an unfinished removal, after confirmation.

    Parameters
    ----------
    store, storage
        Address of the store, and the storage that writes it.
    name, release, identity
        Names of the set, the release and the identity, as `inspect_store` shows them.
    confirm
        The identity once more; without it, nothing is removed.

    Returns
    -------
    str
        A description of what was removed.

    Raises
    ------
    UserError
        When there is no such data, the confirmation is missing, or something may be writing to it. Then nothing was
        removed.
    """
    for given, what in ((name, "set"), (release, "release"), (identity, "identity")):
        require_name(given, what)
    root = f"{store}/{name}/{release}/{identity}"
    if not storage.is_folder(root):
        raise UserError(
            f"{store} holds no {name}/{release}/{identity}; expected names that it holds: `inspect` shows them."
        )
    holding = _inspect(storage, root)
    what = f"{name}/{release}/{identity}: {holding.cells_stored:,} cells, {holding.bytes:,} bytes ({holding.state})"
    require_quiet(storage, root)
    if confirm != identity:
        raise UserError(
            f"this would remove {what}, for ever. Nothing was removed. To do it, repeat the command with "
            f"--confirm {identity}"
        )
    mark_for_removal(storage, root)
    delete_marked(storage, root)
    return what


def _folders(storage: Storage, uri: str) -> list[str]:
    return [entry.rstrip("/") for entry in storage.list(uri) if storage.is_folder(entry)]


def _inspect(storage: Storage, root: str) -> Holding:
    name, release, identity = root.split("/")[-3:]
    folder = ReleaseFolder(root)
    if removal_word(storage, root) is not None:
        problem = f"its removal was started but not finished. {how_to_finish(root)}"
        return Holding(name, release, identity, bytes=storage.size(root), state="removing", problem=problem)
    try:
        plan = read_plan(storage, folder.plan)
        array, stored = EmbeddingsArray.look(folder.array, storage)
        return Holding(
            set=name,
            release=release,
            identity=identity,
            shards=plan.totals.shards,
            shards_done=len(verified_shards(array, plan, folder)),
            cells_planned=plan.totals.cells,
            cells_stored=sum(fragment.values for fragment in array.fragments()) // array.n_features,
            bytes=storage.size(root),
            state=release_state(array, plan),
            of_file=stored is not None and "census_uri" not in json.loads(stored),
        )
    except (UserError, tiledb.TileDBError, tiledbsoma.SOMAError, RuntimeError, ValueError, KeyError) as error:
        return Holding(name, release, identity, bytes=storage.size(root), problem=str(error).partition("\n")[0])
