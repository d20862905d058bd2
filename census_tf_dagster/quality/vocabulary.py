"""Computes the share of counts that the model does not see, because it has no token for their gene."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.gene_check import expressing_cells
from census_tf_dagster.census.release import OrganismRelease
from census_tf_dagster.quality.sample import RUN, SEED, Ids

COUNTED_CELLS = 4096
CELLS_AT_ONCE = 512


@dataclass(frozen=True)
class Outside:
    """Counts of cells inside and outside the vocabulary, in the order of their joinids.

    Attributes
    ----------
    rows
        Rows of these cells in the sample, ascending, int64 ``(n,)``.
    counts, outside
        Sum of each cell's counts, and of its counts of genes without a token, float64 ``(n,)``.
    genes, known_genes
        Number of genes that each cell expresses, and of those with a token, int64 ``(n,)``.
    expressing
        Number of these cells that express each gene of `var`, int64 ``(n_genes,)``.
    """

    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float64]
    outside: npt.NDArray[np.float64]
    genes: npt.NDArray[np.int64]
    known_genes: npt.NDArray[np.int64]
    expressing: npt.NDArray[np.int64]

    @property
    def share(self) -> float:
        """Share of all counts that are outside the vocabulary."""
        return float(self.outside.sum() / max(self.counts.sum(), 1))

    def shares_by(self, labels: npt.NDArray[np.str_]) -> list[tuple[str, float, int]]:
        """Return each label of the sample's cells with its share and number of cells; most cells first."""
        mine = labels[self.rows]
        found = []
        for name in np.unique(mine):
            cells = mine == name
            share = float(self.outside[cells].sum() / max(self.counts[cells].sum(), 1))
            found.append((str(name), share, int(cells.sum())))
        return sorted(found, key=lambda bar: (-bar[2], bar[0]))


def count_outside(
    release: OrganismRelease,
    sample: Ids,
    known: npt.NDArray[np.bool_],
    assay_column: str,
    cells: int = COUNTED_CELLS,
) -> Outside:
    """Read and count a part of a sample's cells, in runs of adjacent cells.

    Parameters
    ----------
    release
        The release to read from.
    sample
        Ascending joinids, int64.
    known
        Whether the model has a token for each gene of `var`, bool ``(n_genes,)``.
    assay_column
        See `read_cells`.
    cells
        Most cells to read.
    """
    rows = np.arange(len(sample))
    if len(sample) > cells:
        runs = np.sort(np.random.default_rng(SEED).choice(-(-len(sample) // RUN), size=cells // RUN, replace=False))
        rows = (runs[:, None] * RUN + np.arange(RUN)).reshape(-1)
        rows = rows[rows < len(sample)]
    expressing = np.zeros(len(known), np.int64)
    parts = list(_count(release, sample[rows], known, assay_column, expressing))
    counts, outside, genes, known_genes = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Outside(rows, counts, outside, genes, known_genes, expressing)


def _count(
    release: OrganismRelease,
    joinids: Ids,
    known: npt.NDArray[np.bool_],
    assay_column: str,
    expressing: npt.NDArray[np.int64],
) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    for start in range(0, len(joinids), CELLS_AT_ONCE):
        cells = read_cells(release, joinids[start : start + CELLS_AT_ONCE], assay_column)
        cell_of_count = np.repeat(np.arange(len(cells.joinids)), np.diff(cells.indptr))
        seen = known[cells.columns]
        expressed = cells.values > 0
        expressing += expressing_cells(cells, len(known))
        n = len(cells.joinids)
        yield (
            np.bincount(cell_of_count, cells.values, minlength=n),
            np.bincount(cell_of_count[~seen], cells.values[~seen], minlength=n),
            np.bincount(cell_of_count[expressed], minlength=n),
            np.bincount(cell_of_count[seen & expressed], minlength=n),
        )
