"""Verification that exactly the planned cells are in the array, each with the values that were written.

A shard reads back the range of joinids that it answers for. Each megabatch must hold what one of the shard's runs noted
(`store.written`): its cells less those that were set aside, under the same checksum. The shard then writes down what it
found, and which fragments it saw, with the sizes of their files. The release is verified when every shard has a verification
and no fragment came, went or changed its size later; shards of which that is not true are read again. So the last asset
costs O(fragments), not O(cells).
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
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.fragments import DamagedFragmentsError, Fragment
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.readback import Problems, ReadBack, read_back
from census_tf_dagster.store.write_notes import Notes, Written, read_notes

READERS = min(len(os.sched_getaffinity(0)), 8)
"""Shards read at once: reading is bound by the processor, and each takes about a GB of memory."""

Files = Mapping[str, Mapping[str, int]]
"""The files of fragments and their sizes in bytes, by the fragments' names."""


class VerificationError(Exception):
    """The array does not hold what was planned."""


@dataclass(frozen=True)
class Verification:
    """What was read back of one shard, and the fragments that were there.

    Attributes
    ----------
    plan, shard
        Of which shard of which plan.
    fragments
        The files of each fragment in its range, and their sizes; empty when something was wrong.
    megabatches
        What each holds. Of one that is wrong, what was last known to be right, as far as there is such a thing.
    """

    plan: str
    shard: int
    fragments: dict[str, dict[str, int]]
    megabatches: tuple[Written, ...]

    def cells(self) -> int:
        """Return the number of cells with an embedding."""
        return sum(one.cells for one in self.megabatches)

    def is_of(self, plan: Plan, shard: int) -> bool:
        """Tell whether it accounts for each planned cell of a shard: embedded, or set aside."""
        planned = {batch.index: batch.cells for batch in plan.shard(shard)}
        found = {one.megabatch: one.cells + len(one.set_aside) for one in self.megabatches}
        return (self.plan, self.shard) == (plan.totals.plan, shard) and found == planned

    def holds(self, array: EmbeddingsArray, fragments: Iterable[Fragment]) -> bool:
        """Tell from the fragments' metadata whether they can hold all values."""
        return sum(one.values for one in fragments) >= self.cells() * array.n_features


_VERIFICATION = TypeAdapter(Verification)


def answered_ranges(plan: Plan, rows: int) -> dict[int, tuple[int, int]]:
    """Return the joinids that each shard with cells answers for, first and last inclusive.

    Together they cover 0 to ``rows - 1`` without a gap, so a cell that nobody planned is in some range.
    """
    firsts = {shard: batches[0].first for shard in range(plan.totals.shards) if (batches := plan.shard(shard))}
    shards = sorted(firsts)
    ends = [firsts[shard] - 1 for shard in shards[1:]] + [rows - 1]
    return {
        shard: (firsts[shard] if position else 0, end)
        for position, (shard, end) in enumerate(zip(shards, ends, strict=True))
    }


