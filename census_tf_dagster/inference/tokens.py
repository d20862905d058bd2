"""Turns counts into tokens: which genes of a cell the model sees, in which order, with which attention bias.

The rules are upstream's (`process_batch` and `Transcriptformer.forward` of TranscriptFormer 0.6.1):

1. Explicit zeros are dropped, then genes outside the vocabulary.
2. Genes are in `var` order. With `gene_order: vocabulary` they are in the vocabulary's order, as if `var` had it. The
   first ``seq_len`` genes count, and the last of those is never an input.
3. Counts are clipped to 30, and need not be whole numbers. ``log1p(count + eps)`` is added to a key's attention score,
   with count 1 for the assay and START tokens.
4. An assay outside the vocabulary (or named ``unknown``) is masked as a key. It is not pooled either, so such a cell
   has no assay token here.

Tokens are rows of the model's embedding table: assays first, START, then the known genes of this `var`, in the order in
which a cell has them. So one look-up turns a count's column into a token, and the table holds only possible genes.

Packing the tokens of several cells into rows belongs in `packing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.inference.checkpoint_config import UNKNOWN
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.io.compiled import compiled

GeneOrder = Literal["census", "vocabulary"]

CLIP_COUNTS = 30
"""Default of upstream's command line, which overrides the checkpoint's configuration."""


@dataclass(frozen=True)
class Tokenizer:
    """Turns CSR counts over one gene axis into `PackedCells` for one checkpoint.

    Attributes
    ----------
    row_of_column
        Embedding table row of each `var` column, int32 ``(n_genes,)``; -1 for genes outside the vocabulary.
    known_genes
        The gene ids that have rows, in row order, which is also the order of a cell's genes.
    assay_rows
        Table row of each known assay.
    start_row
        Table row of START.
    seq_len
        Length of the model's window (rule 2).
    eps
        Value added to a count before its logarithm.
    reorders
        Whether that order differs from the order of the columns, so that each cell's counts must be sorted.
    """

    row_of_column: npt.NDArray[np.int32]
    known_genes: tuple[str, ...]
    assay_rows: dict[str, int]
    start_row: int
    seq_len: int
    eps: float
    reorders: bool = False

    @classmethod
    def build(cls, gene_ids: Sequence[str], checkpoint: Checkpoint, gene_order: GeneOrder = "census") -> "Tokenizer":
        """Assign the rows of the embedding table for a gene axis; see `genes_in_order`."""
        return cls.over(gene_ids, genes_in_order(gene_ids, checkpoint, gene_order), checkpoint)

    @classmethod
    def over(cls, gene_ids: Sequence[str], known: Sequence[str], checkpoint: Checkpoint) -> "Tokenizer":
        """Assign the rows of the embedding table for a gene axis, of which the genes `known` get a token, in order."""
        start_row = len(checkpoint.aux_vocab)
        row_of_gene = {gene: start_row + 1 + i for i, gene in enumerate(known)}
        return cls(
            row_of_column=np.array([row_of_gene.get(gene, -1) for gene in gene_ids], dtype=np.int32),
            known_genes=tuple(known),
            # Upstream masks by number, so it also masks an assay that has the number of `unknown`.
            assay_rows={
                assay: row for assay, row in checkpoint.aux_vocab.items() if row != checkpoint.aux_vocab[UNKNOWN]
            },
            start_row=start_row,
            seq_len=checkpoint.shape.seq_len,
            eps=checkpoint.shape.log_counts_eps,
            reorders=tuple(known) != tuple(gene for gene in gene_ids if gene in row_of_gene),
        )

    def __call__(self, cells: Cells) -> PackedCells:
        """Tokenize cells. The columns must ascend within each cell.

        Raises
        ------
        ValueError
            When a column is not in `var`.
        """
        assay_rows = np.array([self.assay_rows.get(assay, -1) for assay in cells.assays], dtype=np.int32)
        if len(cells.columns) and cells.columns.max() >= len(self.row_of_column):
            raise ValueError(f"X has gene joinid {cells.columns.max()}, but var ends at {len(self.row_of_column) - 1}")
        # Nearly all counts are whole numbers, so their biases are computed once.
        counts = np.arange(CLIP_COUNTS + 1, dtype=np.float32)
        indptr, columns, values, row_of_column = cells.indptr, cells.columns, cells.values, self.row_of_column
        if self.reorders:
            indptr, columns, values = _by_row(indptr, columns, values, row_of_column)
            # The columns are table rows now.
            row_of_column = np.arange(self.start_row + 1 + len(self.known_genes), dtype=np.int32)
        packed = _pack(
            indptr,
            columns,
            values,
            row_of_column,
            assay_rows,
            np.int32(self.start_row),
            self.seq_len - 1,
            np.log1p(counts + np.float32(self.eps)),
            np.float32(self.eps),
        )
        return PackedCells(*packed)


def genes_in_order(gene_ids: Sequence[str], checkpoint: Checkpoint, gene_order: GeneOrder) -> tuple[str, ...]:
    """Return the genes of an axis that get a token, in the order in which the model sees them.

    Parameters
    ----------
    gene_ids
        The axis, in `var` order.
    checkpoint
        The checkpoint whose vocabulary decides.
    gene_order
        ``census``: the order of `var`. ``vocabulary``: the order of the checkpoint's vocabulary.
    """
    if gene_order == "vocabulary":
        return checkpoint.in_vocabulary_order(gene_ids)
    return tuple(gene for gene in gene_ids if checkpoint.knows(gene))


@compiled()
def _by_row(indptr, columns, values, row_of_column):  # type: ignore[no-untyped-def]
    """Return CSR without zeros and unknown genes, each cell's entries ascending by row."""
    starts = np.zeros(len(indptr), np.int64)
    rows = np.empty(len(columns), np.int32)
    counts = np.empty(len(columns), np.float32)
    keys = np.empty(0, np.int64)
    at = 0
    for cell in range(len(indptr) - 1):
        if len(keys) < indptr[cell + 1] - indptr[cell]:
            keys = np.empty(indptr[cell + 1] - indptr[cell], np.int64)
        n = 0
        for i in range(indptr[cell], indptr[cell + 1]):
            row = row_of_column[columns[i]]
            if values[i] != 0 and row >= 0:
                # One integer holds row and position: numba's sort is several times faster than its argsort.
                keys[n] = (np.int64(row) << 32) | (i - indptr[cell])
                n += 1
        keys[:n].sort()
        for i in range(n):
            rows[at] = keys[i] >> 32
            counts[at] = values[indptr[cell] + (keys[i] & 0xFFFFFFFF)]
            at += 1
        starts[cell + 1] = at
    return starts, rows[:at], counts[:at]


