"""The identity of an array: everything that decides its values and which cells it holds.

Facts that do not decide values, such as package versions, hosts and timings, do not belong here.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from census_tf_dagster.errors import UserError

NUMERIC_VERSION = 3
"""The version of the numeric code. Raise it by hand when the code may produce other values than before."""

RELEASE_FIELDS = {"census_uri", "census_build_date", "value_filter", "mod", "gene_fingerprint"}
"""The fields that may differ between two arrays when one of them reuses values of the other."""


class ArrayIdentity:
    """What is the same for all identities, which are frozen dataclasses of texts and numbers.

    Two runs with equal identities may write into the same array. Any difference requires another array.
    """

    embedding_dim: int
    storage_precision: str

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal identities give equal strings."""
        return json.dumps(vars(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def require_equal(self, stored_json: str, where: str) -> None:
        """Refuse an identity from the store that differs from this one.

        Raises
        ------
        UserError
            When they differ. The message shows the stored and the present value of each differing field.
        """
        if stored_json == self.to_json():
            return
        try:
            stored: dict[str, Any] = json.loads(stored_json)
        except json.JSONDecodeError:
            stored = {}
        rows = [
            f"  {name}: stored {stored.get(name)!r}, this run {value!r}"
            for name, value in vars(self).items()
            if stored.get(name) != value
        ]
        raise UserError(
            f"{where} belongs to another identity; nothing was written:\n" + "\n".join(rows) + "\n"
            "Use another set name or another store, or restore the inputs with which the array was made."
        )


@dataclass(frozen=True)
class Identity(ArrayIdentity):
    """Everything that decides an embedding's value and a cell's place in the array of a release."""

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

    def values_differ(self, other: "Identity") -> list[str]:
        """Return the differing fields among those that decide a cell's value in any release.

        The other fields only say which release it is and which of its cells are embedded. The order of the genes
        depends on the dataset; `census.cell_keys` compares it.
        """
        names = (field.name for field in fields(self) if field.name not in RELEASE_FIELDS)
        return [name for name in names if getattr(self, name) != getattr(other, name)]