def is_verified(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> bool:
    """Tell whether a shard's verification exists and no fragment has come, gone or changed since; reads metadata only."""
    verification = _read_verification(array, plan, folder, shard)
    return verification is not None and bool(_still_covered(array, plan, {shard: verification}))


def verify_shard(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, committed: "Committed | None" = None
) -> ReadBack:
    """Read one shard's range back, and write down what that verifies.

    Parameters
    ----------
    array, plan, folder, shard
        What is read.
    committed
        The array's fragments, when they were listed already: listing costs milliseconds each.

    Returns
    -------
    ReadBack
        What is wrong: planned cells that are missing or incomplete, cells that nobody planned, values that are not
        finite or not those that were written, cells of zeros.
    """
    batches = plan.shard(shard)
    # Listed before reading: a fragment that comes in between is not covered and will be read again.
    committed = Committed.of(array) if committed is None else committed
    known = _known(array, plan, folder, shard)
    found = ReadBack()
    fragments: dict[str, dict[str, int]] = {}
    if batches:
        first, last = answered_ranges(plan, array.rows)[shard]
        fragments = committed.between(first, last)
        found = read_back(array, plan, batches, first, last, known)
    megabatches = {one.megabatch: (one,) for one in found.found}
    held = [one for batch in batches for one in megabatches.get(batch.index, known.get(batch.index, ())[:1])]
    # With something wrong it covers no fragment: whoever looks next reads the shard again.
    verification = Verification(plan.totals.plan, shard, {} if found.problems else fragments, tuple(held))
    array.storage.write(folder.verification(verification.plan, shard), _VERIFICATION.dump_json(verification))
    return found


def set_aside_of(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> dict[int, str]:
    """Return why cells of a shard have no embedding, by joinid; none, while it is not verified."""
    verification = _read_verification(array, plan, folder, shard)
    return (
        {joinid: why for one in verification.megabatches for joinid, why in one.set_aside.items()}
        if verification
        else {}
    )


def all_set_aside(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> dict[int, str]:
    """Return why cells of a release have no embedding, by joinid, as far as its shards are verified."""
    shards = range(plan.totals.shards)
    return {joinid: why for shard in shards for joinid, why in set_aside_of(array, plan, folder, shard).items()}


def _known(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> Notes:
    """Return what runs noted of a shard's megabatches, and what its last verification says of them."""
    noted = read_notes(array.storage, folder, plan, [shard])
    earlier = _read_verification(array, plan, folder, shard, accounts=False)
    for one in earlier.megabatches if earlier else ():
        noted = {**noted, one.megabatch: (one, *noted.get(one.megabatch, ()))}
    return noted


def require_shard(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> ReadBack | None:
    """Verify a shard if all of it is committed; return what was found, None when it is not.

    Copied and computed cells of a shard are committed by two runs: the one that ends last finds all committed, and
    reads the shard back.
    """
    notes = read_notes(array.storage, folder, plan, [shard])
    if missing_megabatches(array, plan, plan.shard(shard), notes):
        return None
    return verify_shard(array, plan, folder, shard)


def mend_advice(plan: Plan) -> str:
    """Return what to do about cells that are wrong."""
    runs = "shard_embeddings, or reused_embeddings for copied cells," if plan.totals.cells_reused else "its shard"
    return f"Run {runs} with `recompute: true`"


def verified_shards(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> set[int]:
    """Return the shards whose verification covers all that is committed in their range; reads metadata only."""
    return _still_covered(array, plan, _read_verifications(array, plan, folder))


def require_openable(uri: str, storage: Storage, plan: Plan, folder: ReleaseFolder) -> None:
    """Refuse an array with fragments that keep it from being opened.

    Raises
    ------
    UserError
        Naming the shards whose verifications saw these fragments.
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
        raise UserError(f"{error} {f'They are of shards {shards[:10]}.' if shards else ''}".strip()) from error
    except UserError:
        # Something else than an array of ours: the rules say what.
        return


def _require_committed(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shards: list[int]) -> None:
    notes = read_notes(array.storage, folder, plan, shards)
    missing = missing_megabatches(array, plan, [batch for shard in shards for batch in plan.shard(shard)], notes)
    found = {
        asset: sorted({batch.shard for batch in missing if batch.reused == reused})
        for asset, reused in (("shard_embeddings", False), ("reused_embeddings", True))
    }
    if missing:
        unfinished = {batch.shard for batch in missing}
        what = "; ".join(f"{asset} of {len(them)}, e.g. {them[:10]}" for asset, them in found.items() if them)
        raise UserError(
            f"{len(unfinished)} of {plan.totals.shards} shards have not finished, e.g. {sorted(unfinished)[:10]}: "
            f"materialize these partitions first: {what}."
        )


@dataclass(frozen=True)
class Committed:
    """The fragments of an array, and their files: listed once for many shards."""

    fragments: tuple[Fragment, ...]
    files: Files

    @classmethod
    def of(cls, array: EmbeddingsArray) -> "Committed":
        """List them."""
        return cls(tuple(array.fragments()), array.fragment_files())

    def between(self, first: int, last: int) -> dict[str, dict[str, int]]:
        """Return the files of the fragments that reach into a range of joinids."""
        return {one.name: dict(self.files.get(one.name, {})) for one in self.within(first, last)}

    def within(self, first: int, last: int) -> list[Fragment]:
        """Return the fragments that reach into a range of joinids."""
        return [one for one in self.fragments if one.first <= last and one.last >= first]


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
    """Read a shard's verification; None when there is none, or (`accounts`) one that does not account for each cell.

    A damaged verification verifies nothing: the shard is read again.
    """
    uri = folder.verification(plan.totals.plan, shard)
    if not array.storage.exists(uri):
        return None
    try:
        verification = _VERIFICATION.validate_json(array.storage.read(uri))
    except ValidationError:
        return None
    return verification if verification.is_of(plan, shard) or not accounts else None


@dataclass(frozen=True)
class ReleaseVerification:
    """What reading back has shown of a whole release.

    Attributes
    ----------
    covered
        Digest of the fragments that the verification covers.
    read_again
        Shards that had to be read again.
    problems
        What is wrong; empty: the array is exactly the plan, less what was set aside.
    cells
        How many cells have an embedding.
    set_aside
        Why each of the others has none, by joinid.
    """

    covered: str
    read_again: tuple[int, ...]
    problems: Problems
    cells: int = 0
    set_aside: dict[int, str] = field(default_factory=dict)


def coverage(files: Files) -> str:
    """Return a digest of some fragments and the sizes of their files: equal digests, equal commits."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def release_state(array: EmbeddingsArray, plan: Plan) -> Literal["unverified", "stale", "verified"]:
    """Tell whether the last verification of the release still covers plan and commits. Reads metadata only."""
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
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> ReleaseVerification:
    """Verify that the whole array is exactly the plan: from the shards' verifications, reading only what came after them.

    Parameters
    ----------
    array, plan, folder
        What is verified.
    full
        Read everything again, whatever was verified.
    report
        Called with how many shards were read again, of how many.

    Raises
    ------
    UserError
        When shards have not finished, naming them. One without a verification whose cells are all there is read.
    """
    verifications = _read_verifications(array, plan, folder)
    unverified = [shard for shard in range(plan.totals.shards) if shard not in verifications]
    if unverified:
        _require_committed(array, plan, folder, unverified)
    covered_still = set() if full else _still_covered(array, plan, verifications)
    again = [shard for shard in range(plan.totals.shards) if shard not in covered_still]
    problems = Problems()
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        committed = Committed.of(array) if again else None
        reading = pool.map(lambda shard: verify_shard(array, plan, folder, shard, committed), again)
        for done, found in enumerate(reading, start=1):
            problems.merge(found.problems)
            report(done, len(again))
    if again:
        verifications = _read_verifications(array, plan, folder)
    megabatches = [one for verification in verifications.values() for one in verification.megabatches]
    return ReleaseVerification(
        covered=coverage(
            {name: files for verification in verifications.values() for name, files in verification.fragments.items()}
        ),
        read_again=tuple(again),
        problems=problems,
        cells=sum(one.cells for one in megabatches),
        set_aside={joinid: why for one in megabatches for joinid, why in one.set_aside.items()},
    )
