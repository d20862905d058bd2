"""Makes the tables below ``census_info``, which describe a Census. Writing them belongs in `census`."""

import datetime
from collections.abc import Mapping, Sequence

import pandas as pd

from census_tf_dagster.demo import schema

_FALLBACK_BUILD_DATE = "2025-11-08"


def summary(release: str, obs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the table ``summary``: versions, build date, numbers of cells and donors."""
    try:
        build_date = datetime.date.fromisoformat(release).isoformat()
    except ValueError:
        build_date = _FALLBACK_BUILD_DATE
    rows = {
        "census_schema_version": schema.CENSUS_SCHEMA_VERSION,
        "census_build_date": build_date,
        "dataset_schema_version": schema.DATASET_SCHEMA_VERSION,
        "total_cell_count": str(sum(len(cells) for cells in obs.values())),
        "unique_cell_count": str(sum(int(cells["is_primary_data"].sum()) for cells in obs.values())),
    }
    for name, cells in obs.items():
        # By the schema, a donor counts once per dataset.
        rows[f"number_donors_{name}"] = str(len(cells[["dataset_id", "donor_id"]].drop_duplicates()))
    return pd.DataFrame(rows.items(), columns=["label", "value"])


def datasets(obs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the table ``datasets``: one row per dataset of any organism, in order of first occurrence."""
    found = pd.concat([cells[["dataset_id", "dataset_version_id"]].astype(str) for cells in obs])
    groups = found.groupby("dataset_id", sort=False)["dataset_version_id"].agg(["first", "size"]).reset_index()
    return pd.DataFrame(
        {
            "citation": "Demo data; no publication.",
            "collection_id": schema.stable_uuid("demo collection"),
            "collection_name": "Demo",
            "collection_doi": "",
            "collection_doi_label": "",
            "dataset_id": groups["dataset_id"],
            "dataset_version_id": groups["first"],
            "dataset_title": [f"Demo dataset {i}" for i in range(len(groups))],
            "dataset_h5ad_path": groups["dataset_id"] + ".h5ad",
            "dataset_total_cell_count": groups["size"],
        }
    )


def cell_counts(obs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the table ``summary_cell_counts``: numbers of cells by organism label, category and value."""
    parts = []
    for organism, cells in obs.items():
        primary = cells["is_primary_data"]
        parts.append(_part(organism, "all", "na", "na", primary))
        for category in schema.SUMMARY_CATEGORIES:
            ids = cells.get(f"{category}_ontology_term_id", pd.Series("na", cells.index))
            parts.append(_part(organism, category, cells[category].astype(str), ids.astype(str), primary))
    keys = ["organism", "category", "label", "ontology_term_id"]
    groups = pd.concat(parts).groupby(keys, sort=False)["primary"]
    table = groups.agg(total_cell_count="size", unique_cell_count="sum").reset_index()
    return table.astype({"organism": "category", "category": "category"})


def _part(
    organism: str, category: str, label: "str | pd.Series", identifier: "str | pd.Series", primary: pd.Series
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "organism": organism,
            "category": category,
            "label": label,
            "ontology_term_id": identifier,
            "primary": primary,
        }
    )


def organisms(labels: Sequence[str]) -> pd.DataFrame:
    """Return the table ``organisms``: one row per organism."""
    return pd.DataFrame(
        {
            "organism_ontology_term_id": [schema.term_id(label) for label in labels],
            "organism_label": list(labels),
            "organism": [schema.experiment_name(label) for label in labels],
        }
    )
