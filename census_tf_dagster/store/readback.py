"""Read cells back and find whatever is wrong with them: one pass, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.compiled import compiled
from census_tf_dagster.store.array import EmbeddingsArray

CELLS_AT_ONCE = 4096
NAMED = 10
"""How many joinids a problem names."""

Ids = npt.NDArray[np.int64]

PROBLEMS = {
    "missing": ("cells", "planned cells are missing"),
    "unplanned": ("cells", "cells are in the array but not planned"),
    "incomplete": ("features", "planned cells lack some of their values"),
    "repeated": ("features", "cells hold a feature more than once"),
    "out of range": ("features", "cells hold features beyond the last"),
    "not finite": ("values", "cells have values that are not finite"),
    "all zero": ("values", "cells have nothing but zeros, though START is always pooled"),
}
"""What can be wrong with a cell: the rule that it breaks, and how that is said."""


@dataclass
class Problems:
    """What was found wrong, over any number of cells.

    Attributes
    ----------
    counts
        Cells with each of `PROBLEMS`.
    first
        The first few of their joinids.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, problem: str, joinids: Ids) -> None:
        """Count some cells that have a problem."""
        if len(joinids):
            self.counts[problem] = self.counts.get(problem, 0) + len(joinids)
            named = self.first.setdefault(problem, [])
            named.extend(joinids[: NAMED - len(named)].tolist())

    def merge(self, other: "Problems") -> None:
        """Take over what was found in other cells, which come later."""
        for problem, count in other.counts.items():
            self.counts[problem] = self.counts.get(problem, 0) + count
            self.first[problem] = (self.first.get(problem, []) + other.first[problem])[:NAMED]

    def of_rule(self, rule: str) -> list[str]:
        """Return a sentence for each problem that breaks a rule."""
        return [
            f"{self.counts[problem]} {said}, joinids {self.first[problem]}"
            for problem, (breaks, said) in PROBLEMS.items()
            if breaks == rule and problem in self.counts
        ]

    def __str__(self) -> str:
        rules = dict.fromkeys(rule for rule, _ in PROBLEMS.values())
        return "; ".join(sentence for rule in rules for sentence in self.of_rule(rule))


def read_back(array: EmbeddingsArray, plan: Plan, batches: tuple[Megabatch, ...], first: int, last: int) -> Problems:
    """Read joinids `first` to `last` back and compare them with the planned cells of `batches`.

    Parameters
    ----------
    array, plan
        What is read, and what it must hold.
    batches
        Megabatches by their first joinid, all planned cells between `first` and `last`.
    first, last
        The range, inclusive.
    """
    found = Problems()
    with array.reading() as values_of:
        for planned, low, high in _parts(array, plan, batches, first, last):
            _look_at(planned, values_of(slice(low, high)), array.n_features, found)
    return found


def _look_at(planned: Ids, tables: Iterable[pa.Table], n_features: int, found: Problems) -> None:
    """Add what is wrong with some planned cells, and with whatever else is among what was read."""
    n = len(planned)
    seen = np.zeros((n, n_features), np.bool_)
    repeated, beyond, infinite, nonzero = np.zeros((4, n), np.bool_)
    strangers: list[Ids] = []
    for table in tables:
        joinids, features, values = _columns(table)
        if _look(joinids, features, values, planned, seen, repeated, beyond, infinite, nonzero):
            strangers.append(np.setdiff1d(joinids, planned))
    stored = seen.sum(axis=1)
    # A cell that is not there at all is missing, and nothing else.
    there = (stored > 0) | beyond
    for problem, which in (
        ("missing", ~there),
        ("incomplete", there & (stored < n_features)),
        ("repeated", repeated),
        ("out of range", beyond),
        ("not finite", infinite),
        ("all zero", there & ~nonzero & ~infinite),
    ):
        found.add(problem, planned[which])
    if strangers:
        found.add("unplanned", np.unique(np.concatenate(strangers)))


def _parts(
    array: EmbeddingsArray, plan: Plan, batches: tuple[Megabatch, ...], first: int, last: int
) -> Iterator[tuple[Ids, int, int]]:
    """Yield some planned cells at a time with the range they answer for: together without a gap."""
    groups = _overlapping(batches)
    ends = [group[0].first - 1 for group in groups[1:]] + [last]
    for number, (group, end) in enumerate(zip(groups, ends, strict=True)):
        planned = np.concatenate(plan.read_ids(array.storage, group))
        if len(group) > 1:
            planned.sort()
        for at in range(0, len(planned), CELLS_AT_ONCE):
            low = first if number == at == 0 else int(planned[at])
            high = end if at + CELLS_AT_ONCE >= len(planned) else int(planned[at + CELLS_AT_ONCE]) - 1
            yield planned[at : at + CELLS_AT_ONCE], low, high


def _overlapping(batches: tuple[Megabatch, ...]) -> list[list[Megabatch]]:
    """Group megabatches whose ranges overlap, as those of copied and computed cells may."""
    groups: list[list[Megabatch]] = []
    end = -1
    for batch in batches:
        if batch.first > end:
            groups.append([])
        groups[-1].append(batch)
        end = max(end, batch.last)
    return groups


def _columns(table: pa.Table) -> tuple[Ids, Ids, npt.NDArray[np.float32]]:
    joinids, features, values = (
        table[name].combine_chunks().to_numpy(zero_copy_only=False)
        for name in ("soma_dim_0", "soma_dim_1", "soma_data")
    )
    return joinids, features, values


@compiled()
def _look(joinids, features, values, planned, seen, repeated, beyond, infinite, nonzero):  # type: ignore[no-untyped-def]
    """Mark what is seen of each planned cell; tell whether other cells were among them."""
    strange = False
    last, at, known = -1, 0, False
    for i in range(len(joinids)):
        if joinids[i] != last:
            last = joinids[i]
            at = np.searchsorted(planned, last)
            known = at < len(planned) and planned[at] == last
        if not known:
            strange = True
            continue
        if features[i] < 0 or features[i] >= seen.shape[1]:
            beyond[at] = True
            continue
        if seen[at, features[i]]:
            repeated[at] = True
        seen[at, features[i]] = True
        if not np.isfinite(values[i]):
            infinite[at] = True
        elif values[i] != 0:
            nonzero[at] = True
    return strange
