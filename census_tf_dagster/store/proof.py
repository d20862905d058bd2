"""Proof that exactly the planned cells are in the array, each with all its values, all finite.

A shard reads back the range of joinids it answers for and writes down which fragments it saw there. The
release is proved when every shard has such a proof and no fragment came later; what came later is read
again. So the last asset costs O(fragments), not O(cells).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.store.array import EmbeddingsArray, Fragment
from census_tf_dagster.store.layout import ReleaseFolder

CELLS_AT_ONCE = 4096


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


def prove_shard(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder, shard: int) -> Proof:
    """Read one shard's range back and write its proof.

    Raises
    ------
    ProofError
        When a planned cell is missing or lacks values, a value is not finite, or an unplanned cell is there.
    """
    batches = plan.shard(shard)
    # Listed before reading: a fragment that comes in between is not covered and will be read again.
    fragments = _fragments_of(array, plan, shard)
    if batches:
        first, last = answered_ranges(plan, array.rows)[shard]
        ends = [batch.first - 1 for batch in batches[1:]] + [last]
        for number, (batch, end) in enumerate(zip(batches, ends, strict=True)):
            _require_exactly(array, plan, batch, batch.first if number else first, end)
    proof = Proof(plan.totals.plan, shard, sum(batch.cells for batch in batches), fragments)
    array.storage.write(folder.proof(proof.plan, shard), json.dumps(asdict(proof)).encode())
    return proof


def proved_shards(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> set[int]:
    """Return the shards whose proof covers all that is committed in their range; reads metadata only."""
    return _still_covered(array, plan, _read_proofs(array, plan, folder))


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


def _require_exactly(array: EmbeddingsArray, plan: Plan, batch: Megabatch, begin: int, end: int) -> None:
    (planned,) = plan.read_ids(array.storage, [batch])
    for at in range(0, len(planned), CELLS_AT_ONCE):
        part = planned[at : at + CELLS_AT_ONCE]
        low = begin if at == 0 else int(part[0])
        high = end if at + CELLS_AT_ONCE >= len(planned) else int(planned[at + CELLS_AT_ONCE]) - 1
        counts = np.zeros(len(part), np.int64)
        for table in array.values_between(low, high):
            counts += _count_values(table, part)
        short = part[counts != array.n_features]
        if len(short):
            raise ProofError(
                f"{len(short)} planned cells are missing or incomplete in {array.uri}, joinids "
                f"{short[:10].tolist()}; each must have {array.n_features} values. Run their shard with "
                "`recompute: true`."
            )


def _count_values(table: pa.Table, planned: np.ndarray) -> np.ndarray:
    joinids = table["soma_dim_0"].to_numpy()
    values = table["soma_data"].to_numpy()
    if not np.isfinite(values).all():
        wrong = np.unique(joinids[~np.isfinite(values)])
        raise ProofError(
            f"{len(wrong)} cells have values that are not finite, joinids {wrong[:10].tolist()}. Run their shard with "
            "`recompute: true`."
        )
    position = np.minimum(np.searchsorted(planned, joinids), len(planned) - 1)
    strange = np.unique(joinids[planned[position] != joinids])
    if len(strange):
        raise ProofError(f"{len(strange)} cells are in the array but not planned, joinids {strange[:10].tolist()}.")
    return np.bincount(position, minlength=len(planned))


@dataclass(frozen=True)
class ReleaseProof:
    """A proved release: which fragments the proof covers, and the shards that had to be read again."""

    covered: str
    read_again: tuple[int, ...]


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


def prove_release(array: EmbeddingsArray, plan: Plan, folder: ReleaseFolder) -> ReleaseProof:
    """Prove that the whole array is exactly the plan.

    Raises
    ------
    UserError
        When shards have not finished, naming them.
    ProofError
        When the array does not hold what was planned.
    """
    proofs = _read_proofs(array, plan, folder)
    unfinished = [shard for shard in range(plan.totals.shards) if shard not in proofs]
    if unfinished:
        raise UserError(
            f"{len(unfinished)} of {plan.totals.shards} shards have not finished, e.g. {unfinished[:10]}: "
            "materialize shard_embeddings of these partitions first."
        )
    stale = sorted(set(proofs) - _still_covered(array, plan, proofs))
    for shard in stale:
        proofs[shard] = prove_shard(array, plan, folder, shard)
    proved = sum(proof.cells for proof in proofs.values())
    if proved != plan.totals.cells:
        raise ProofError(f"{proved} cells are proved, {plan.totals.cells} were planned: the proofs are damaged.")
    return ReleaseProof(coverage(name for proof in proofs.values() for name in proof.fragments), tuple(stale))
