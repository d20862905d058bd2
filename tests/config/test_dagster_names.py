"""Titles of metadata are for people; programs find their keys again."""

import re
from pathlib import Path

import pytest

import census_tf_dagster
from census_tf_dagster.config.dagster_names import key_of, title_of


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("cells_per_second", "Cells per second"),
        ("usd", "USD"),
        ("cost_usd", "Cost USD"),
        ("gpu_peak_gib", "GPU peak GiB"),
        ("umap_cell_type", "UMAP cell type"),
        ("storage_version_census", "Storage version Census"),
    ],
)
def test_titles(key: str, title: str) -> None:
    assert title_of(key) == title
    assert key_of(title) == key


def test_every_key_is_found_again() -> None:
    """Every text of the package that could be a key, so that no new one is forgotten."""
    package = Path(census_tf_dagster.__file__).parent
    found = {key for path in package.rglob("*.py") for key in re.findall(r'"([a-z][a-z0-9_]*)"', path.read_text())}
    assert {key for key in found if key_of(title_of(key)) != key} == set()
