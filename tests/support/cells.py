"""Packed cells for an engine, and an engine that fails when told to."""

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.packing import PackedCells, Row

GENES = [f"ENSG{i:011d}" for i in range(60)]


ASSAYS = ["a", "b"]


SEQ_LEN = 127


START = 3


def cells(n: int, seed: int) -> PackedCells:
    """Cells of all lengths, every second one with an assay token."""
    rng = np.random.default_rng(seed)
    parts = []
    for number in range(n):
        genes = rng.integers(START + 1, START + 1 + len(GENES), rng.integers(0, SEQ_LEN))
        parts.append(np.concatenate([[1] if number % 2 else [], [START], genes]))
    tokens = np.concatenate(parts).astype(np.int32)
    return PackedCells(tokens, rng.random(len(tokens), np.float32), np.cumsum([0, *map(len, parts)]))


def fail_when(monkeypatch: pytest.MonkeyPatch, condition: Callable[[Row], bool], error: Exception) -> None:
    embed = Model.embed

    def faulty(self: Model, row: Row, row_length: int | None = None) -> Tensor:
        if condition(row):
            raise error
        return embed(self, row, row_length)

    monkeypatch.setattr(Model, "embed", faulty)
