"""Applies a deployment's retention policy to old plans and arrays (`config.retention`): removes or archives them.

A policy applies only to finished or abandoned work of older releases. It never touches the newest verified array of a
set, a release that was written to lately, an array that another plan names as its source, or data that cannot be read.
It finishes interrupted removals first.

Removing one release at a person's request belongs in `inventory`, the removal itself in `removal`.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from census_tf_dagster.config.retention import FILE, Retention
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.s3 import ARCHIVE_CLASS
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.inventory import Holding, inspect_store
from census_tf_dagster.store.removal import delete_marked, mark_for_removal, removal_word

DAY = 86400.0
NOTICE_DAYS = 6.5
"""Least days between announcement and removal by schedule: a week less some hours, because schedules may be late."""
LISTED = "retention.json"
"""File in the store with the announced candidates and the time of each announcement."""


@dataclass(frozen=True)
class Candidate:
    """One identity of a release to which a policy applies."""

    holding: Holding
    idle_days: int
    confirmed: str | None = None
    """The word that confirmed its removal when that was started; None if it was not started."""

    @property
    def name(self) -> str:
        """Its folder below the store."""
        return f"{self.holding.set}/{self.holding.release}/{self.holding.identity}"

    @property
    def set_and_release(self) -> tuple[str, str]:
        """Its set and release."""
        return self.holding.set, self.holding.release

    def __str__(self) -> str:
        size = f"{self.holding.cells_stored:,} cells, {self.holding.bytes:,} bytes"
        return f"{self.name}  {size}, {self.holding.state}, idle for {self.idle_days} days"


def candidates(store: str, storage: Storage, retention: Retention) -> list[Candidate]:
    """Return the identities to which the policy applies; none under ``keep``.

    Raises
    ------
    UserError
        When there is no store.
    """
    if retention.policy == "keep":
        return []
    found = list(inspect_store(store, storage))
    named = _sources(store, storage, found)
    by_set: dict[str, list[Holding]] = {}
    for holding in found:
        by_set.setdefault(holding.set, []).append(holding)
    chosen: list[Candidate] = []
    for holdings in by_set.values():
        old = sorted({one.release for one in holdings}, reverse=True)[retention.releases :]
        verified = [one for one in holdings if one.state == "verified"]
        newest = max((one.release for one in verified), default=None)
        for one in holdings:
            kept = (
                # Files have no successors: none of them is old because there are others.
                one.of_file
                or one.release not in old
                or one.state in ("damaged", "removing")
                or (one.state == "verified" and one.release == newest)
            )
            root = f"{store}/{one.set}/{one.release}/{one.identity}"
            idle = int((time.time() - storage.last_written(root)) / DAY)
            if one.state == "removing" and retention.policy == "expire":
                chosen.append(Candidate(one, idle, removal_word(storage, root)))
                continue
            if kept or root in named:
                continue
            if idle >= retention.days and not (retention.policy == "archive" and storage.is_archived(root)):
                chosen.append(Candidate(one, idle))
    return sorted(chosen, key=lambda one: one.name)


def _sources(store: str, storage: Storage, holdings: Iterable[Holding]) -> set[str]:
    """Return the folders that plans name as sources, because a shard reads reused cells there, now or later."""
    named: set[str] = set()
    for one in holdings:
        pointer = f"{store}/{one.set}/{one.release}/{one.identity}/plan/current.json"
        # A plan that is partly unreadable may still name its source.
        if storage.exists(pointer):
            named |= set(_texts(_parsed(storage.read(pointer))))
    roots = {f"{store}/{one.set}/{one.release}/{one.identity}" for one in holdings}
    return {root for root in roots if any(text == root or text.startswith(f"{root}/") for text in named)}


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def digest(chosen: Iterable[Candidate]) -> str:
    """Return a short digest of exactly these candidates, which a person confirms."""
    return hashlib.sha256("\n".join(sorted(one.name for one in chosen)).encode()).hexdigest()[:12]


def announce(store: str, storage: Storage, chosen: Sequence[Candidate]) -> list[Candidate]:
    """Store when each candidate was first announced, and return those that were announced long enough ago.

    An identity that is no longer a candidate is forgotten. If it becomes one again, its week starts again.
    """
    uri = f"{store}/{LISTED}"
    known = json.loads(storage.read(uri)) if storage.exists(uri) else {}
    now = time.time()
    listed = {one.name: float(known.get(one.name, now)) for one in chosen}
    if listed or known:
        storage.write(uri, json.dumps(listed, indent=1).encode())
    return [one for one in chosen if now - listed[one.name] >= NOTICE_DAYS * DAY]


def confirms(word: str, chosen: Sequence[Candidate]) -> bool:
    """Tell whether a word confirms exactly these candidates, or confirmed their removals when those were started."""
    return word == digest(chosen) or (bool(chosen) and all(one.confirmed == word for one in chosen))


def apply(store: str, storage: Storage, retention: Retention, chosen: Sequence[Candidate], word: str = "") -> list[str]:
    """Apply the policy to these candidates; return a line about each.

    Parameters
    ----------
    store, storage, retention
        The store and its policy.
    chosen
        The candidates.
    word
        The word that a person confirmed. With it, an interrupted removal can be repeated.

    Raises
    ------
    UserError
        When the policy would archive local folders. Then nothing was changed.
    """
    if retention.policy == "archive" and is_local(store):
        raise UserError(
            f"{FILE} has the policy archive, but the store {store} is local. Expected a store on S3, because a local "
            "store has no cheaper storage class: use keep or expire."
        )
    done = []
    if retention.policy == "expire":
        for one in chosen:
            mark_for_removal(storage, f"{store}/{one.name}", one.confirmed or word)
    for one in chosen:
        root = f"{store}/{one.name}"
        if retention.policy == "expire":
            delete_marked(storage, root)
            done.append(f"removed {one}")
        elif retention.policy == "archive":
            storage.archive_folder(root)
            done.append(f"moved to {ARCHIVE_CLASS}: {one}")
    return done
