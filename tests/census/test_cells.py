"""Counts as CSR equal the Census's, whether or not obs.nnz includes stored zeros."""

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma

from census_tf_dagster.census.cells import read_cells
from tests.support.builders import N_GENES, tiny
from tests.support.project import Project


@pytest.mark.parametrize("joinids", [range(3, 30), [1, 5, 9, 120]], ids=["contiguous", "scattered"])
def test_cells_are_what_the_census_holds(project: Project, joinids: list[int]) -> None:
    tiny(project)
    wanted = np.array(joinids, np.int64)
    uri = str(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw")
    with tiledbsoma.open(uri) as array:
        genes = array.read(coords=(slice(5, 5),)).tables().concat()["soma_dim_1"].to_numpy()
    unexpressed = np.setdiff1d(np.arange(N_GENES), genes)[:3]
    zeros = pa.table({"soma_dim_0": np.full(3, 5), "soma_dim_1": unexpressed, "soma_data": np.zeros(3, np.float32)})
    with tiledbsoma.open(uri, "w") as array:
        array.write(zeros)
    with project.context("tiny") as context:
        cells = read_cells(context.release, wanted)
    with tiledbsoma.open(uri) as array:
        table = array.read().tables().concat().to_pandas()
    for position, joinid in enumerate(wanted):
        expected = table[table.soma_dim_0 == joinid].sort_values("soma_dim_1")
        part = slice(cells.indptr[position], cells.indptr[position + 1])
        assert cells.columns[part].tolist() == expected.soma_dim_1.tolist()
        assert cells.values[part].tolist() == expected.soma_data.tolist()
    assert (np.diff(cells.indptr)[wanted == 5] == len(genes) + 3).all()
