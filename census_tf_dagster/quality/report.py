"""Writes and reads the quality report of a release in ``qc/``: `report.json` for programs, pictures for people.

Computing the content belongs in `pipeline.assess_quality`.
"""

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
    """The content of a quality report.

    Attributes
    ----------
    about
        Set, release, identity, plan and digest of the commits that the report describes; time and sample.
    coverage
        Numbers of cells (in the release, planned, embedded) of each value, by column of obs.
    genes_per_cell, vocabulary
        Figures of how much of a cell the model sees.
    verdicts
        Verdicts by name of the check.
    pictures
        PNG files by name.
    distribution
        Distribution with which the next release is compared.
    seconds
        Seconds of each part.
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
        """Store the report. `report.json` comes last, so that the files that it names exist."""
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
    """Return the content of a stored report; None if there is no readable one."""
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
    """Return the distribution beside a report; None if there is no readable one."""
    uri = f"{folder}/{DISTRIBUTION}"
    if not storage.exists(uri):
        return None
    try:
        return Distribution.from_bytes(storage.read(uri))
    except ValueError:
        return None
