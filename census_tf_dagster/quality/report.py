"""The quality report of a release: what stands in ``qc/``, for programs (`report.json`) and for people (pictures)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from census_tf_dagster.io.storage import Storage
from census_tf_dagster.quality.coverage import Covered
from census_tf_dagster.quality.measures import Distribution
from census_tf_dagster.quality.verdicts import Verdict

REPORT, DISTRIBUTION = "report.json", "distribution.npz"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes
    ----------
    about
        Set, release, identity, plan and digest of the commits that it is of; when it was made, from which sample.
    coverage
        By column of obs: cells of the release, planned and embedded, of each value.
    genes_per_cell, vocabulary
        How much of a cell the model sees: figures.
    verdicts
        By name of the check.
    pictures
        PNG, by name.
    distribution
        What the next release is compared with.
    seconds
        Of each part.
    """

    about: Mapping[str, Any]
    coverage: Mapping[str, list[Covered]]
    genes_per_cell: Mapping[str, float | int]
    vocabulary: Mapping[str, float | int]
    verdicts: Mapping[str, Verdict]
    pictures: Mapping[str, bytes]
    distribution: Distribution
    seconds: Mapping[str, float]

    def write(self, storage: Storage, folder: str) -> None:
        """Store it; `report.json` last, so that what it names is there."""
        for name, picture in self.pictures.items():
            storage.write(f"{folder}/{name}.png", picture)
        storage.write(f"{folder}/{DISTRIBUTION}", self.distribution.to_bytes())
        content = {
            **self.about,
            "coverage": {column: [asdict(row) for row in rows] for column, rows in self.coverage.items()},
            "genes_per_cell": dict(self.genes_per_cell),
            "vocabulary": dict(self.vocabulary),
            "checks": {name: asdict(verdict) for name, verdict in self.verdicts.items()},
            "pictures": [f"{name}.png" for name in self.pictures],
            "seconds": {part: round(seconds, 2) for part, seconds in self.seconds.items()},
        }
        storage.write(f"{folder}/{REPORT}", json.dumps(content, indent=1).encode())


def read_about(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Return what a stored report says of itself; None when there is none that can be read."""
    uri = f"{folder}/{REPORT}"
    if not storage.exists(uri):
        return None
    try:
        content = json.loads(storage.read(uri))
    except ValueError:
        return None
    known = isinstance(content, dict) and isinstance(content.get("identity"), dict)
    return content if known else None


def read_distribution(storage: Storage, folder: str) -> Distribution | None:
    """Return the distribution beside a report; None when it cannot be read."""
    uri = f"{folder}/{DISTRIBUTION}"
    if not storage.exists(uri):
        return None
    try:
        return Distribution.from_bytes(storage.read(uri))
    except ValueError:
        return None
