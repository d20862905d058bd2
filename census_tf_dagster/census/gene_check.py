"""Whether gene ids belong to the counts beside them, judged by what is known outside the Census.

Upstream's code and ours read the same `var`, so their agreement says nothing about a gene axis that is permuted or that
belongs to another species. Three facts do not come from that table: which prefix Ensembl gives an organism's gene ids,
which genes nearly every cell expresses, and how many cells express each column of X.

`housekeeping_genes.tsv` lists 258 subunits of the ribosome, proteasome, chaperonin, respiratory chain, ATP synthase,
translation factor 3 and spliceosome, without their tissue-specific paralogs. Ids are those of GENCODE 48 and M37 and
Ensembl 114, by symbol, as CELLxGENE's curators use them for dataset schema 7.1 (single-cell-curation,
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
"""Share of ids that must have the organism's prefix; in a Census all have it."""

LEAST_LISTED = 5
"""Expressed housekeeping genes; with fewer, nothing can be said."""

LEAST_CORRELATED = 50
"""Genes expressed in the sample; with fewer, a correlation says nothing."""


@dataclass(frozen=True)
class GeneEvidence:
    """What speaks for the gene ids.

    Attributes
    ----------
    listed
        Housekeeping genes that the looked-at cells express.
    rank
        Share of pairs of such a gene and another expressed one in which it is expressed by more cells; None where
        fewer than `LEAST_LISTED` are expressed, or no other.
    correlation
        Of `var`'s number of expressing cells with the sample's; None where `var` does not have it, or fewer than
        `LEAST_CORRELATED` genes are expressed.
    cells
        Cells looked at.
    """

    listed: int
    rank: float | None
    correlation: float | None
    cells: int

    @property
    def doubts(self) -> list[str]:
        """Say what speaks against the gene ids; nothing when nothing does."""
        found = []
        if self.rank is not None and self.rank < LEAST_RANK:
            found.append(
                f"gene ids hardly belong to these counts: {self.listed} housekeeping genes outrank other expressed "
                f"genes in {self.rank:.0%} of pairs by number of cells (50% is chance; at least {LEAST_RANK:.0%} is "
                f"expected; {self.cells:,} cells). Compare `var` with the source before anything is embedded."
            )
        if self.correlation is not None and self.correlation < LEAST_CORRELATION:
            found.append(
                "the order of `var` hardly belongs to X: the number of cells that express each gene, by `var` and by "
                f"{self.cells:,} cells of X, has a rank correlation of {self.correlation:.2f} (at least "
                f"{LEAST_CORRELATION} is expected). Compare `var` with the source before anything is embedded."
            )
        return found

    def __str__(self) -> str:
        if self.doubts:
            return " ".join(self.doubts)
        if self.rank is None:
            return (
                f"Cannot be judged by housekeeping genes: these cells express {self.listed} of them "
                f"(at least {LEAST_LISTED})."
            )
        return (
            f"{self.listed} housekeeping genes outrank other expressed genes in {self.rank:.0%} of pairs by number of "
            f"cells (at least {LEAST_RANK:.0%}; {self.cells:,} cells)."
        )


def require_organism(ids: Sequence[str], organism: str) -> None:
    """Refuse gene ids of another species.

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
        whose = next((name for name, one in PREFIXES.items() if one == other), "no organism of CELLxGENE")
        raise UserError(
            f"{organism} has {found[prefix]:,} of {len(ids):,} gene ids with the prefix {prefix}; {often:,} have "
            f"{other or 'none'!r}, which belongs to {whose}. Expected ids of {organism}: this gene axis is not its own."
        )


def _prefix(gene: str) -> str:
    # Ensembl's numbers follow the letters; no prefix has a digit.
    return gene.rstrip("0123456789")


def expressing_cells(cells: Cells, n_genes: int) -> npt.NDArray[np.int64]:
    """Return how many of some cells express each gene, int64 ``(n_genes,)``."""
    return np.bincount(cells.columns[cells.values > 0], minlength=n_genes)


def look_at_genes(genes: Genes, organism: str, expressing: npt.NDArray[np.int64], cells: int) -> GeneEvidence:
    """Compare the counts of some cells with what is known of an organism's genes.

    Parameters
    ----------
    genes, organism
        The gene axis, and whose it should be.
    expressing
        How many of the cells express each gene, ``(n_genes,)``.
    cells
        How many cells they are.
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
        # All alike, as in a few cells of few genes, correlates with nothing.
        correlation = float(np.mean((ranks - ranks.mean()) * (stated - stated.mean())) / spread) if spread else None
    return GeneEvidence(n, rank, correlation, cells)


def _ranks(values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@cache
def housekeeping_genes(organism: str) -> frozenset[str]:
    """Return the ids of genes that nearly every cell of an organism expresses; none where they are not listed."""
    head, *rows = (files(__package__) / "housekeeping_genes.tsv").read_text().splitlines()
    names = head.split("\t")
    if organism not in names:
        return frozenset()
    column = names.index(organism)
    return frozenset(row.split("\t")[column] for row in rows) - {""}
