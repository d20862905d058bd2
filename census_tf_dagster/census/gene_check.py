"""Checks whether gene ids belong to the counts, with facts from outside the Census's `var`.

Upstream's code and this project read the same `var`. If both agree, the gene axis may still be permuted or belong to
another species. Three facts do not come from that table: the prefix that Ensembl gives an organism's gene ids, the
genes that nearly every cell expresses, and the number of cells that express each column of X.

`housekeeping_genes.tsv` lists 258 subunits of the ribosome, proteasome, chaperonin, respiratory chain, ATP synthase,
translation factor 3 and spliceosome, without their tissue-specific paralogs. Its ids are those of GENCODE 48 and M37
and of Ensembl 114, looked up by symbol, as CELLxGENE's curators use them for dataset schema 7.1 (single-cell-curation,
`gencode_files`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.census.release import Genes
from census_tf_dagster.config.thresholds import LEAST_CORRELATION, LEAST_RANK
from census_tf_dagster.errors import UserError

PREFIXES = {
    "homo_sapiens": "ENSG",
    "mus_musculus": "ENSMUSG",
    "callithrix_jacchus": "ENSCJAG",
    "caenorhabditis_elegans": "WBGene",
    "danio_rerio": "ENSDARG",
    "drosophila_melanogaster": "FBgn",
    "gorilla_gorilla": "ENSGGOG",
    "macaca_fascicularis": "ENSMFAG",
    "macaca_mulatta": "ENSMMUG",
    "microcebus_murinus": "ENSMICG",
    "oryctolagus_cuniculus": "ENSOCUG",
    "pan_troglodytes": "ENSPTRG",
    "rattus_norvegicus": "ENSRNOG",
    "sus_scrofa": "ENSSSCG",
}
"""Prefix of the gene ids of each organism that CELLxGENE accepts."""

LEAST_OF_ORGANISM = 0.5
"""Least share of ids that must have the organism's prefix; in a Census all have it."""

LEAST_LISTED = 5
"""Least number of expressed housekeeping genes; with fewer, the rank says nothing."""

LEAST_CORRELATED = 50
"""Least number of genes expressed in the sample; with fewer, the correlation says nothing."""


@dataclass(frozen=True)
class GeneEvidence:
    """The evidence for the gene ids, from a sample of cells.

    Attributes
    ----------
    listed
        Number of housekeeping genes that the sample expresses.
    rank
        Over all pairs of an expressed housekeeping gene and another expressed gene: the share in which more cells
        express the housekeeping gene. None if the sample expresses fewer than `LEAST_LISTED` of them or no other gene.
    correlation
        Rank correlation, over genes, of the number of expressing cells in `var` with that in the sample. None if `var`
        does not have the number, or if the sample expresses fewer than `LEAST_CORRELATED` genes.
    cells
        Number of cells in the sample.
    """

    listed: int
    rank: float | None
    correlation: float | None
    cells: int

    @property
    def doubts(self) -> list[str]:
        """The reasons to doubt the gene ids; empty if there are none."""
        found = []
        if self.rank is not None and self.rank < LEAST_RANK:
            found.append(
                f"the gene ids do not seem to belong to these counts: {self.listed} housekeeping genes outrank other "
                f"expressed genes in {self.rank:.0%} of pairs by number of cells (50% is chance; {self.cells:,} "
                f"cells). Expected at least {LEAST_RANK:.0%}: compare `var` with its source before you embed anything."
            )
        if self.correlation is not None and self.correlation < LEAST_CORRELATION:
            found.append(
                "the order of `var` does not seem to be that of X: the number of cells that express each gene, in "
                f"`var` and in {self.cells:,} cells of X, has a rank correlation of {self.correlation:.2f}. Expected "
                f"at least {LEAST_CORRELATION}: compare `var` with its source before you embed anything."
            )
        return found

    def __str__(self) -> str:
        if self.doubts:
            return " ".join(self.doubts)
        if self.rank is None:
            return (
                f"Housekeeping genes cannot decide: these cells express {self.listed} of them, and at least "
                f"{LEAST_LISTED} are needed."
            )
        return (
            f"{self.listed} housekeeping genes outrank other expressed genes in {self.rank:.0%} of pairs by number of "
            f"cells (at least {LEAST_RANK:.0%}; {self.cells:,} cells)."
        )


def require_organism(ids: Sequence[str], organism: str) -> None:
    """Raise an error if the gene ids belong to another species.

    Raises
    ------
    UserError
        When fewer than half of the ids have the organism's prefix.
    """
    prefix = PREFIXES.get(organism)
    if prefix is None:
        return
    found = Counter(_prefix(gene) for gene in ids)
    if found[prefix] < LEAST_OF_ORGANISM * len(ids):
        other, often = found.most_common(1)[0]
        owner = next((name for name, known in PREFIXES.items() if known == other), "no organism of CELLxGENE")
        raise UserError(
            f"{organism} has {found[prefix]:,} of {len(ids):,} gene ids with the prefix {prefix}; {often:,} have "
            f"{other or 'none'!r}, which belongs to {owner}. Expected gene ids of {organism}: check the set's "
            "`organism` and the `var` of this Census."
        )


def _prefix(gene: str) -> str:
    # Ensembl's numbers follow the letters; no prefix has a digit.
    return gene.rstrip("0123456789")


def expressing_cells(cells: Cells, n_genes: int) -> npt.NDArray[np.int64]:
    """Return how many of these cells express each gene, int64 ``(n_genes,)``."""
    return np.bincount(cells.columns[cells.values > 0], minlength=n_genes)


def look_at_genes(genes: Genes, organism: str, expressing: npt.NDArray[np.int64], cells: int) -> GeneEvidence:
    """Compare the counts of a sample of cells with the known facts about an organism's genes.

    Parameters
    ----------
    genes, organism
        The gene axis, and the organism that it should belong to.
    expressing
        How many cells of the sample express each gene, int64 ``(n_genes,)``.
    cells
        Number of cells in the sample.
    """
    expressed = expressing > 0
    ranks = _ranks(expressing[expressed])
    listed = np.array([gene in housekeeping_genes(organism) for gene in genes.ids], np.bool_)[expressed]
    n, others = int(listed.sum()), int((~listed).sum())
    rank = correlation = None
    if n >= LEAST_LISTED and others:
        rank = float((ranks[listed].sum() - n * (n + 1) / 2) / (n * others))
    if genes.cells_expressing is not None and len(ranks) >= LEAST_CORRELATED:
        stated = _ranks(genes.cells_expressing[expressed])
        spread = ranks.std() * stated.std()
        # If all ranks are equal, as in a few cells with few genes, there is no correlation.
        correlation = float(np.mean((ranks - ranks.mean()) * (stated - stated.mean())) / spread) if spread else None
    return GeneEvidence(n, rank, correlation, cells)


def _ranks(values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@cache
def housekeeping_genes(organism: str) -> frozenset[str]:
    """Return the ids of genes that nearly every cell of an organism expresses; empty for an organism without a list."""
    head, *rows = (files(__package__) / "housekeeping_genes.tsv").read_text().splitlines()
    names = head.split("\t")
    if organism not in names:
        return frozenset()
    column = names.index(organism)
    return frozenset(row.split("\t")[column] for row in rows) - {""}
