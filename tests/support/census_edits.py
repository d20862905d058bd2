"""Changes to a Census that is already written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import tiledbsoma

from tests.support.project import Project


def rewrite(uri: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the whole content of an array or dataframe of the Census."""
    with tiledbsoma.open(str(uri)) as found:
        table = found.read().concat() if isinstance(found, tiledbsoma.DataFrame) else found.read().tables().concat()
    for folder in ("__fragments", "__commits", "__fragment_meta"):
        shutil.rmtree(uri / folder)
        (uri / folder).mkdir()
    with tiledbsoma.open(str(uri), "w") as found:
        found.write(change(table))


def set_counts(project: Project, joinids: list[int], factor: float) -> None:
    """Multiply the first count of some cells in the Census itself."""

    def change(table: pa.Table) -> pa.Table:
        cells, first = np.unique(table["soma_dim_0"].to_numpy(), return_index=True)
        values = table["soma_data"].to_numpy().copy()
        values[first[np.isin(cells, joinids)]] *= factor
        return table.set_column(2, table.schema.field("soma_data"), [values])

    rewrite(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw", change)
