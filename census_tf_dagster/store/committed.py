"""Finds the megabatches of a plan that are not committed, by comparing fragments with megabatches.

It reads ids only in doubt. Whether committed values are right belongs in `verification`.
"""

from collections.abc import Sequence

import numpy as np

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.fragments import Fragment
from census_tf_dagster.store.write_notes import Notes


def missing_megabatches(
    array: EmbeddingsArray,
    plan: Plan,
    batches: Sequence[Megabatch],
    notes: Notes,
    committed: Sequence[Fragment] | None = None,
) -> list[Megabatch]:
    """Return the megabatches of `batches` with cells that are neither in the array nor set aside.

    A fragment with exactly the joinid range and number of values of a megabatch *is* that megabatch, because the
    planned ids of an identity are always the same and a write commits all or nothing. Ranges of copied and computed
    cells may overlap; such a fragment is no reason to read the ids of another megabatch. Ids are read only where other
    fragments overlap: after consolidation, or from an earlier plan with other boundaries.

    Parameters
    ----------
    array, plan, batches
        The array, the plan, and the megabatches to check.
    notes
        Notes of the runs that wrote these megabatches. Cells that were set aside are not expected in the array.
    committed
        The array's fragments, if the caller has listed them already.
    """
    fragments = array.fragments() if committed is None else committed
    expected = {(batch.first, batch.last, batch.cells * array.n_features) for batch in plan.megabatches}
    expected |= {(one.first, one.last, one.cells * array.n_features) for some in notes.values() for one in some}
    whole = {key for one in fragments if (key := (one.first, one.last, one.values)) in expected}
    others = [one for one in fragments if (one.first, one.last, one.values) not in whole]
    firsts = np.array([fragment.first for fragment in others], dtype=np.int64)
    lasts = np.array([fragment.last for fragment in others], dtype=np.int64)
    missing: list[Megabatch] = []
    doubtful: list[Megabatch] = []
    for batch in batches:
        if (batch.first, batch.last, batch.cells * array.n_features) in whole:
            continue
        noted = notes.get(batch.index, ())
        if any(not one.cells or (one.first, one.last, one.cells * array.n_features) in whole for one in noted):
            continue
        overlapped = bool(np.any((firsts <= batch.last) & (lasts >= batch.first)))
        (doubtful if overlapped else missing).append(batch)
    for batch, ids in zip(doubtful, plan.read_ids(array.storage, doubtful), strict=True):
        absent = np.setdiff1d(ids, array.joinids_between(batch.first, batch.last), assume_unique=True)
        if len(absent) and not any(set(absent.tolist()) <= one.set_aside.keys() for one in notes.get(batch.index, ())):
            missing.append(batch)
    return sorted(missing, key=lambda batch: batch.index)
