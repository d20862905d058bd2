"""Tokens equal those of upstream's rules, written in plain Python."""

import numpy as np
import pytest

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.inference.tokens import Tokenizer

SEQ_LEN = 8


def tokenizer(known: list[int], n_genes: int) -> Tokenizer:
    rows = np.full(n_genes, -1, np.int32)
    rows[known] = np.arange(len(known)) + 4
    assays = {"a": 1, "b": 2}
    return Tokenizer(rows, tuple(str(k) for k in known), assays, start_row=3, seq_len=SEQ_LEN, eps=1e-6)


def expected(values: dict[int, float], assay: str, tok: Tokenizer) -> tuple[list[int], list[float]]:
    genes = [(int(tok.row_of_column[g]), c) for g, c in sorted(values.items()) if c and tok.row_of_column[g] >= 0]
    genes = genes[: SEQ_LEN - 1]
    start = [(tok.assay_rows[assay], 1.0)] if assay in tok.assay_rows else []
    sequence = [*start, (3, 1.0), *genes]
    return [t for t, _ in sequence], [float(np.log1p(np.float32(min(c, 30)) + np.float32(1e-6))) for _, c in sequence]


@pytest.mark.parametrize("seed", range(5))
def test_against_the_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_genes = 30
    tok = tokenizer(sorted(rng.choice(n_genes, 20, replace=False).tolist()), n_genes)
    cells = []
    for _ in range(40):
        genes = np.sort(rng.choice(n_genes, rng.integers(0, 25), replace=False))
        cells.append({int(g): float(rng.choice([0, 1, 2, 30, 31, 900])) for g in genes})
    assays = rng.choice(["a", "b", "unknown", "else"], len(cells)).tolist()
    indptr = np.cumsum([0, *map(len, cells)])
    packed = tok(
        Cells(
            np.arange(len(cells)),
            indptr.astype(np.int64),
            np.array([g for cell in cells for g in cell], np.int32),
            np.array([c for cell in cells for c in cell.values()], np.float32),
            tuple(assays),
        )
    )
    assert packed.offsets[-1] == len(packed.tokens) == len(packed.bias)
    for i, (cell, assay) in enumerate(zip(cells, assays, strict=True)):
        tokens, bias = expected(cell, assay, tok)
        part = slice(packed.offsets[i], packed.offsets[i + 1])
        assert packed.tokens[part].tolist() == tokens
        assert packed.bias[part] == pytest.approx(bias, rel=1e-6)