@compiled()
def _pack(  # type: ignore[no-untyped-def]
    indptr, columns, values, row_of_column, assay_rows, start_row, most_genes, bias_of_count, eps
):
    n_cells = len(indptr) - 1
    offsets = np.zeros(n_cells + 1, np.int64)
    for cell in range(n_cells):
        genes = 0
        for i in range(indptr[cell], indptr[cell + 1]):
            if values[i] != 0 and row_of_column[columns[i]] >= 0:
                genes += 1
                if genes == most_genes:
                    break
        offsets[cell + 1] = offsets[cell] + genes + 1 + (assay_rows[cell] >= 0)
    tokens = np.empty(offsets[-1], np.int32)
    bias = np.empty(offsets[-1], np.float32)
    clip = len(bias_of_count) - 1
    for cell in range(n_cells):
        at = offsets[cell]
        if assay_rows[cell] >= 0:
            tokens[at] = assay_rows[cell]
            bias[at] = bias_of_count[1]
            at += 1
        tokens[at] = start_row
        bias[at] = bias_of_count[1]
        at += 1
        i = indptr[cell]
        while at < offsets[cell + 1]:
            row = row_of_column[columns[i]]
            if values[i] != 0 and row >= 0:
                tokens[at] = row
                count = min(values[i], np.float32(clip))
                whole = int(count)
                bias[at] = bias_of_count[whole] if whole == count else np.log1p(count + eps)
                at += 1
            i += 1
    return tokens, bias, offsets
