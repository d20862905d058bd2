"""Defines columns, types and terms of the CELLxGENE Census schema 2.4.0, as far as a demo Census needs them.

Source: docs/cellxgene_census_schema.md and the builder's table specifications in the repository
chanzuckerberg/cellxgene-census.
"""

import re
import uuid
from base64 import b85encode
from hashlib import blake2b
from typing import Any

import pandas as pd

from census_tf_dagster.errors import UserError

CENSUS_SCHEMA_VERSION = "2.4.0"
DATASET_SCHEMA_VERSION = "7.0.0"

# Label columns that have a `<label>_ontology_term_id` column, with the label of a cell without one.
TERM_DEFAULTS = {
    "assay": "10x 3' v3",
    "cell_type": "unknown",
    "development_stage": "unknown",
    "disease": "normal",
    "self_reported_ethnicity": "unknown",
    "sex": "unknown",
    "tissue": "blood",
    "tissue_general": "blood",
}
PLAIN_DEFAULTS = {"donor_id": "unknown", "suspension_type": "cell", "tissue_type": "tissue"}

CATEGORICAL_COLUMNS = (
    *("dataset_id", "dataset_version_id"),
    *(column for label in TERM_DEFAULTS for column in (label, f"{label}_ontology_term_id")),
    *PLAIN_DEFAULTS,
)
OBS_COLUMNS = (*CATEGORICAL_COLUMNS, "is_primary_data", "observation_joinid")
"""Columns that a caller may set. `soma_joinid` and the statistics of the counts are computed."""

SUMMARY_CATEGORIES = (
    *("assay", "cell_type", "disease", "self_reported_ethnicity", "sex", "suspension_type", "tissue"),
    "tissue_general",
)

TERM_IDS = {
    # assay
    "10x 3' v2": "EFO:0009899",
    "10x 3' v3": "EFO:0009922",
    "MERFISH": "EFO:0008992",
    "Smart-seq2": "EFO:0008931",
    # cell_type
    "B cell": "CL:0000236",
    "T cell": "CL:0000084",
    "astrocyte": "CL:0000127",
    "endothelial cell": "CL:0000115",
    "fibroblast": "CL:0000057",
    "macrophage": "CL:0000235",
    "neuron": "CL:0000540",
    "oligodendrocyte": "CL:0000128",
    # disease, sex
    "COVID-19": "MONDO:0100096",
    "normal": "PATO:0000461",
    "female": "PATO:0000383",
    "male": "PATO:0000384",
    # tissue
    "blood": "UBERON:0000178",
    "brain": "UBERON:0000955",
    "kidney": "UBERON:0002113",
    "liver": "UBERON:0002107",
    "lung": "UBERON:0002048",
    # organism
    "Callithrix jacchus": "NCBITaxon:9483",
    "Homo sapiens": "NCBITaxon:9606",
    "Macaca mulatta": "NCBITaxon:9544",
    "Mus musculus": "NCBITaxon:10090",
    "Pan troglodytes": "NCBITaxon:9598",
    # in any column
    "na": "na",
}

FULL_GENE_ASSAYS = frozenset({"EFO:0008931"})
"""Assays of `TERM_IDS` for which the schema divides normalized counts by the gene's length."""


def term_id(label: str) -> str:
    """Return the ontology term of a label, or ``"unknown"``."""
    return TERM_IDS.get(label, "unknown")


def experiment_name(label: str) -> str:
    """Return the key of an organism label below ``census_data``, by the schema's rule."""
    return re.sub(" +", "_", label).lower()


def stable_uuid(*parts: str) -> str:
    """Return the same UUID for the same parts, on every machine."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(parts)))


def complete_cells(cells: pd.DataFrame, organism: str) -> pd.DataFrame:
    """Add the missing obs columns, with values that the schema accepts.

    Parameters
    ----------
    cells
        Any of `OBS_COLUMNS`, one row per cell.
    organism
        Name of the experiment, from which the default dataset and the observation_joinids follow.

    Returns
    -------
    pandas.DataFrame
        All of `OBS_COLUMNS` in that order, text columns as categories, index 0 to n - 1.

    Raises
    ------
    UserError
        If a column is not in the schema, or an ontology id has no label.
    """
    unknown = sorted(set(cells.columns) - set(OBS_COLUMNS))
    if unknown:
        raise UserError(
            f"the cells of {organism} have the columns {unknown}; expected only the schema's: {OBS_COLUMNS}. Remove "
            "the others."
        )
    frame = cells.reset_index(drop=True)

    def fill(name: str, values: Any) -> None:
        if name not in frame.columns:
            frame[name] = values

    fill("dataset_id", stable_uuid(organism))
    fill("dataset_version_id", frame["dataset_id"].astype(str).map(lambda each: stable_uuid(each, "version")))
    for label, default in TERM_DEFAULTS.items():
        identifier = f"{label}_ontology_term_id"
        if identifier in frame.columns and label not in frame.columns:
            raise UserError(
                f"the cells of {organism} have {identifier!r} but no {label!r}; expected both: add the labels."
            )
        fill(label, frame["tissue"] if label == "tissue_general" else default)
        fill(identifier, frame[label].astype(str).map(term_id))
    for name, default in PLAIN_DEFAULTS.items():
        fill(name, default)
    fill("is_primary_data", True)
    fill("observation_joinid", _observation_joinids(organism, len(frame)))

    for name in CATEGORICAL_COLUMNS:
        frame[name] = frame[name].astype(str).astype("category")
    frame["is_primary_data"] = frame["is_primary_data"].astype(bool)
    frame["observation_joinid"] = frame["observation_joinid"].astype(str)
    return frame[list(OBS_COLUMNS)]


def _observation_joinids(organism: str, n: int) -> list[str]:
    # CELLxGENE's observation_joinids also have ten base-85 characters.
    return [b85encode(blake2b(f"{organism}/{i}".encode(), digest_size=8).digest()).decode() for i in range(n)]
