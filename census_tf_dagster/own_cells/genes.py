"""Finds the gene ids of a matrix, and the order in which the model sees them."""

from collections import Counter
from typing import Literal, get_args

import pandas as pd

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.own_cells.source import Matrix

COLUMNS = ("ensembl_id", "feature_id", "gene_ids", "gene_id")
"""Columns of var in which gene ids are looked for: upstream's, the Census's, and those of readers of 10x files."""
INDEX = "index"
NO_GENE = ""
"""The id of a column that is not used; no vocabulary has it."""

Duplicates = Literal["refuse", "first"]


def find_genes(
    matrix: Matrix, where: str, checkpoint: Checkpoint, column: str | None, duplicates: Duplicates
) -> tuple[str, tuple[str, ...]]:
    """Find the gene ids of a matrix.

    Parameters
    ----------
    matrix, where
        The matrix, and the name of its source.
    checkpoint
        The checkpoint that has to know them.
    column
        The column of var; ``index``: the index; None: the one of `COLUMNS` or the index of which the checkpoint knows
        most.
    duplicates
        What to do with a gene that the checkpoint knows and that occurs again: ``refuse``, as upstream does, or
        ``first``: use the first column and leave the others out.

    Returns
    -------
    str, tuple of str
        Name of the column, and the ids without version suffix, one for each column of the matrix.

    Raises
    ------
    UserError
        When there is no such column, the checkpoint knows none of the ids, or an id occurs twice.
    """
    var = matrix.var
    if duplicates not in get_args(Duplicates):
        raise UserError(f"duplicate_genes is {duplicates!r}; expected {' or '.join(get_args(Duplicates))}.")
    if not len(var):
        raise UserError(f"{matrix.name} of {where} has no genes; expected at least one.")
    if column not in (None, INDEX, *var.columns):
        raise UserError(
            f"var of {where} has no column {column!r}; expected one of: {', '.join(map(str, var.columns))}, or "
            f"`{INDEX}`. Correct `gene_column`."
        )
    candidates = [column] if column else [*(name for name in COLUMNS if name in var), INDEX]
    ids = {name: _ids(var, name) for name in candidates}
    known = {name: sum(map(checkpoint.knows, found)) for name, found in ids.items()}
    chosen = max(candidates, key=known.__getitem__)
    if not known[chosen]:
        examples = ", ".join(repr(str(gene)) for gene in _column(var, chosen)[:3])
        raise UserError(
            f"the checkpoint {checkpoint.folder} knows none of the {len(var):,} genes of {matrix.name} of {where} "
            f"(looked for in var's {', '.join(candidates)}; for example {examples}). {_hint(ids[chosen], checkpoint)}"
        )
    genes = ids[chosen]
    twice = sorted(gene for gene, often in Counter(genes).items() if often > 1 and checkpoint.knows(gene))
    if twice and duplicates == "refuse":
        raise UserError(
            f"{len(twice)} genes that the checkpoint knows occur more than once in {where} (var's {chosen}, without "
            f"version suffix), for example {', '.join(twice[:3])}; expected each once. Remove them, or give "
            "`duplicate_genes='first'` to use the first column of each."
        )
    if twice:
        genes = _only_first(genes)
    return chosen, genes


def _ids(var: pd.DataFrame, column: str) -> tuple[str, ...]:
    return tuple(str(gene).split(".")[0] for gene in _column(var, column))


def _column(var: pd.DataFrame, column: str) -> pd.Index | pd.Series:
    return var.index if column == INDEX else var[column]


def _only_first(genes: tuple[str, ...]) -> tuple[str, ...]:
    seen: set[str] = set()
    kept = []
    for gene in genes:
        kept.append(NO_GENE if gene in seen else gene)
        seen.add(gene)
    return tuple(kept)


def _hint(genes: tuple[str, ...], checkpoint: Checkpoint) -> str:
    example = next((gene for gene in checkpoint.gene_rows if gene.startswith("ENS")), None)
    expected = f"Expected Ensembl ids such as {example}" if example else "Expected ids as the checkpoint has them"
    if not any(gene[:3].upper() == "ENS" for gene in genes[:1000]):
        return (
            f"{expected}, and these look like gene symbols: add a column with ids to this matrix's var and name it "
            "`gene_column`, or give the `layer` whose var has ids."
        )
    return f"{expected}: use a checkpoint that knows these genes, or `pretrained_embeddings`."
