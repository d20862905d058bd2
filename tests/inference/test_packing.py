"""Rows hold every cell once, split none, and waste almost no space."""

import numpy as np
import pytest

from census_tf_dagster.inference.packing import PackedCells, assemble, choose_cells


def lengths(median: int, n: int, seed: int) -> np.ndarray:
    """Return lengths like those of real cells, cut at the window of 2,048 tokens."""
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(median), 0.5, n)), 2, 2048).astype(np.int64)


@pytest.mark.parametrize(("median", "row_length"), [(90, 65536), (1800, 65536), (1800, 8192), (3500, 4096), (5, 2048)])
def test_each_cell_once_in_rows_that_hold_them(median: int, row_length: int) -> None:
    found = lengths(median, 3000, seed=median)
    rows = choose_cells(found, row_length)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(3000))
    assert max(found[row].sum() for row in rows) <= row_length
    assert all((np.diff(row) > 0).all() for row in rows)


@pytest.mark.parametrize(("median", "least"), [(1800, 0.97), (90, 0.95)])
def test_fill_of_a_megabatch(median: int, least: float) -> None:
    found = lengths(median, 16_384, seed=0)
    assert found.sum() / (len(choose_cells(found, 65_536)) * 65_536) >= least


def test_most_cells() -> None:
    rows = choose_cells(np.full(10, 4), 64, most_cells=3)
    assert sorted(len(row) for row in rows) == [1, 3, 3, 3]


def test_no_cells() -> None:
    assert choose_cells(np.empty(0, np.int64), 64) == []


def test_a_cell_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="a cell of 65 tokens does not fit a row of 64"):
        choose_cells(np.array([3, 65]), 64)


def test_assemble() -> None:
    tokens = np.arange(10, dtype=np.int32)
    row = assemble(PackedCells(tokens, tokens.astype(np.float32), np.array([0, 3, 4, 10])), np.array([0, 2]))
    assert row.tokens.tolist() == row.bias.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert row.offsets.tolist() == [0, 3, 9]
