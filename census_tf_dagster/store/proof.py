"""Proof that exactly the planned cells are in the array, each with all its values, all finite.

A shard reads back the range of joinids it answers for and writes down which fragments it saw there. The
release is proved when every shard has such a proof and no fragment came later; what came later is read
again. So the last asset costs O(fragments), not O(cells).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from census_tf_dagster.census.plan import Plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.store.array import EmbeddingsArray, Fragment
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.progress import missing_megabatches
from census_tf_dagster.store.readback import Problems, read_back

READERS = min(len(os.sched_getaffinity(0)), 8)
"""Shards read at once: reading is bound by the processor, and each takes about a GB of memory."""


class ProofError(Exception):
    """The array does not hold what was planned."""


@dataclass(frozen=True)
class Proof:
    """What was read back of one shard, and the fragments that were there."""

    plan: str
    shard: int
    cells: int
    fragments: tuple[str, ...]


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


def is_proved(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> bool:
    """Tell whether a shard's proof exists and no fragment has come or gone since; reads metadata only."""
    proof = _read_proof(array, folder.proof(plan.totals.plan, shard))
    return proof is not None and set(proof.fragments) == set(_fragments_of(array, plan, shard))


def prove_shard(
    array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, committed: list[Fragment] | None = None
) -> Problems:
    """Read one shard's range back, and write down what that proves.

    Parameters
    ----------
    array, plan, folder, shard
        What is read.
    committed
        The array's fragments, when they were listed already: listing costs milliseconds each.

    Returns
    -------
    Problems
        What is wrong: planned cells that are missing or incomplete, cells that nobody planned, values that are not
        finite, cells of zeros.
    """
    batches = plan.shard(shard)
    # Listed before reading: a fragment that comes in between is not covered and will be read again.
    committed = array.fragments() if committed is None else committed
    problems = Problems()
    fragments: tuple[str, ...] = ()
    if batches:
        first, last = answered_ranges(plan, array.rows)[shard]
        fragments = _between(committed, first, last)
        problems = read_back(array, plan, batches, first, last)
    # With something wrong it covers no fragment: whoever looks next reads the shard again.
    proof = Proof(plan.totals.plan, shard, sum(batch.cells for batch in batches), () if problems else fragments)
    array.storage.write(folder.proof(proof.plan, shard), json.dumps(asdict(proof)).encode())
    return problems


def require_shard(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int, *, changed: bool) -> bool:
    """Prove a shard if all of it is committed; return whether it is proved.

    Copied and computed cells of a shard are committed by two runs: the one that ends last finds all committed, and
    reads the shard back.

    Parameters
    ----------
    array, plan, folder, shard
        What is read.
    changed
        Whether this run has committed anything; if not, a proof that still holds is enough.

    Raises
    ------
    ProofError
        When what was read back is not what was planned.
    """
    if not changed and is_proved(array, plan, folder, shard):
        return True
    if missing_megabatches(array, plan, plan.shard(shard)):
        return False
    if problems := prove_shard(array, plan, folder, shard):
        raise ProofError(f"shard {shard} was read back: {problems}. {mend(plan)}.")
    return True


def mend(plan: Plan) -> str:
    """Return what to do about cells that are wrong."""
    runs = "shard_embeddings, or reused_embeddings for copied cells," if plan.totals.cells_reused else "its shard"
    return f"Run {runs} with `recompute: true`"


