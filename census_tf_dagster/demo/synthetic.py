"""Makes the cells of a demo Census: random ones, or those of an h5ad file. Writing them belongs in `census`."""

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from census_tf_dagster.census.gene_check import housekeeping_genes
from census_tf_dagster.demo import schema
from census_tf_dagster.demo.census import Organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.own_cells.genes import COLUMNS

KNOWN_ASSAYS = ("10x 3' v3", "10x 3' v2", "Smart-seq2")
UNLISTED_ASSAY = "assay of no vocabulary"
"""Assay of one synthetic cell in twenty. The model treats it as ``unknown``."""

CELL_TYPES = ("T cell", "B cell", "macrophage", "fibroblast", "endothelial cell", "neuron")
TISSUES = ("blood", "lung", "liver", "kidney", "brain")
N_DATASETS = 3

_GENE_ID = re.compile(r"(ENS[A-Z]*G\d{6,}|WBGene\d+|FBgn\d+)(\.\d+)?")
_CELLS_PER_DRAW = 1024


def synthetic_organism(
    name: str, label: str, n_cells: int, n_genes: int, gene_prefix: str, seed: int, median_genes: int = 1800
) -> Organism:
    """Make a random organism. Reads fall on genes with Zipf-like odds, which depend on the cell type.

    The number of expressed genes of a cell is log-normal around `median_genes`, at most nine tenths of `n_genes`. The
    cell gets the number of reads that gives this number on average.

    Parameters
    ----------
    name, label
        See `Organism`.
    n_cells, n_genes
        Shape of the counts.
    gene_prefix
        Prefix of the gene ids, such as ``"ENSG"`` for human: ``ENSG00000000000`` and so on, in var order.
    seed
        Equal arguments give equal organisms.
    median_genes
        Median number of expressed genes of a cell.
    """
    rng = np.random.default_rng(seed)
    cell_type = rng.integers(len(CELL_TYPES), size=n_cells)
    wanted = np.minimum(median_genes * rng.lognormal(0.0, 0.45, n_cells), 0.9 * n_genes)
    identifiers = [f"{gene_prefix}{i:011d}" for i in range(n_genes)]
    popularity = rng.permutation(1.0 / (np.arange(n_genes) + 8.0))
    # Some of these ids are real genes. Housekeeping genes among them are expressed as the check of gene ids expects.
    needed = np.isin(identifiers, sorted(housekeeping_genes(name)))
    popularity[needed] = np.quantile(popularity, 0.98)
    blocks, order = [], []
    for kind in range(len(CELL_TYPES)):
        odds = popularity * rng.lognormal(0.0, 1.0, n_genes)
        odds /= odds.sum()
        members = np.flatnonzero(cell_type == kind)
        for start in range(0, len(members), _CELLS_PER_DRAW):
            part = members[start : start + _CELLS_PER_DRAW]
            blocks.append(_draw(rng, odds, _reads_for(wanted[part], odds)))
            order.append(part)
    counts = sp.vstack(blocks, format="csr")[np.argsort(np.concatenate(order))]

    genes = pd.DataFrame(
        {
            "feature_id": identifiers,
            "feature_name": [f"{gene_prefix[-4:]}-{i}" for i in range(n_genes)],
            "feature_length": rng.lognormal(7.8, 0.8, n_genes).astype(np.int64) + 100,
            "feature_type": np.where(rng.random(n_genes) < 0.3, "lncRNA", "protein_coding"),
        }
    )
    dataset = np.arange(n_cells) * N_DATASETS // n_cells
    cells = pd.DataFrame(
        {
            "dataset_id": [schema.stable_uuid(name, f"dataset {i}") for i in dataset],
            "assay": _shares(rng, n_cells, dict(zip((*KNOWN_ASSAYS, UNLISTED_ASSAY), (10, 6, 3, 1), strict=True))),
            "cell_type": np.array(CELL_TYPES)[cell_type],
            "disease": _shares(rng, n_cells, {"normal": 4, "COVID-19": 1}),
            "donor_id": [f"donor {i}-{j}" for i, j in zip(dataset, rng.integers(4, size=n_cells), strict=True)],
            "is_primary_data": _shares(rng, n_cells, {True: 9, False: 1}),
            "sex": _shares(rng, n_cells, {"female": 1, "male": 1}),
            "suspension_type": _shares(rng, n_cells, {"cell": 3, "nucleus": 1}),
            "tissue": _shares(rng, n_cells, dict.fromkeys(TISSUES, 1)),
        }
    )
    return Organism(name, label, counts, genes, cells)


