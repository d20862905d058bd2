"""Checks the rules that a finished array must keep, as far as metadata shows them.

The rules of the Census's tool for contributed embeddings (`tools/census_contrib/src/census_contrib/validate.py` in the
cellxgene-census repository): a 2-D sparse array of float32 with int64 coordinates, as many rows as the experiment's obs
domain, at least one cell, only joinids of obs, features in range, no coordinate twice, counts as in the metadata, and
the Census's own storage version.

This project's rules: exactly the planned cells except those that were set aside; each cell has all its values; all
values are finite, not all zero, and as they were written; a list for consumers states this.

Rules that need the values belong in `readback`.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import tiledb
import tiledbsoma

from census_tf_dagster.io.storage import Storage

Rule = Literal["schema", "shape", "storage_version", "cells", "features", "values", "publication", "obs_ids"]


@dataclass(frozen=True)
class Finding:
    """The result of checking a rule.

    Attributes
    ----------
    rule
        Name of the rule.
    wrong
        A text about each fault; empty if the rule is kept.
    """

    rule: Rule
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule}: {'; '.join(self.wrong) or 'kept'}"


def column_faults(uri: str, storage: Storage) -> list[str]:
    """Return how the array's dimensions and types differ from an embedding's. Reads only metadata."""
    with tiledbsoma.open(uri, context=storage.soma_context) as found:
        if not isinstance(found, tiledbsoma.SparseNDArray):
            return [f"it is a {type(found).__name__}; expected a SparseNDArray"]
        columns = {name: found.schema.field(name).type for name in found.schema.names}
    expected = {"soma_dim_0": pa.int64(), "soma_dim_1": pa.int64(), "soma_data": pa.float32()}
    return [
        f"{name} is {columns.get(name, 'absent')}; expected {expected.get(name, 'no such column')}"
        for name in sorted(columns.keys() | expected.keys(), reverse=True)
        if name != "soma_joinid" and columns.get(name) != expected.get(name)
    ]


def duplicates_faults(uri: str, storage: Storage) -> list[str]:
    """Return a fault if the array allows a coordinate twice. Reads only metadata."""
    if not tiledb.ArraySchema.load(uri, ctx=storage.tiledb_ctx).allows_duplicates:
        return []
    return ["it allows duplicates, so it would hold a cell twice that is written again; expected no duplicates"]


def shape_faults(found: tuple[int, ...], expected: tuple[int, int]) -> list[str]:
    """Compare the array's shape with the Census's obs domain and the model's embedding."""
    return [] if found == expected else [f"the shape is {found}; expected {expected}"]


def storage_version_faults(array: int, census: int) -> list[str]:
    """Compare TileDB storage versions of the array and the Census."""
    if array == census:
        return []
    return [f"the array has storage version {array}; expected {census}, as the Census has (see docs/publish.md)"]


def publication_faults(stored: str | None, expected: dict[str, Any]) -> list[str]:
    """Compare the stored `CxG_embedding_info` with the expected one."""
    if stored is None:
        return ["CxG_embedding_info is missing: materialize embeddings_array again"]
    try:
        found = json.loads(stored)
    except json.JSONDecodeError as error:
        return [f"CxG_embedding_info is not JSON ({error})"]
    if not isinstance(found, dict):
        return [f"CxG_embedding_info is a {type(found).__name__}; expected an object"]
    return [
        f"{key} is {found.get(key, 'absent')!r}; expected {expected.get(key, 'no such key')!r}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
