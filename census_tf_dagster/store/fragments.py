"""Fragments: what TileDB makes of a write, and what can be wrong with one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from census_tf_dagster.errors import UserError

if TYPE_CHECKING:
    from census_tf_dagster.store.array import EmbeddingsArray

_TIMES = re.compile(r"__\d+_(?P<last>\d+)_[0-9a-f]{32}.*")
"""Names of what TileDB writes below an array."""
FRAGMENT_FILES = frozenset({"__fragment_metadata.tdb", "a0.tdb", "d0.tdb", "d1.tdb"})
"""Files of a whole fragment: its metadata, the values, the two coordinates."""


class DamagedFragmentsError(UserError):
    """Fragments are committed and cannot be opened, which keeps TileDB from opening the array.

    Attributes
    ----------
    array
        Where they are.
    reasons
        What is wrong with each, by its name.
    """

    def __init__(self, array: "EmbeddingsArray", reasons: Mapping[str, str]) -> None:
        first, reason = next(iter(reasons.items()))
        super().__init__(
            f"{len(reasons)} fragments of the array at {array.uri} are damaged, e.g. {first}: {reason}. Run the shard "
            "that wrote them again: it removes them, and computes what they held."
        )
        self.array = array
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class Fragment:
    """One committed write.

    Attributes
    ----------
    name
        Unique name within the array.
    first, last
        Smallest and largest joinid in it.
    values
        Number of stored values (cells x features).
    """

    name: str
    first: int
    last: int
    values: int


def name_of(uri: str) -> str:
    """Return the last part of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def last_timestamp(name: str) -> int:
    """Return the timestamp in the name of a fragment or of metadata; 0 for anything else."""
    found = _TIMES.fullmatch(name)
    return int(found["last"]) if found else 0
