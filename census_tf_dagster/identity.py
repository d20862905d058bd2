"""What decides whether two pieces of work belong to one array."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from census_tf_dagster.errors import UserError

NUMERIC_VERSION = 2
"""Raised by hand when the code of this project may produce other values than before."""

RELEASE_FIELDS = {"census_uri", "census_build_date", "value_filter", "mod", "gene_fingerprint"}
"""Fields that may differ between two arrays of which one has values that the other can take."""


@dataclass(frozen=True)
class Identity:
    """All that decides an embedding's value and a cell's place in the array.

    Two runs with equal identities may write into one array; any difference means another array. What
    does not decide values (package versions, hosts, timings) is the *record* and stands elsewhere.
    """

    census_uri: str
    census_build_date: str
    organism: str
    value_filter: str | None
    mod: int
    gene_order: str
    gene_fingerprint: str
    checkpoint_fingerprint: str
    compute_precision: str
    storage_precision: str
    embedding_dim: int
    fractional_counts: str = "embed"
    numeric_version: int = NUMERIC_VERSION

    def to_json(self) -> str:
        """Serialise with sorted keys: equal identities give equal strings."""
        return json.dumps(asdict(self), sort_keys=True)

    def values_differ(self, other: "Identity") -> list[str]:
        """Return the fields that differ of those that decide a cell's value, whatever release it is in.

        The others say which release and which of its cells; of the genes' order, which is a matter of each dataset,
        `census.cell_keys` takes care.
        """
        names = (field.name for field in fields(self) if field.name not in RELEASE_FIELDS)
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def require_equal(self, stored_json: str, where: str) -> None:
        """Compare with an identity found in the store.

        Raises
        ------
        UserError
            With the stored and the present value of each differing field side by side.
        """
        if stored_json == self.to_json():
            return
        try:
            stored: dict[str, Any] = json.loads(stored_json)
        except json.JSONDecodeError:
            stored = {}
        rows = [
            f"  {field.name}: stored {stored.get(field.name)!r}, this run {getattr(self, field.name)!r}"
            for field in fields(self)
            if stored.get(field.name) != getattr(self, field.name)
        ]
        raise UserError(
            f"{where} belongs to another identity; nothing was written:\n" + "\n".join(rows) + "\n"
            "Use another set name or store, or restore the inputs that the array was made with."
        )
