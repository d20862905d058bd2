"""`prune`: what a deployment's policy does with old plans and arrays (`census_tf_dagster.config.retention`).

A policy touches finished and left work of older releases only: never the newest
verified array of a set, never a release that was written to lately, never what another plan names as its source, never
what cannot be read. A removal that was cut short is finished first of all.
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
from census_tf_dagster.store.removal import begin, begun, finish

DAY = 86400.0
NOTICE_DAYS = 6.5
"""Between being listed and going, by schedule: a week, and some hours for schedules that are late."""
LISTED = "retention.json"
"""In the store: what was listed, and when."""


@dataclass(frozen=True)
class Candidate:
    """One identity of a release that a policy would touch."""

    holding: Holding
    idle_days: int
    confirmed: str | None = None
    """The word with which its removal was begun; None when it was not."""

    @property
    def name(self) -> str:
        """Its folder below the store."""
        return f"{self.holding.set}/{self.holding.release}/{self.holding.identity}"

    @property
    def of(self) -> tuple[str, str]:
        """Its set and release."""
        return self.holding.set, self.holding.release

    def __str__(self) -> str:
        one = self.holding
        size = f"{one.cells_stored:,} cells, {one.bytes:,} bytes"
        return f"{self.name}  {size}, {one.state}, idle for {self.idle_days} days"


def candidates(store: str, storage: Storage, retention: Retention) -> list[Candidate]:
    """Return what the policy would touch; nothing under ``keep``.

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
                one.release not in old
                or one.state in ("damaged", "removing")
                or (one.state == "verified" and one.release == newest)
            )
            root = f"{store}/{one.set}/{one.release}/{one.identity}"
            idle = int((time.time() - storage.last_written(root)) / DAY)
            if one.state == "removing" and retention.policy == "expire":
                chosen.append(Candidate(one, idle, begun(storage, root)))
                continue
            if kept or root in named:
                continue
            if idle >= retention.days and not (retention.policy == "archive" and storage.is_archived(root)):
                chosen.append(Candidate(one, idle))
    return sorted(chosen, key=lambda one: one.name)


def _sources(store: str, storage: Storage, holdings: Iterable[Holding]) -> set[str]:
    """Return the folders that plans name: reused cells are read there, now or by a repeated shard."""
    named: set[str] = set()
    for one in holdings:
        pointer = f"{store}/{one.set}/{one.release}/{one.identity}/plan/current.json"
        # A plan that cannot be read in full may still name what it needs.
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
    """Return a short name of exactly these candidates: what a person confirms."""
    return hashlib.sha256("\n".join(sorted(one.name for one in chosen)).encode()).hexdigest()[:12]


def announce(store: str, storage: Storage, chosen: Sequence[Candidate]) -> list[Candidate]:
    """Write down when each candidate was listed first, and return those that were listed long enough ago.

    What is no candidate any more is forgotten: listed again, it has its week again.
    """
    uri = f"{store}/{LISTED}"
    known = json.loads(storage.read(uri)) if storage.exists(uri) else {}
    now = time.time()
    listed = {one.name: float(known.get(one.name, now)) for one in chosen}
    if listed or known:
        storage.write(uri, json.dumps(listed, indent=1).encode())
    return [one for one in chosen if now - listed[one.name] >= NOTICE_DAYS * DAY]


def confirms(word: str, chosen: Sequence[Candidate]) -> bool:
    """Tell whether a word names exactly these candidates, or all of them are what is left of those that it named."""
    return word == digest(chosen) or (bool(chosen) and all(one.confirmed == word for one in chosen))


def apply(store: str, storage: Storage, retention: Retention, chosen: Sequence[Candidate], word: str = "") -> list[str]:
    """Do with some candidates what the policy says; return a line about each.

    Parameters
    ----------
    store, storage, retention
        The store and its policy.
    chosen
        What it is done to.
    word
        What a person confirmed, with which a removal that is cut short can be repeated.

    Raises
    ------
    UserError
        When local folders are to be archived; nothing was touched.
    """
    if retention.policy == "archive" and is_local(store):
        raise UserError(
            f"{FILE} says archive, and the store {store} is local: there is no cheaper storage class to move to. Use "
            "keep or expire."
        )
    done = []
    if retention.policy == "expire":
        for one in chosen:
            begin(storage, f"{store}/{one.name}", one.confirmed or word)
    for one in chosen:
        root = f"{store}/{one.name}"
        if retention.policy == "expire":
            finish(storage, root)
            done.append(f"removed {one}")
        elif retention.policy == "archive":
            storage.archive_folder(root)
            done.append(f"moved to {ARCHIVE_CLASS}: {one}")
    return done
