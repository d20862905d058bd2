"""What of a plan is committed already: fragments matched against megabatches, data read only in doubt."""

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
    """Return those of `batches` with cells that are neither in the array nor set aside.

    A fragment with exactly a megabatch's joinid range and number of values *is* that megabatch: planned ids
    of one identity are always the same, and a write commits whole or not at all. So it is no reason to read ids for
    another megabatch whose range it overlaps, as ranges of copied and computed cells may. Where other fragments
    overlap (after consolidation, or under an earlier plan with other boundaries), ids are read.

    Parameters
    ----------
    array, plan, batches
        What is looked at.
    notes
        What runs have written of these megabatches: cells that were set aside are not expected in the array.
    committed
        The array's fragments, when they were listed already.
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
