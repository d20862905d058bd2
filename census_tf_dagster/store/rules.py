"""The rules that a finished array keeps: those of the Census's tool for contributed embeddings, and ours.

Theirs (`tools/census_contrib/src/census_contrib/validate.py` in the cellxgene-census repository): a 2-D sparse array of
float32 with int64 coordinates, as many rows as the experiment's obs domain, at least one cell, only joinids of obs,
features in range, no coordinate twice, counts as the metadata says, the Census's own storage version. Ours: exactly the
planned cells less those that were set aside, each with all its values, all finite, none all zero, all as they were
written; and a list for consumers that says so.
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
    """Whether a rule is kept.

    Attributes
    ----------
    rule
        Its name.
    wrong
        What is wrong, a sentence each; none: the rule is kept.
    """

    rule: Rule
    wrong: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule}: {'; '.join(self.wrong) or 'kept'}"


def column_faults(uri: str, storage: Storage) -> list[str]:
    """Say in what the array's dimensions and types differ from an embedding's. Reads metadata only."""
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
    """Say when the array lets a coordinate be there twice. Reads metadata only."""
    if not tiledb.ArraySchema.load(uri, ctx=storage.tiledb_ctx).allows_duplicates:
        return []
    return ["it allows duplicates: a cell that is written again is there twice"]


def shape_faults(found: tuple[int, ...], expected: tuple[int, int]) -> list[str]:
    """Compare the array's shape with the Census's obs domain and the model's embedding."""
    return [] if found == expected else [f"the shape is {found}; expected {expected}"]


def storage_version_faults(array: int, census: int) -> list[str]:
    """Compare TileDB storage versions of the array and the Census."""
    if array == census:
        return []
    return [f"the array has storage version {array}, the Census {census} (docs/publish.md says what can be done)"]


def publication_faults(stored: str | None, expected: dict[str, Any]) -> list[str]:
    """Compare the stored `CxG_embedding_info` with what set, release and array say."""
    if stored is None:
        return ["CxG_embedding_info is missing: materialize embeddings_array again"]
    try:
        found = json.loads(stored)
    except json.JSONDecodeError as error:
        return [f"CxG_embedding_info is no JSON ({error})"]
    if not isinstance(found, dict):
        return [f"CxG_embedding_info is a {type(found).__name__}; expected an object"]
    return [
        f"{key} is {found.get(key, 'absent')!r}; expected {expected.get(key, 'no such key')!r}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
