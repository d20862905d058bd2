"""Verifies that exactly the planned cells are in the array, each with the values that were written.

A shard reads back the range of joinids that it is responsible for. Each megabatch must match a note of one of the
shard's runs (`write_notes`): its cells except those that were set aside, with the same checksum. The shard then stores
a verification: what it found, the fragments that it saw, and the sizes of their files. The release is verified when
every shard has a verification and no fragment was added, removed or changed in size since. Other shards are read again.
So the last asset costs O(fragments), not O(cells).

Comparing values belongs in `readback`, mending in `mending`, all other rules in `rules`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from census_tf_dagster.census.plan import Plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import DamagedFragmentsError, EmbeddingsArray, OtherArrayError
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.fragments import Fragment
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.readback import Problems, ReadBack, read_back
from census_tf_dagster.store.write_notes import Notes, Written, read_notes

READERS = min(len(os.sched_getaffinity(0)), 8)
"""Number of shards read at once. The processor limits reading, and each shard takes about a GB of memory."""

Files = Mapping[str, Mapping[str, int]]
"""Files of fragments with their sizes in bytes, by fragment name."""


class VerificationError(Exception):
    """The array does not match the plan."""


@dataclass(frozen=True)
class Verification:
    """The result of reading a shard back, with the fragments that were read.

    Attributes
    ----------
    plan, shard
        Hash of the plan, and number of the shard.
    fragments
        Files of each fragment in the shard's range, with their sizes. If something was wrong: only the fragments whose
        files have changed their length, with the earlier sizes.
    megabatches
        Content of each megabatch. For a wrong megabatch, the last content that was known to be right, if there is one.
    """

    plan: str
    shard: int
    fragments: dict[str, dict[str, int]]
    megabatches: tuple[Written, ...]

    def cells(self) -> int:
        """Return the number of cells with an embedding."""
        return sum(written.cells for written in self.megabatches)

    def accounts_for(self, plan: Plan, shard: int) -> bool:
        """Tell whether each planned cell of a shard is embedded or set aside."""
        planned = {batch.index: batch.cells for batch in plan.shard(shard)}
        found = {written.megabatch: written.cells + len(written.set_aside) for written in self.megabatches}
        return (self.plan, self.shard) == (plan.totals.plan, shard) and found == planned

    def holds(self, array: EmbeddingsArray, fragments: Iterable[Fragment]) -> bool:
        """Tell from the metadata of fragments whether they can hold all values."""
        return sum(fragment.values for fragment in fragments) >= self.cells() * array.n_features


_VERIFICATION = TypeAdapter(Verification)


def answered_ranges(plan: Plan, rows: int) -> dict[int, tuple[int, int]]:
    """Return the range of joinids that each shard with cells is responsible for, both ends inclusive.

    Together the ranges cover 0 to ``rows - 1`` without gaps, so an unplanned cell is always in one of them.
    """
    firsts = {shard: batches[0].first for shard in range(plan.totals.shards) if (batches := plan.shard(shard))}
    shards = sorted(firsts)
    ends = [firsts[shard] - 1 for shard in shards[1:]] + [rows - 1]
    return {
        shard: (firsts[shard] if position else 0, end)
        for position, (shard, end) in enumerate(zip(shards, ends, strict=True))
    }


def is_verified(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> bool:
    """Tell whether a shard has a verification and its fragments have not changed since. Reads only metadata."""
    verification = _read_verification(array, plan, folder, shard)
    return verification is not None and bool(_still_covered(array, plan, {shard: verification}))


def verify_shard(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, committed: "Committed | None" = None
) -> ReadBack:
    """Read one shard's range back, and store its verification.

    Parameters
    ----------
    array, plan, folder, shard
        The shard to read.
    committed
        The array's fragments, if the caller has listed them already. Listing costs milliseconds per fragment.

    Returns
    -------
    ReadBack
        The problems: planned cells that are missing or incomplete, unplanned cells, values that are not finite or not
        as they were written, cells of zeros, fragments whose files have changed their length.
    """
    batches = plan.shard(shard)
    # Fragments are listed before reading, so a fragment that is added meanwhile is not covered and will be read again.
    committed = Committed.of(array) if committed is None else committed
    earlier = _read_verification(array, plan, folder, shard, accounts=False)
    known = _known(array, plan, folder, shard, earlier)
    found = ReadBack()
    fragments: dict[str, dict[str, int]] = {}
    resized: dict[str, dict[str, int]] = {}
    if batches:
        first, last = answered_ranges(plan, array.rows)[shard]
        fragments = committed.between(first, last)
        found = read_back(array, plan, batches, first, last, known)
        # TileDB never changes a fragment. A gathered copy of its metadata may hide that its own is damaged.
        before = earlier.fragments if earlier else {}
        resized = {name: before[name] for name in fragments.keys() & before.keys() if fragments[name] != before[name]}
        for fragment in committed.within(first, last):
            for batch in batches:
                if fragment.name in resized and fragment.first <= batch.last and fragment.last >= batch.first:
                    (ids,) = plan.read_ids(array.storage, [batch])
                    found.problems.add("resized", ids)
                    found.wrong.add(batch.index)
    megabatches = {written.megabatch: (written,) for written in found.found}
    held = [note for batch in batches for note in megabatches.get(batch.index, known.get(batch.index, ())[:1])]
    # If something is wrong, the verification does not cover the fragments, so the next check reads the shard again.
    verification = Verification(plan.totals.plan, shard, resized if found.problems else fragments, tuple(held))
    array.storage.write(folder.verification(verification.plan, shard), _VERIFICATION.dump_json(verification))
    return found


def set_aside_of(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> dict[int, str]:
    """Return why cells of a shard have no embedding, by joinid; empty if the shard is not verified."""
    verification = _read_verification(array, plan, folder, shard)
    return (
        {joinid: why for one in verification.megabatches for joinid, why in one.set_aside.items()}
        if verification
        else {}
    )


def all_set_aside(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> dict[int, str]:
    """Return why cells of a release have no embedding, by joinid; only cells of verified shards."""
    shards = range(plan.totals.shards)
    return {joinid: why for shard in shards for joinid, why in set_aside_of(array, plan, folder, shard).items()}


def _known(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, earlier: Verification | None
) -> Notes:
    """Return the notes on a shard's megabatches: those of its last verification first, then those of its runs."""
    noted = read_notes(array.storage, folder, plan, [shard])
    for written in earlier.megabatches if earlier else ():
        noted = {**noted, written.megabatch: (written, *noted.get(written.megabatch, ()))}
    return noted


