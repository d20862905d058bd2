"""What each run of a shard has written: a checksum of each megabatch, and the cells that it set aside.

A run notes a megabatch before it commits it, so nothing is in the array that no note tells of; a note without cells in
the array only means that the run ended in between. Each run has a file of its own: two that work on one shard, of which
one is believed dead, do not overwrite each other's notes.
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
    """One megabatch as a run wrote it.

    Attributes
    ----------
    megabatch
        Its index in the plan.
    first, last, cells
        Smallest and largest joinid of the cells that were written, and how many; -1, -1 and 0 for none.
    checksum
        `Checksum` of these cells.
    set_aside
        Why each of the other cells of the megabatch has no embedding, by joinid.
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
        """Describe what is about to be committed: ascending joinids int64 ``(n,)``, values ``(n, n_features)``."""
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
    """XXH3, 128 bits, of joinids and of values as they are stored; cells are added in ascending order."""

    def __init__(self) -> None:
        self._joinids = xxhash.xxh3_128()
        self._values = xxhash.xxh3_128()

    def add(self, joinids: Ids, values: npt.NDArray[np.float32]) -> None:
        """Add some cells: int64 ``(n,)``, float32 ``(n, n_features)``."""
        self._joinids.update(np.ascontiguousarray(joinids, "<i8").data)
        self._values.update(np.ascontiguousarray(values, "<f4").data)

    def hexdigest(self) -> str:
        """Return 64 hexadecimal digits."""
        return f"{self._joinids.hexdigest()}{self._values.hexdigest()}"


Notes = Mapping[int, tuple[Written, ...]]
"""What runs have written of each megabatch, by its index."""

_FILE = TypeAdapter(tuple[Written, ...])


def read_notes(storage: Storage, folder: ReleaseFolder, plan: Plan, shards: Iterable[int]) -> Notes:
    """Read what all runs of some shards have noted; a damaged file tells nothing."""
    found: dict[int, list[Written]] = {}
    for shard in shards:
        for uri in storage.list(folder.notes(plan.totals.plan, shard)):
            if not uri.endswith(".json"):
                continue
            try:
                noted = _FILE.validate_json(storage.read(uri))
            except ValidationError:
                continue
            for one in noted:
                found.setdefault(one.megabatch, []).append(one)
    return {index: tuple(some) for index, some in found.items()}


class NoteBook:
    """Where one run of a shard notes what it writes."""

    def __init__(self, storage: Storage, folder: ReleaseFolder, plan: Plan, shard: int) -> None:
        self._storage = storage
        self._uri = f"{folder.notes(plan.totals.plan, shard)}/{uuid.uuid4().hex}.json"
        self.noted: list[Written] = []

    def note(self, one: Written) -> None:
        """Store a note, before its megabatch is committed."""
        self.noted.append(one)
        self._storage.write(self._uri, _FILE.dump_json(tuple(self.noted)))
