"""Writes a Census in the layout of CELLxGENE Census schema 2.4.0, to a local path.

`cellxgene_census.open_soma(uri=...)` opens the result of `build_census`. Making up cells belongs in `synthetic`,
columns and terms in `schema`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from census_tf_dagster.demo import info_tables, schema
from census_tf_dagster.demo.frames import write_frame
from census_tf_dagster.errors import UserError

ROWS_PER_WRITE = 2048
"""Rows per write, one row of tiles. So a write touches no tile twice, and its memory does not grow with the Census."""

_GENES_PER_TILE = 2048

_X_CREATE = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": ROWS_PER_WRITE, "filters": [{"_type": "ZstdFilter", "level": 3}]},
                "soma_dim_1": {
                    "tile": _GENES_PER_TILE,
                    "filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}],
                },
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


@dataclass(frozen=True)
class Organism:
    """The cells of one organism, ready to be written into a Census.

    Parameters
    ----------
    name
        Key below ``census_data``: `label` in lower case with underscores, ``"homo_sapiens"``.
    label
        Scientific name, ``"Homo sapiens"``.
    counts
        Raw counts, cells x genes, float32: whole numbers of 1 or more, no stored zeros.
    genes
        One row per gene in var order: ``feature_id``, ``feature_name``, ``feature_length``, and optionally
        ``feature_type`` (default ``"protein_coding"``).
    cells
        One row per cell, with any of `schema.OBS_COLUMNS`; the others get defaults that the schema accepts.

    Raises
    ------
    UserError
        If the parts do not match, or the counts are not raw counts.
    """

    name: str
    label: str
    counts: sp.csr_matrix
    genes: pd.DataFrame
    cells: pd.DataFrame

    def __post_init__(self) -> None:
        key = schema.experiment_name(self.label)
        if self.name != key:
            raise UserError(
                f"the organism's name is {self.name!r}; expected {key!r} for the label {self.label!r}: use that."
            )
        if self.counts.shape != (len(self.cells), len(self.genes)) or 0 in self.counts.shape:
            raise UserError(
                f"{self.name}: the counts are {self.counts.shape}, but there are {len(self.cells)} rows of cells and "
                f"{len(self.genes)} rows of genes. Give one row per cell and per gene, at least one of each."
            )
        missing = {"feature_id", "feature_name", "feature_length"} - set(self.genes.columns)
        if missing:
            raise UserError(
                f"{self.name}: the genes have the columns {list(self.genes.columns)}; expected also {sorted(missing)}: "
                "add them."
            )
        ids = self.genes["feature_id"]
        if ids.duplicated().any():
            twice = ids[ids.duplicated()].iloc[0]
            raise UserError(
                f"{self.name}: the genes have the feature_id {twice!r} twice; expected each id once. Keep one of them."
            )
        data = self.counts.data
        wrong = data[(data < 1) | (data != np.rint(data))]
        if len(wrong):
            raise UserError(
                f"{self.name}: {len(wrong)} stored counts are not whole numbers of 1 or more, such as {wrong[0]}. "
                "Give raw counts and call eliminate_zeros() on them."
            )


def build_census(uri: str, release: str, organisms: Sequence[Organism]) -> None:
    """Write a Census.

    Parameters
    ----------
    uri
        Local path, which must not exist yet.
    release
        Name of the release. If it is a date, it becomes the ``census_build_date``; otherwise that is 2025-11-08.
    organisms
        The organisms below ``census_data``, at most one of each name.
    """
    obs = {organism.name: schema.complete_cells(organism.cells, organism.name) for organism in organisms}
    labels = [organism.label for organism in organisms]
    datasets = info_tables.datasets(list(obs.values()))
    root: soma.Collection[Any] = soma.Collection.create(uri)
    with root:
        with root.add_new_collection("census_info") as info:
            write_frame(info, "summary", info_tables.summary(release, obs))
            write_frame(info, "datasets", datasets)
            write_frame(
                info,
                "summary_cell_counts",
                info_tables.cell_counts(dict(zip(labels, obs.values(), strict=True))),
            )
            write_frame(info, "organisms", info_tables.organisms(labels))
        with root.add_new_collection("census_data") as data:
            for organism in organisms:
                with data.add_new_collection(organism.name, soma.Experiment) as experiment:
                    _write_experiment(experiment, organism, obs[organism.name], datasets["dataset_id"])


def _write_experiment(experiment: Any, organism: Organism, obs: pd.DataFrame, dataset_ids: "pd.Series[str]") -> None:
    counts, n_genes = organism.counts, organism.counts.shape[1]
    dataset_of = pd.Index(dataset_ids).get_indexer(obs["dataset_id"].astype(str))
    cells_of = sp.csr_matrix(
        (np.ones(len(obs), np.int64), (dataset_of, np.arange(len(obs)))), (len(dataset_ids), len(obs))
    )
    detected = sp.csr_matrix((np.ones(counts.nnz, np.int32), counts.indices, counts.indptr), counts.shape)
    presence = ((cells_of @ detected) > 0).tocoo()

    stats = pd.concat([_obs_statistics(block) for _, block in _blocks(counts)], ignore_index=True)
    stats["n_measured_vars"] = np.bincount(presence.row, minlength=len(dataset_ids))[dataset_of]
    write_frame(experiment, "obs", pd.concat([obs, stats], axis=1))

    rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
    cells_in_dataset = np.bincount(dataset_of, minlength=len(dataset_ids)).astype(np.float64)
    measured = np.bincount(presence.col, weights=cells_in_dataset[presence.row], minlength=n_genes)
    var = organism.genes.reset_index(drop=True)[["feature_id", "feature_name"]].astype(str)
    var["feature_type"] = organism.genes.get("feature_type", pd.Series("protein_coding", var.index)).to_numpy()
    var["feature_length"] = organism.genes["feature_length"].to_numpy(np.int64)
    var["nnz"] = np.bincount(counts.indices, minlength=n_genes)
    var["n_measured_obs"] = measured.astype(np.int64)
    write_frame(rna, "var", var)

    with rna.add_new_sparse_ndarray(
        "feature_dataset_presence_matrix", type=pa.bool_(), shape=(len(dataset_ids), n_genes)
    ) as matrix:
        matrix.write(_coordinates(presence.row, presence.col, presence.data.astype(bool)))
    layers = rna.add_new_collection("X")
    full_gene = obs["assay_ontology_term_id"].isin(schema.FULL_GENE_ASSAYS).to_numpy()
    lengths = var["feature_length"].to_numpy(np.float64)
    for name in ("raw", "normalized"):
        with layers.add_new_sparse_ndarray(
            name, type=pa.float32(), shape=counts.shape, platform_config=_X_CREATE
        ) as layer:
            for start, block in _blocks(counts):
                rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
                values = block.data
                if name == "normalized":
                    long = full_gene[start : start + block.shape[0]][rows]
                    weights = values / np.where(long, lengths[block.indices], 1.0)
                    values = weights / np.bincount(rows, weights, minlength=block.shape[0])[rows]
                # Rows ascend already, so a stable sort by tile gives TileDB's global order. It is five times faster.
                order = np.argsort((block.indices // _GENES_PER_TILE).astype(np.uint16), kind="stable")
                layer.write(
                    _coordinates(rows[order] + start, block.indices[order], values[order].astype(np.float32)),
                    platform_config=soma.TileDBWriteOptions(sort_coords=False),
                )


def _blocks(counts: sp.csr_matrix) -> Iterator[tuple[int, sp.csr_matrix]]:
    for start in range(0, counts.shape[0], ROWS_PER_WRITE):
        yield start, counts[start : start + ROWS_PER_WRITE].sorted_indices()


def _obs_statistics(block: sp.csr_matrix) -> pd.DataFrame:
    n = block.shape[0]
    nnz = np.diff(block.indptr).astype(np.int64)
    rows = np.repeat(np.arange(n), nnz)
    total = np.bincount(rows, block.data, minlength=n)
    mean = total / np.maximum(nnz, 1)
    squares = np.bincount(rows, (block.data - mean[rows]) ** 2, minlength=n)
    variance = squares / np.maximum(nnz - 1, 1)
    return pd.DataFrame({"raw_sum": total, "nnz": nnz, "raw_mean_nnz": mean, "raw_variance_nnz": variance})


def _coordinates(rows: Any, columns: Any, values: Any) -> pa.Table:
    return pa.table(
        {
            "soma_dim_0": np.asarray(rows, np.int64),
            "soma_dim_1": np.asarray(columns, np.int64),
            "soma_data": values,
        }
    )