def organism_from_h5ad(path: Path | str, name: str, label: str) -> Organism:
    """Read an organism from an AnnData file with raw counts.

    Parameters
    ----------
    path
        The file. Counts are ``raw.X`` if the file has it, otherwise ``X``. Gene ids come from the first of the columns
        of var in which `embed` looks for them, and its index, that has Ensembl-like ids. Version suffixes are removed.
        Obs columns of the Census schema are kept.
    name, label
        See `Organism`.

    Raises
    ------
    UserError
        If no column has gene ids, or the counts are not raw.
    """
    adata = anndata.read_h5ad(path)
    source = adata if adata.raw is None else adata.raw
    counts = sp.csr_matrix(source.X)
    wrong = counts.data[(counts.data < 0) | (counts.data != np.rint(counts.data))]
    if len(wrong):
        raise UserError(
            f"{path}: {'X' if adata.raw is None else 'raw.X'} holds {len(wrong)} values that are not counts, such as "
            f"{wrong[0]}. Expected whole numbers of 0 or more: give a file with raw counts in raw.X or X."
        )
    counts = counts.astype(np.float32)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    var = source.var
    ids = _gene_ids(path, var)
    genes = pd.DataFrame(
        {
            "feature_id": ids,
            "feature_name": var["feature_name"].astype(str).to_numpy() if "feature_name" in var else ids,
            "feature_length": var["feature_length"].to_numpy(np.int64) if "feature_length" in var else 1000,
        }
    )
    if "feature_type" in var:
        genes["feature_type"] = var["feature_type"].astype(str).to_numpy()
    kept = [column for column in schema.OBS_COLUMNS if column in adata.obs]
    return Organism(name, label, counts, genes, adata.obs[kept].reset_index(drop=True))


def _gene_ids(path: Path | str, var: pd.DataFrame) -> npt.NDArray[np.object_]:
    candidates = {column: var[column] for column in COLUMNS if column in var}
    candidates["the index"] = var.index.to_series()
    found = []
    for where, values in candidates.items():
        ids: npt.NDArray[np.object_] = values.astype(str).to_numpy(object)
        if sum(_GENE_ID.fullmatch(each) is not None for each in ids) > len(ids) / 2:
            return np.array([each.split(".")[0] for each in ids], object)
        found.append(f"{where} starts {list(ids[:3])}")
    raise UserError(
        f"{path}: var has no Ensembl-like gene ids: {'; '.join(found)}; its columns are {list(var.columns)}. "
        "Expected ids such as ENSG00000141510: put them into var['feature_id']."
    )


def _reads_for(n_expressed: npt.NDArray[np.float64], odds: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    # The expected number of genes hit by n reads has no inverse in closed form, so it is tabulated and interpolated.
    reads = np.geomspace(1.0, 1000.0 * len(odds), 64)
    hit = np.array([-np.expm1(-n * odds).sum() for n in reads])
    return np.maximum(np.interp(n_expressed, hit, reads), 1.0).astype(np.int64)


def _draw(rng: np.random.Generator, odds: npt.NDArray[np.float64], reads: npt.NDArray[np.int64]) -> sp.csr_matrix:
    cells = np.repeat(np.arange(len(reads)), reads)
    genes = np.searchsorted(np.cumsum(odds)[:-1], rng.random(len(cells)))
    hits = sp.coo_matrix((np.ones(len(cells), np.float32), (cells, genes)), (len(reads), len(odds)))
    return hits.tocsr()  # sums the reads of a gene


def _shares(rng: np.random.Generator, n: int, weights: dict[Any, int]) -> npt.NDArray[Any]:
    # Shares are exact, so that twenty cells already have every value.
    values = np.repeat(list(weights), list(weights.values()))
    return rng.permutation(np.resize(values, n))