def require_shard(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> ReadBack | None:
    """Verify a shard if all its megabatches are committed; return the result, or None if some are missing.

    Two runs commit the copied and the computed cells of a shard. The run that ends last finds everything committed and
    reads the shard back.
    """
    notes = read_notes(array.storage, folder, plan, [shard])
    if missing_megabatches(array, plan, plan.shard(shard), notes):
        return None
    return verify_shard(array, plan, folder, shard)


def mend_advice(plan: Plan) -> str:
    """Return the advice for mending wrong cells."""
    runs = "shard_embeddings, or reused_embeddings for copied cells," if plan.totals.cells_reused else "its shard"
    return f"Run {runs} with `recompute: true`"


def verified_shards(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> set[int]:
    """Return the shards whose verification covers all fragments in their range. Reads only metadata."""
    return _still_covered(array, plan, _read_verifications(array, plan, folder))


def require_openable(uri: str, storage: Storage, plan: Plan, folder: ReleaseFolder) -> None:
    """Raise an error if there is no array, or if damaged files prevent opening it.

    Raises
    ------
    UserError
        When that is so. For fragments, the message names the shards whose verifications cover them.
    """
    try:
        EmbeddingsArray.look(uri, storage)[0].fragments()
    except DamagedFragmentsError as error:
        verifications = _read_verifications(error.array, plan, folder)
        shards = sorted(
            shard
            for shard, verification in verifications.items()
            if error.reasons.keys() & verification.fragments.keys()
        )
        raise UserError(f"{error} {f'They belong to shards {shards[:10]}.' if shards else ''}".strip()) from error
    except OtherArrayError:
        # The rules report that in detail.
        return


def _require_committed(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shards: list[int], *, of_file: bool
) -> None:
    notes = read_notes(array.storage, folder, plan, shards)
    missing = missing_megabatches(array, plan, [batch for shard in shards for batch in plan.shard(shard)], notes)
    found = {
        asset: sorted({batch.shard for batch in missing if batch.reused == reused})
        for asset, reused in (("shard_embeddings", False), ("reused_embeddings", True))
    }
    if missing:
        unfinished = {batch.shard for batch in missing}
        what = "; ".join(f"{asset} of {len(them)}, e.g. {them[:10]}" for asset, them in found.items() if them)
        if of_file:
            what = f"embeddings_array of {folder.release}"
        raise UserError(
            f"{len(unfinished)} of {plan.totals.shards} shards have not finished, e.g. {sorted(unfinished)[:10]}; "
            f"expected all. Materialize these partitions first: {what}."
        )


@dataclass(frozen=True)
class Committed:
    """The committed fragments of an array and their files, listed once for many shards."""

    fragments: tuple[Fragment, ...]
    files: Files

    @classmethod
    def of(cls, array: EmbeddingsArray) -> "Committed":
        """List the fragments of an array."""
        return cls(tuple(array.fragments()), array.fragment_files())

    def between(self, first: int, last: int) -> dict[str, dict[str, int]]:
        """Return the files of the fragments that overlap a range of joinids."""
        return {fragment.name: dict(self.files.get(fragment.name, {})) for fragment in self.within(first, last)}

    def within(self, first: int, last: int) -> list[Fragment]:
        """Return the fragments that overlap a range of joinids."""
        return [fragment for fragment in self.fragments if fragment.first <= last and fragment.last >= first]


def _read_verifications(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> dict[int, Verification]:
    found = {shard: _read_verification(array, plan, folder, shard) for shard in range(plan.totals.shards)}
    return {shard: verification for shard, verification in found.items() if verification is not None}


def _still_covered(array: EmbeddingsArray, plan: Plan, verifications: Mapping[int, Verification]) -> set[int]:
    committed, ranges = Committed.of(array), answered_ranges(plan, array.rows)
    return {
        shard
        for shard, verification in verifications.items()
        if shard not in ranges
        or (
            verification.fragments == committed.between(*ranges[shard])
            and verification.holds(array, committed.within(*ranges[shard]))
        )
    }


def _read_verification(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, *, accounts: bool = True
) -> Verification | None:
    """Read a shard's verification; None if there is none or, with `accounts`, if it does not account for each cell.

    A damaged verification counts as none, so the shard is read again.
    """
    uri = folder.verification(plan.totals.plan, shard)
    if not array.storage.exists(uri):
        return None
    try:
        verification = _VERIFICATION.validate_json(array.storage.read(uri))
    except ValidationError:
        return None
    return verification if verification.accounts_for(plan, shard) or not accounts else None


@dataclass(frozen=True)
class ReleaseVerification:
    """The result of verifying a whole release.

    Attributes
    ----------
    covered
        Digest of the fragments that the verification covers.
    read_again
        Shards that were read again.
    problems
        Problems of the cells; empty if the array holds exactly the plan's cells except those that were set aside.
    broken
        Shards that have these problems.
    cells
        Number of cells with an embedding.
    set_aside
        The reason for each other cell, by joinid.
    """

    covered: str
    read_again: tuple[int, ...]
    problems: Problems
    broken: tuple[int, ...] = ()
    cells: int = 0
    set_aside: dict[int, str] = field(default_factory=dict)


def coverage(files: Files) -> str:
    """Return a digest of fragments and the sizes of their files. Equal digests mean equal commits."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def release_state(array: EmbeddingsArray, plan: Plan) -> Literal["unverified", "stale", "verified"]:
    """Return whether the last verification of the release still covers plan and commits. Reads only metadata."""
    record = array.read_record()
    if not record:
        return "unverified"
    now = (plan.totals.plan, coverage(Committed.of(array).between(0, array.rows)))
    return "verified" if (record.get("plan"), record.get("covered")) == now else "stale"


def verify_release(
    array: EmbeddingsArray,
    plan: Plan,
    folder: ReleaseFolder,
    *,
    full: bool = False,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    of_file: bool = False,
) -> ReleaseVerification:
    """Verify that the array matches the plan; use the shards' verifications, and read only shards that changed since.

    A shard without a verification is read too, if all its cells are committed.

    Parameters
    ----------
    array, plan, folder
        The array to verify, its plan, and its folder.
    full
        Read everything again, even verified shards.
    report
        Called with the number of shards that were read again, and the number that must be.
    of_file
        Whether it is the array of a file, which has other assets.

    Raises
    ------
    UserError
        When shards have not finished. The message names them.
    """
    verifications = _read_verifications(array, plan, folder)
    unverified = [shard for shard in range(plan.totals.shards) if shard not in verifications]
    if unverified:
        _require_committed(array, plan, folder, unverified, of_file=of_file)
    covered_still = set() if full else _still_covered(array, plan, verifications)
    again = [shard for shard in range(plan.totals.shards) if shard not in covered_still]
    problems = Problems()
    broken = []
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        committed = Committed.of(array) if again else None
        reading = pool.map(lambda shard: verify_shard(array, plan, folder, shard, committed), again)
        for done, (shard, found) in enumerate(zip(again, reading, strict=True), start=1):
            problems.merge(found.problems)
            if found.problems:
                broken.append(shard)
            report(done, len(again))
    if again:
        verifications = _read_verifications(array, plan, folder)
    megabatches = [written for verification in verifications.values() for written in verification.megabatches]
    return ReleaseVerification(
        covered=coverage(
            {name: files for verification in verifications.values() for name, files in verification.fragments.items()}
        ),
        read_again=tuple(again),
        problems=problems,
        broken=tuple(broken),
        cells=sum(written.cells for written in megabatches),
        set_aside={joinid: why for written in megabatches for joinid, why in written.set_aside.items()},
    )
