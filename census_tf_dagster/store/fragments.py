"""Describes fragments, the files that TileDB makes from a write.

Listing and removing fragments belongs in `array`, and so does the error about damaged ones.
"""

import re
from dataclasses import dataclass

_TIMES = re.compile(r"__\d+_(?P<last>\d+)_[0-9a-f]{32}.*")
"""Pattern of the names that TileDB gives to fragments and metadata below an array."""
FRAGMENT_FILES = frozenset({"__fragment_metadata.tdb", "a0.tdb", "d0.tdb", "d1.tdb"})
"""Files of a complete fragment: its metadata, the values, the two coordinates."""


@dataclass(frozen=True)
class Fragment:
    """One committed write.

    Attributes
    ----------
    name
        Unique name within the array.
    first, last
        Smallest and largest joinid of its values.
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
    """Return the timestamp in the name of a fragment or of metadata; 0 for any other name."""
    found = _TIMES.fullmatch(name)
    return int(found["last"]) if found else 0
