"""The share of counts that the model does not see, because it has no token for their gene."""

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
    """Counts of some cells, in the order of their joinids.

    Attributes
    ----------
    rows
        Which rows of the sample they are, ascending.
    counts, outside
        All counts of each cell, and those of genes without a token, float64 ``(n,)``.
    genes, known_genes
        Genes that each cell expresses, and those of them with a token, int64 ``(n,)``.
    expressing
        How many of these cells express each gene of `var`, int64 ``(n_genes,)``.
    """

    rows: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float64]
    outside: npt.NDArray[np.float64]
    genes: npt.NDArray[np.int64]
    known_genes: npt.NDArray[np.int64]
    expressing: npt.NDArray[np.int64]

    @property
    def share(self) -> float:
        """Of all counts of all these cells, those outside."""
        return float(self.outside.sum() / max(self.counts.sum(), 1))

    def shares_by(self, labels: npt.NDArray[np.str_]) -> list[tuple[str, float, int]]:
        """Return, for each label of the sample's cells, its share and number of cells; most cells first."""
        mine = labels[self.rows]
        found = []
        for name in np.unique(mine):
            of = mine == name
            found.append((str(name), float(self.outside[of].sum() / max(self.counts[of].sum(), 1)), int(of.sum())))
        return sorted(found, key=lambda one: (-one[2], one[0]))


def count_outside(
    release: OrganismRelease,
    sample: Ids,
    known: npt.NDArray[np.bool_],
    assay_column: str,
    cells: int = COUNTED_CELLS,
) -> Outside:
    """Read the counts of some of a sample's cells, in runs of neighbours.

    Parameters
    ----------
    release
        Where.
    sample
        Ascending joinids.
    known
        Whether the model has a token for each gene of `var`.
    assay_column
        As `read_cells` takes it.
    cells
        How many cells at most.
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
        of = np.repeat(np.arange(len(cells.joinids)), np.diff(cells.indptr))
        seen = known[cells.columns]
        expressed = cells.values > 0
        expressing += expressing_cells(cells, len(known))
        n = len(cells.joinids)
        yield (
            np.bincount(of, cells.values, minlength=n),
            np.bincount(of[~seen], cells.values[~seen], minlength=n),
            np.bincount(of[expressed], minlength=n),
            np.bincount(of[seen & expressed], minlength=n),
        )