def proved_shards(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> set[int]:
    """Return the shards whose proof covers all that is committed in their range; reads metadata only."""
    return _still_covered(array, plan, _read_proofs(array, plan, folder))


def _require_committed(array: EmbeddingsArray, plan: Plan, shards: list[int]) -> None:
    missing = missing_megabatches(array, plan, [batch for shard in shards for batch in plan.shard(shard)])
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


def _read_proofs(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> dict[int, Proof]:
    found = {shard: _read_proof(array, folder.proof(plan.totals.plan, shard)) for shard in range(plan.totals.shards)}
    return {shard: proof for shard, proof in found.items() if proof is not None}


def _still_covered(array: EmbeddingsArray, plan: Plan, proofs: dict[int, Proof]) -> set[int]:
    fragments, ranges = array.fragments(), answered_ranges(plan, array.rows)
    return {
        shard
        for shard, proof in proofs.items()
        if shard not in ranges or set(proof.fragments) == set(_between(fragments, *ranges[shard]))
    }


def _fragments_of(array: EmbeddingsArray, plan: Plan, shard: int) -> tuple[str, ...]:
    ranges = answered_ranges(plan, array.rows)
    return _between(array.fragments(), *ranges[shard]) if shard in ranges else ()


def _between(fragments: Iterable[Fragment], first: int, last: int) -> tuple[str, ...]:
    return tuple(fragment.name for fragment in fragments if fragment.first <= last and fragment.last >= first)


def _read_proof(array: EmbeddingsArray, uri: str) -> Proof | None:
    if not array.storage.exists(uri):
        return None
    try:
        content = json.loads(array.storage.read(uri))
        return Proof(**{**content, "fragments": tuple(content["fragments"])})
    except (ValueError, TypeError, KeyError):
        # A damaged proof proves nothing: the shard is read again.
        return None


@dataclass(frozen=True)
class ReleaseProof:
    """What reading back has shown of a whole release.

    Attributes
    ----------
    covered
        Digest of the fragments that the proof covers.
    read_again
        Shards that had to be read again.
    problems
        What is wrong; empty: the array is exactly the plan.
    """

    covered: str
    read_again: tuple[int, ...]
    problems: Problems


def coverage(fragments: Iterable[str]) -> str:
    """Return a digest of a set of fragment names: equal digests, equal commits."""
    return hashlib.sha256("\n".join(sorted(set(fragments))).encode()).hexdigest()[:16]


def release_state(array: EmbeddingsArray, plan: Plan) -> Literal["unproved", "stale", "proved"]:
    """Tell whether the last proof of the release still covers plan and commits. Reads metadata only."""
    record = array.read_record()
    if not record:
        return "unproved"
    now = (plan.totals.plan, coverage(fragment.name for fragment in array.fragments()))
    return "proved" if (record.get("plan"), record.get("covered")) == now else "stale"


def prove_release(
    array: EmbeddingsArray,
    plan: Plan,
    folder: ReleaseFolder,
    *,
    full: bool = False,
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> ReleaseProof:
    """Prove that the whole array is exactly the plan: from the shards' proofs, reading only what came after them.

    Parameters
    ----------
    array, plan, folder
        What is proved.
    full
        Read everything again, whatever was proved.
    report
        Called with how many shards were read again, of how many.

    Raises
    ------
    UserError
        When shards have not finished, naming them. One without a proof whose cells are all there is read.
    ProofError
        When the proofs contradict the plan.
    """
    proofs = _read_proofs(array, plan, folder)
    unproved = [shard for shard in range(plan.totals.shards) if shard not in proofs]
    if unproved:
        _require_committed(array, plan, unproved)
    covered_still = set() if full else _still_covered(array, plan, proofs)
    again = [shard for shard in range(plan.totals.shards) if shard not in covered_still]
    problems = Problems()
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        committed = array.fragments() if again else []
        reading = pool.map(lambda shard: prove_shard(array, plan, folder, shard, committed), again)
        for done, found in enumerate(reading, start=1):
            problems.merge(found)
            report(done, len(again))
    if again:
        proofs = _read_proofs(array, plan, folder)
    proved = sum(proof.cells for proof in proofs.values())
    if proved != plan.totals.cells:
        raise ProofError(f"{proved} cells are proved, {plan.totals.cells} were planned: the proofs are damaged.")
    covered = coverage(name for proof in proofs.values() for name in proof.fragments)
    return ReleaseProof(covered, tuple(again), problems)
