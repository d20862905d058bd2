"""Mends a shard with wrong values: chooses the megabatches to write again and the fragments to remove.

Finding what is wrong belongs in `verification`, writing megabatches in `pipeline`.
"""

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
    """Mend the problems that `verify_shard` found, and verify the shard again.

    First it removes stray fragments: those that are not exactly one megabatch, if each megabatch in their range has
    its own fragment. Then it writes the megabatches again that are still wrong. Last it removes the fragments that held
    them, so that a failure in between makes nothing worse.

    Parameters
    ----------
    array, plan, folder, shard
        The shard to mend.
    found
        The problems that were found.
    mine
        The megabatches of the shard that this run can write: the computed ones, or the copied ones.
    write
        Computes or copies megabatches again and commits them.

    Returns
    -------
    int
        Number of megabatches that were written again.

    Raises
    ------
    VerificationError
        When the shard still differs from the plan.
    """
    holders = _Holders(array, plan, read_notes(array.storage, folder, plan, range(plan.totals.shards)))
    strays = [fragment.name for fragment in holders.suspects(found) if holders.is_stray(fragment)]
    if strays:
        array.remove_fragments(strays)
        found = verify_shard(array, plan, folder, shard)
        if not found.problems:
            return 0
    suspects = [fragment for fragment in holders.suspects(found) if fragment.name not in strays]
    wrong = found.wrong | {index for fragment in suspects for index in holders.megabatches(fragment)}
    again = [batch for batch in mine if batch.index in wrong]
    write(again)
    written = {batch.index for batch in again}
    array.remove_fragments(fragment.name for fragment in suspects if holders.megabatches(fragment) <= written)
    array.gather_metadata()
    found = verify_shard(array, plan, folder, shard)
    if found.problems:
        raise VerificationError(
            f"shard {shard} was read back and differs from the plan: {found.problems}. {mend_advice(plan)}."
        )
    return len(again)


class _Holders:
    """Tells which megabatches a fragment may hold values of."""

    def __init__(self, array: EmbeddingsArray, plan: Plan, notes: Notes) -> None:
        self._fragments = array.fragments()
        self._indices = np.array([batch.index for batch in plan.megabatches])
        self._firsts = np.array([batch.first for batch in plan.megabatches])
        self._lasts = np.array([batch.last for batch in plan.megabatches])
        self._ranges = {batch.index: (batch.first, batch.last) for batch in plan.megabatches}
        sizes = {(batch.first, batch.last, batch.cells): batch.index for batch in plan.megabatches}
        sizes |= {(one.first, one.last, one.cells): index for index, some in notes.items() for one in some}
        # A fragment with the range and size of a megabatch is that megabatch.
        self._own = {
            one.name: sizes[key]
            for one in self._fragments
            if (key := (one.first, one.last, one.values // array.n_features)) in sizes
            and one.values % array.n_features == 0
        }

    def megabatches(self, fragment: Fragment) -> set[int]:
        """Return the indices of the megabatches that a fragment may hold values of."""
        if fragment.name in self._own:
            return {self._own[fragment.name]}
        overlapping = (self._firsts <= fragment.last) & (self._lasts >= fragment.first)
        return set(self._indices[overlapping].tolist())

    def is_stray(self, fragment: Fragment) -> bool:
        """Tell whether a fragment is not one megabatch, and each megabatch in its range has its own fragment."""
        return fragment.name not in self._own and self.megabatches(fragment) <= set(self._own.values())

    def suspects(self, found: ReadBack) -> list[Fragment]:
        """Return the fragments that may hold wrong values or unplanned cells."""
        strangers = np.array(found.strangers, np.int64)
        return [
            fragment
            for fragment in self._fragments
            if self.megabatches(fragment) & found.wrong
            or ((fragment.first <= strangers) & (strangers <= fragment.last)).any()
        ]
