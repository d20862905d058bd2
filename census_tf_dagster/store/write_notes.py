"""Writes and reads the notes of a shard's runs: a checksum of each megabatch, and the cells that the run set aside.

A run writes a note about a megabatch before it commits the megabatch. So every megabatch in the array has a note. A
note without cells in the array means that the run ended in between. Each run has its own file, so two runs on one shard
(of which one was believed dead) do not overwrite each other's notes.

Comparing the array with the notes belongs in `readback`.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import TypeAdapter, ValidationError

from census_tf_dagster.census.plan import Megabatch, Plan
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.layout import ReleaseFolder

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """A note about one megabatch, as a run wrote it.

    Attributes
    ----------
    megabatch
        Index of the megabatch in the plan.
    first, last, cells
        Smallest and largest joinid of the written cells, and their number; -1, -1 and 0 if there are none.
    checksum
        `Checksum` of the written cells.
    set_aside
        The reason for each other cell of the megabatch, by joinid.
    widened
        Joinids of cells that left the range of the compute precision and were computed in a wider one.
    """

    megabatch: int
    first: int
    last: int
    cells: int
    checksum: str
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        batch: Megabatch,
        joinids: Ids,
        values: npt.NDArray[np.float32],
        set_aside: Mapping[int, str] | None = None,
        widened: Iterable[int] = (),
    ) -> Self:
        """Make the note about cells to commit: ascending joinids int64 ``(n,)``, values float32 ``(n, n_features)``."""
        checksum = Checksum()
        checksum.add(joinids, values)
        first, last = (int(joinids[0]), int(joinids[-1])) if len(joinids) else (-1, -1)
        return cls(
            megabatch=batch.index,
            first=first,
            last=last,
            cells=len(joinids),
            checksum=checksum.hexdigest(),
            set_aside=dict(sorted((set_aside or {}).items())),
            widened=tuple(sorted(widened)),
        )


class Checksum:
    """XXH3 checksums, 128 bits each, of joinids and of stored values. Cells must be added in ascending order."""

    def __init__(self) -> None:
        self._joinids = xxhash.xxh3_128()
        self._values = xxhash.xxh3_128()

    def add(self, joinids: Ids, values: npt.NDArray[np.float32]) -> None:
        """Add cells: joinids int64 ``(n,)``, values float32 ``(n, n_features)``."""
        self._joinids.update(np.ascontiguousarray(joinids, "<i8").data)
        self._values.update(np.ascontiguousarray(values, "<f4").data)

    def hexdigest(self) -> str:
        """Return both checksums as 64 hexadecimal digits."""
        return f"{self._joinids.hexdigest()}{self._values.hexdigest()}"


Notes = Mapping[int, tuple[Written, ...]]
"""The notes of all runs about each megabatch, by its index in the plan."""

_FILE = TypeAdapter(tuple[Written, ...])


def read_notes(storage: Storage, folder: ReleaseFolder, plan: Plan, shards: Iterable[int]) -> Notes:
    """Read the notes of all runs of these shards. A damaged file is ignored."""
    found: dict[int, list[Written]] = {}
    for shard in shards:
        for uri in storage.list(folder.notes(plan.totals.plan, shard)):
            if not uri.endswith(".json"):
                continue
            try:
                noted = _FILE.validate_json(storage.read(uri))
            except ValidationError:
                continue
            for written in noted:
                found.setdefault(written.megabatch, []).append(written)
    return {index: tuple(notes) for index, notes in found.items()}


class NoteWriter:
    """Writes the notes of one run of a shard."""

    def __init__(self, storage: Storage, folder: ReleaseFolder, plan: Plan, shard: int) -> None:
        self._storage = storage
        self._uri = f"{folder.notes(plan.totals.plan, shard)}/{uuid.uuid4().hex}.json"
        self.noted: list[Written] = []

    def note(self, written: Written) -> None:
        """Store a note. Call this before the megabatch is committed."""
        self.noted.append(written)
        self._storage.write(self._uri, _FILE.dump_json(tuple(self.noted)))
