"""Readers that are older than the writing library can read the demo's Census."""

from pathlib import Path

import pandas as pd
import tiledb
import tiledbsoma

from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.synthetic import synthetic_organism
from tests.support.project import RELEASE


def build(folder: Path) -> tuple[Path, pd.DataFrame]:
    """Build a small Census; return its path and its cells."""
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", 90, 60, "ENSG", seed=1, median_genes=20)
    build_census(str(folder / "census"), RELEASE, [organism])
    return folder / "census", organism.cells


def test_enumerations_have_the_names_of_their_columns(tmp_path: Path) -> None:
    """tiledbsoma 1.15.3, with which the Census is built and curated, looks for enumerations by these names."""
    census, cells = build(tmp_path)
    named = 0
    for folder in census.rglob("__schema"):
        schema = tiledb.ArraySchema.load(str(folder.parent))
        attributes = [schema.attr(i) for i in range(schema.nattr)]
        assert [one.enum_label for one in attributes if one.enum_label not in (None, one.name)] == []
        named += sum(one.enum_label is not None for one in attributes)
    assert named > 20
    with tiledbsoma.open(str(census)) as opened:
        obs = opened["census_data"]["homo_sapiens"].obs
        read = obs.read(value_filter="disease == 'COVID-19'").concat().to_pandas()
        assert read.soma_joinid.tolist() == cells.index[cells.disease == "COVID-19"].tolist()
        assert read.cell_type.astype(str).tolist() == cells.cell_type[cells.disease == "COVID-19"].tolist()
        assert obs.domain == ((0, len(cells) - 1),)
        assert opened["census_info"]["summary_cell_counts"].read(value_filter="category == 'disease'").concat()
