"""Reads cells back and finds what is wrong with them, in one pass and in bounded memory.

Recording the result belongs in `verification`, mending in `mending`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledb
import tiledbsoma

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.errors import StoreError
from census_tf_dagster.io.compiled import compiled
from census_tf_dagster.io.names import is_local
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.write_notes import Checksum, Notes, Written

CELLS_AT_ONCE = 4096
NAMED = 10
"""Most joinids that a problem names."""

Ids = npt.NDArray[np.int64]

PROBLEMS = {
    "missing": ("cells", "planned cells are missing"),
    "unplanned": ("cells", "cells are in the array but not planned"),
    "incomplete": ("features", "planned cells lack some of their values"),
    "repeated": ("features", "cells hold a feature more than once"),
    "out of range": ("features", "cells hold features beyond the last"),
    "not finite": ("values", "cells have values that are not finite"),
    "all zero": ("values", "cells have only zeros, which cannot be, because START is always pooled"),
    "unreadable": ("values", "cells cannot be read, because files of the array are damaged"),
    "resized": ("values", "cells are in fragments whose files have changed their length"),
    "changed": ("values", "cells are in megabatches that hold other values than were written"),
}
"""Problems of a cell: the rule that each one breaks, and the text about it."""


@dataclass
class Problems:
    """The problems of any number of cells.

    Attributes
    ----------
    counts
        Number of cells with each of `PROBLEMS`.
    first
        The first few joinids of these cells.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, problem: str, joinids: Ids) -> None:
        """Add cells that have a problem."""
        if len(joinids):
            self.counts[problem] = self.counts.get(problem, 0) + len(joinids)
            named = self.first.setdefault(problem, [])
            named.extend(joinids[: NAMED - len(named)].tolist())

    def merge(self, other: "Problems") -> None:
        """Add the problems of other cells, whose joinids are larger."""
        for problem, count in other.counts.items():
            self.counts[problem] = self.counts.get(problem, 0) + count
            self.first[problem] = (self.first.get(problem, []) + other.first[problem])[:NAMED]

    def of_rule(self, rule: str) -> list[str]:
        """Return a text for each problem that breaks a rule."""
        return [
            f"{self.counts[problem]} {said}, joinids {self.first[problem]}"
            for problem, (breaks, said) in PROBLEMS.items()
            if breaks == rule and problem in self.counts
        ]

    def __str__(self) -> str:
        rules = dict.fromkeys(rule for rule, _ in PROBLEMS.values())
        return "; ".join(sentence for rule in rules for sentence in self.of_rule(rule))


@dataclass
class ReadBack:
    """The result of reading megabatches back.

    Attributes
    ----------
    problems
        Problems of the cells.
    wrong
        Indices of the megabatches that have a problem.
    strangers
        Unplanned joinids within the range that was read.
    found
        Description of each megabatch without problems: the matching note of a run, or what was read if it has no note.
    """

    problems: Problems = field(default_factory=Problems)
    wrong: set[int] = field(default_factory=set)
    strangers: list[int] = field(default_factory=list)
    found: list[Written] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.problems)


def read_back(
    array: EmbeddingsArray, plan: Plan, batches: tuple[Megabatch, ...], first: int, last: int, notes: Notes
) -> ReadBack:
    """Read joinids `first` to `last` back; compare them with the planned cells of `batches` and with the runs' notes.

    Parameters
    ----------
    array, plan
        The array to read, and the plan that it must match.
    batches
        All planned megabatches between `first` and `last`, ordered by first joinid.
    first, last
        The range, inclusive.
    notes
        Notes of the runs that wrote these megabatches. Each megabatch must match one of its notes; one without a note
        must hold all its cells.
    """
    result = ReadBack()
    with array.reading() as values_of:
        for group, parts in _groups(array, plan, batches, first, last):
            check = _Group(group)
            for planned, members, low, high in parts:
                part = _Part(planned, array.n_features)
                try:
                    part.add(values_of(slice(low, high)))
                except (tiledbsoma.SOMAError, tiledb.TileDBError, RuntimeError, MemoryError) as error:
                    _require_damage(array, error)
                    check.unreadable(planned, members, result)
                else:
                    check.add(part, members, result)
            check.compare(notes, result)
    return result


def _require_damage(array: EmbeddingsArray, error: Exception) -> None:
    """Raise `StoreError` if a read failed for another reason than damaged files."""
    if not is_local(array.uri) and not array.damaged() and any(word in str(error) for word in ("S3", "curl")):
        raise StoreError(
            f"{array.uri} cannot be read ({error}). Expected a readable store: run this again when it can be read."
        ) from error


class _Part:
    """Planned cells with adjacent joinids, and their values in the array."""

    def __init__(self, planned: Ids, n_features: int) -> None:
        n = len(planned)
        self.planned = planned
        self.values = np.zeros((n, n_features), np.float32)
        self._seen = np.zeros((n, n_features), np.bool_)
        self._repeated, self._beyond, self._infinite, self._nonzero = np.zeros((4, n), np.bool_)
        self.strangers: list[Ids] = []

    def add(self, tables: Iterable[pa.Table]) -> None:
        """Add the values that were read."""
        for table in tables:
            joinids, features, values = _columns(table)
            marks = (self._seen, self._repeated, self._beyond, self._infinite, self._nonzero)
            if _mark(joinids, features, values, self.planned, self.values, *marks):
                self.strangers.append(np.setdiff1d(joinids, self.planned))

    def there(self) -> npt.NDArray[np.bool_]:
        """Return which cells have any value, bool ``(n,)``."""
        found: npt.NDArray[np.bool_] = self._seen.any(axis=1) | self._beyond
        return found

    def problems(self) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        """Yield each problem with the cells that have it, bool ``(n,)``; an absent cell has none of these."""
        there = self.there()
        yield "incomplete", there & ~self._seen.all(axis=1)
        yield "repeated", self._repeated
        yield "out of range", self._beyond
        yield "not finite", self._infinite
        yield "all zero", there & ~self._nonzero & ~self._infinite


