"""What of a plan is committed already: fragments matched against megabatches, data read only in doubt."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.store.array import EmbeddingsArray, Fragment


def missing_megabatches(array: EmbeddingsArray, plan: Plan, batches: Sequence[Megabatch]) -> list[Megabatch]:
    """Return those of `batches` whose cells are not all in the array.

    A fragment with exactly a megabatch's joinid range and number of values *is* that megabatch: planned ids
    of one identity are always the same, and a write commits whole or not at all. Where fragments only
    overlap (after consolidation, or under an earlier plan with other boundaries), ids are read.
    """
    committed: dict[tuple[int, int], list[Fragment]] = defaultdict(list)
    fragments = array.fragments()
    for fragment in fragments:
        committed[fragment.first, fragment.last].append(fragment)
    missing: list[Megabatch] = []
    doubtful: list[Megabatch] = []
    firsts = np.array([fragment.first for fragment in fragments], dtype=np.int64)
    lasts = np.array([fragment.last for fragment in fragments], dtype=np.int64)
    for batch in batches:
        values = batch.cells * array.n_features
        if any(fragment.values == values for fragment in committed[batch.first, batch.last]):
            continue
        overlapped = bool(np.any((firsts <= batch.last) & (lasts >= batch.first)))
        (doubtful if overlapped else missing).append(batch)
    for batch, planned in zip(doubtful, plan.read_ids(array.storage, doubtful), strict=True):
        present = array.joinids_between(batch.first, batch.last)
        if not np.isin(planned, present, assume_unique=True).all():
            missing.append(batch)
    return sorted(missing, key=lambda batch: batch.index)
