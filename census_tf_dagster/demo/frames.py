"""Writes a SOMA dataframe that tiledbsoma 1.15.3 can filter, too: the Census is built and curated with that version.

tiledbsoma 2.3.0 gives the enumeration of the column `disease` the name `disease_U`. Version 1.15.3 looks for an
enumeration with the name of the column, and refuses every filter if there is none. Newer versions follow the column's
own reference.
"""

import shutil
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledb
import tiledbsoma as soma


def write_frame(parent: Any, name: str, frame: pd.DataFrame) -> None:
    """Write a dataframe below an open collection.

    Parameters
    ----------
    parent
        A collection on a local path, open for writing.
    name
        Key of the dataframe in the collection.
    frame
        The rows; joinids are their positions. Categorical text columns become dictionary-encoded columns.
    """
    frame = frame.assign(soma_joinid=np.arange(len(frame)))
    frame = frame[["soma_joinid", *frame.columns.drop("soma_joinid")]]
    table = pa.Table.from_pandas(frame, preserve_index=False)
    domain = [(0, len(frame) - 1)]
    # tiledbsoma 2.3.0 loses enumeration values that are written through the handle that creates the dataframe.
    with parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=domain
    ) as created:
        uri = created.uri
    _name_enumerations_as_columns(uri.removeprefix("file://"))
    with soma.DataFrame.open(uri, "w") as opened:
        opened.write(table)


def _name_enumerations_as_columns(path: str) -> None:
    """Replace an empty array by one with the same schema and metadata, whose enumerations have their columns' names."""
    schema = tiledb.ArraySchema.load(path)
    attributes = [schema.attr(i) for i in range(schema.nattr)]
    encoded = [attribute.name for attribute in attributes if attribute.enum_label is not None]
    if not encoded:
        return
    with tiledb.open(path) as array:
        metadata = dict(array.meta.items())
    renamed = tiledb.ArraySchema(
        domain=schema.domain,
        attrs=[
            tiledb.Attr(
                name=attribute.name,
                dtype="U" if attribute.isvar else attribute.dtype,
                var=attribute.isvar,
                nullable=attribute.isnullable,
                filters=attribute.filters,
                enum_label=attribute.name if attribute.name in encoded else None,
            )
            for attribute in attributes
        ],
        enums=[tiledb.Enumeration(column, False, dtype="U") for column in encoded],
        cell_order=schema.cell_order,
        tile_order=schema.tile_order,
        capacity=schema.capacity,
        sparse=True,
    )
    renamed.set_current_domain(schema.current_domain)
    shutil.rmtree(path)
    tiledb.Array.create(path, renamed)
    with tiledb.open(path, "w") as array:
        for key, value in metadata.items():
            array.meta[key] = value