class _Group:
    """Megabatches whose ranges overlap, while they are read part by part."""

    def __init__(self, batches: list[Megabatch]) -> None:
        self._batches = batches
        self._checksums = [Checksum() for _ in batches]
        self._present: list[list[Ids]] = [[] for _ in batches]
        self._absent: list[list[Ids]] = [[] for _ in batches]

    def add(self, part: _Part, members: npt.NDArray[np.intp], result: ReadBack) -> None:
        """Add a part; `members` is the megabatch of each of its cells, as a position in the group."""
        for problem, which in part.problems():
            if which.any():
                result.problems.add(problem, part.planned[which])
                result.wrong |= {self._batches[member].index for member in np.unique(members[which])}
        if part.strangers:
            strangers = np.unique(np.concatenate(part.strangers))
            result.problems.add("unplanned", strangers)
            result.strangers += strangers.tolist()
        there = part.there()
        for member in range(len(self._batches)):
            mine = slice(None) if len(self._batches) == 1 and there.all() else (members == member) & there
            self._checksums[member].add(part.planned[mine], part.values[mine])
            self._present[member].append(part.planned[mine])
            self._absent[member].append(part.planned[(members == member) & ~there])

    def unreadable(self, planned: Ids, members: npt.NDArray[np.intp], result: ReadBack) -> None:
        """Add a part that could not be read."""
        result.problems.add("unreadable", planned)
        result.wrong |= {self._batches[member].index for member in np.unique(members)}

    def compare(self, notes: Notes, result: ReadBack) -> None:
        """Compare each megabatch with the notes of the runs that wrote it."""
        for batch, checksum, present, absent in zip(
            self._batches, self._checksums, self._present, self._absent, strict=True
        ):
            noted = notes.get(batch.index, ())
            lacking = np.concatenate(absent) if absent else np.empty(0, np.int64)
            same = [
                note
                for note in noted
                if note.checksum == checksum.hexdigest() and note.set_aside.keys() == set(lacking.tolist())
            ]
            if batch.index in result.wrong:
                continue
            if same:
                result.found.append(same[-1])
                continue
            missing = [joinid for joinid in lacking.tolist() if not any(joinid in note.set_aside for note in noted)]
            if missing:
                result.problems.add("missing", np.array(missing))
            elif noted:
                result.problems.add("changed", np.sort(np.concatenate([*present, lacking])))
            else:
                ids = np.concatenate(present)
                result.found.append(Written(batch.index, int(ids[0]), int(ids[-1]), len(ids), checksum.hexdigest()))
                continue
            result.wrong.add(batch.index)


def _groups(
    array: EmbeddingsArray, plan: Plan, batches: tuple[Megabatch, ...], first: int, last: int
) -> Iterator[tuple[list[Megabatch], Iterator[tuple[Ids, npt.NDArray[np.intp], int, int]]]]:
    """Yield overlapping megabatches with their parts: planned cells, the megabatch of each, and the range to read.

    The ranges are adjacent, without gaps.
    """
    groups = _overlapping(batches)
    ends = [group[0].first - 1 for group in groups[1:]] + [last]
    for number, (group, end) in enumerate(zip(groups, ends, strict=True)):
        ids = plan.read_ids(array.storage, group)
        planned, members = np.concatenate(ids), np.repeat(np.arange(len(ids)), [len(one) for one in ids])
        if len(group) > 1:
            order = np.argsort(planned)
            planned, members = planned[order], members[order]
        yield group, _parts(planned, members, first if number == 0 else int(planned[0]), end)


def _parts(
    planned: Ids, members: npt.NDArray[np.intp], first: int, last: int
) -> Iterator[tuple[Ids, npt.NDArray[np.intp], int, int]]:
    for at in range(0, len(planned), CELLS_AT_ONCE):
        low = int(planned[at]) if at else first
        high = last if at + CELLS_AT_ONCE >= len(planned) else int(planned[at + CELLS_AT_ONCE]) - 1
        yield planned[at : at + CELLS_AT_ONCE], members[at : at + CELLS_AT_ONCE], low, high


def _overlapping(batches: tuple[Megabatch, ...]) -> list[list[Megabatch]]:
    """Group megabatches whose ranges overlap. Ranges of copied and of computed cells may overlap."""
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
def _mark(joinids, features, values, planned, dense, seen, repeated, beyond, infinite, nonzero):  # type: ignore[no-untyped-def]
    """Store the values of planned cells and mark their properties; return whether there were unplanned cells."""
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
        dense[at, features[i]] = values[i]
        if not np.isfinite(values[i]):
            infinite[at] = True
        elif values[i] != 0:
            nonzero[at] = True
    return strange
