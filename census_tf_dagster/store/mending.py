"""Mending a shard in which something wrong was read: what is written again, and which fragments go."""

from collections.abc import Callable, Sequence

import numpy as np

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.fragments import Fragment
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.readback import ReadBack
from census_tf_dagster.store.verification import VerificationError, mend_advice, verify_shard
from census_tf_dagster.store.write_notes import Notes, read_notes


def mend_shard(
    array: EmbeddingsArray,
    plan: Plan,
    folder: ReleaseFolder,
    shard: int,
    found: ReadBack,
    mine: Sequence[Megabatch],
    write: Callable[[Sequence[Megabatch]], None],
) -> int:
    """Mend what `verify_shard` found, and verify the shard; return how many megabatches were written again.

    Fragments that are no megabatch's own, and without which each megabatch still has its own, are removed first.
    Megabatches that are wrong even then are written again, and the fragments that held them are removed after that, so
    that a failure leaves nothing worse than it was.

    Parameters
    ----------
    array, plan, folder, shard
        What is mended.
    found
        What was wrong.
    mine
        The megabatches of the shard that this run can write: the computed ones, or the copied ones.
    write
        Computes or copies megabatches again and commits them.

    Raises
    ------
    VerificationError
        When the shard is still not what was planned.
    """
    holders = _Holders(array, plan, read_notes(array.storage, folder, plan, range(plan.totals.shards)))
    strays = [one.name for one in holders.suspects(found) if holders.is_stray(one)]
    if strays:
        array.remove_fragments(strays)
        found = verify_shard(array, plan, folder, shard)
        if not found.problems:
            return 0
    suspects = [one for one in holders.suspects(found) if one.name not in strays]
    wrong = found.wrong | {index for one in suspects for index in holders.of(one)}
    again = [batch for batch in mine if batch.index in wrong]
    write(again)
    written = {batch.index for batch in again}
    array.remove_fragments(one.name for one in suspects if holders.of(one) <= written)
    array.gather_metadata()
    found = verify_shard(array, plan, folder, shard)
    if found.problems:
        raise VerificationError(f"shard {shard} was read back: {found.problems}. {mend_advice(plan)}.")
    return len(again)


class _Holders:
    """Which megabatches a fragment may hold values of."""

    def __init__(self, array: EmbeddingsArray, plan: Plan, notes: Notes) -> None:
        self._fragments = array.fragments()
        self._indices = np.array([batch.index for batch in plan.megabatches])
        self._firsts = np.array([batch.first for batch in plan.megabatches])
        self._lasts = np.array([batch.last for batch in plan.megabatches])
        self._ranges = {batch.index: (batch.first, batch.last) for batch in plan.megabatches}
        sizes = {(batch.first, batch.last, batch.cells): batch.index for batch in plan.megabatches}
        sizes |= {(one.first, one.last, one.cells): index for index, some in notes.items() for one in some}
        # What has a megabatch's size and place is that megabatch.
        self._own = {
            one.name: sizes[key]
            for one in self._fragments
            if (key := (one.first, one.last, one.values // array.n_features)) in sizes
            and one.values % array.n_features == 0
        }

    def of(self, fragment: Fragment) -> set[int]:
        """Return the indices of the megabatches."""
        if fragment.name in self._own:
            return {self._own[fragment.name]}
        overlapping = (self._firsts <= fragment.last) & (self._lasts >= fragment.first)
        return set(self._indices[overlapping].tolist())

    def is_stray(self, fragment: Fragment) -> bool:
        """Tell whether a fragment is no megabatch's own, while each megabatch that it reaches into has one."""
        return fragment.name not in self._own and self.of(fragment) <= set(self._own.values())

    def suspects(self, found: ReadBack) -> list[Fragment]:
        """Return the fragments that may hold what is wrong."""
        strangers = np.array(found.strangers, np.int64)
        return [
            one
            for one in self._fragments
            if self.of(one) & found.wrong or ((one.first <= strangers) & (strangers <= one.last)).any()
        ]
