"""What a store holds, and removing a release's data from it."""

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
from census_tf_dagster.store.removal import begin, begun, finish, how_to_finish, require_quiet
from census_tf_dagster.store.verification import release_state, verified_shards


@dataclass(frozen=True)
class Holding:
    """One set, release and identity in a store.

    Attributes
    ----------
    set, release, identity
        Its names; the identity's first 12 hexadecimal digits.
    shards, shards_done
        Shards of its plan, and those whose verification covers what is committed.
    cells_planned, cells_stored
        Cells of its plan, and those in committed fragments (a cell written twice counts twice).
    bytes
        Size of everything below its folder.
    state
        ``unverified``, ``stale`` or ``verified``; ``removing`` when its removal was begun and not finished; ``damaged``
        when it cannot be read, with the reason in `problem`.
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


def inspect_store(store: str, storage: Storage) -> Iterator[Holding]:
    """Yield everything that a store holds, from metadata alone.

    Raises
    ------
    UserError
        When there is no store.
    """
    if not storage.is_folder(store):
        raise UserError(f"there is no store at {store}.")
    for set_folder in _folders(storage, store):
        for release_folder in _folders(storage, set_folder):
            for root in _folders(storage, release_folder):
                yield _look(storage, root)


def remove_release(store: str, storage: Storage, name: str, release: str, identity: str, confirm: str | None) -> str:
    """Remove one identity's plan, array and verifications, or what an earlier removal left of them, if asked for twice.

    Parameters
    ----------
    store, storage
        The store.
    name, release, identity
        As `inspect_store` shows them.
    confirm
        The identity once more; without it, nothing is removed.

    Returns
    -------
    str
        What was removed.

    Raises
    ------
    UserError
        When there is no such data, it was not asked for twice, or something may be writing to it; nothing was removed.
    """
    for given, what in ((name, "set"), (release, "release"), (identity, "identity")):
        require_name(given, what)
    root = f"{store}/{name}/{release}/{identity}"
    if not storage.is_folder(root):
        raise UserError(f"{store} holds no {name}/{release}/{identity}; `inspect` shows what it holds.")
    holding = _look(storage, root)
    what = f"{name}/{release}/{identity}: {holding.cells_stored:,} cells, {holding.bytes:,} bytes ({holding.state})"
    require_quiet(storage, root)
    if confirm != identity:
        raise UserError(
            f"this would remove {what}, for ever. Nothing was removed. To do it, repeat the command with "
            f"--confirm {identity}"
        )
    begin(storage, root)
    finish(storage, root)
    return what


def _folders(storage: Storage, uri: str) -> list[str]:
    return [entry.rstrip("/") for entry in storage.list(uri) if storage.is_folder(entry)]


def _look(storage: Storage, root: str) -> Holding:
    name, release, identity = root.split("/")[-3:]
    folder = ReleaseFolder(root)
    if begun(storage, root) is not None:
        problem = f"its removal was begun and not finished. {how_to_finish(root)}"
        return Holding(name, release, identity, bytes=storage.size(root), state="removing", problem=problem)
    try:
        plan = read_plan(storage, folder.plan)
        array, _ = EmbeddingsArray.look(folder.array, storage)
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
        )
    except (UserError, tiledb.TileDBError, tiledbsoma.SOMAError, RuntimeError, ValueError, KeyError) as error:
        return Holding(name, release, identity, bytes=storage.size(root), problem=str(error).partition("\n")[0])
