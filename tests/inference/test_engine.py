"""The engine gives the same values for rows of any kind, and loses nothing when memory runs out."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.inference import model as model_module
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.packing import PackedCells, assemble
from tests.support.cells import ASSAYS, GENES, SEQ_LEN, cells, fail_when
from tests.support.project import BOUND, load_engine, relative_errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "checkpoint"
    build_checkpoint(
        folder, {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, num_layers=3, seq_len=SEQ_LEN, block_len=128
    )
    return folder


@pytest.fixture
def engine(folder: Path) -> Engine:
    return load_engine(read_checkpoint(folder), GENES)


def one_by_one(engine: Engine, packed: PackedCells) -> np.ndarray:
    rows = [assemble(packed, np.array([cell])) for cell in range(len(packed.lengths()))]
    return np.concatenate([engine.model.embed(row).cpu().numpy() for row in rows])


def test_rows_of_any_kind_give_the_same(engine: Engine) -> None:
    packed = cells(30, seed=0)
    expected = one_by_one(engine, packed)
    assert relative_errors(engine.embed(packed), expected).max() <= BOUND / 10
    engine.batch_size = 7
    assert relative_errors(engine.embed(packed), expected).max() <= BOUND / 10
    assert engine.idle


def test_the_same_cells_give_the_same_bits(engine: Engine) -> None:
    packed = cells(30, seed=0)
    assert np.array_equal(engine.embed(packed), engine.embed(packed))


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_half_precision_is_near(engine: Engine, folder: Path, precision: str, bound: float) -> None:
    packed = cells(30, seed=0)
    half = load_engine(read_checkpoint(folder), GENES, precision)
    assert relative_errors(half.embed(packed), one_by_one(engine, packed)).max() <= bound


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_padded_rows_give_the_same(engine: Engine) -> None:
    packed = cells(10, seed=1)
    row = assemble(packed, np.arange(10)[::-1].copy())
    length = -(-len(row.tokens) // 128) * 128 + 256
    padded = engine.model.embed(row, length).cpu().numpy()
    assert relative_errors(padded[::-1], one_by_one(engine, packed)).max() <= BOUND / 10


def test_all_layers_and_rows_share_one_compilation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation makes two graphs: one for the last layer, one for all others."""
    engine = load_engine(read_checkpoint(folder), GENES)
    torch._dynamo.reset()
    counters.clear()
    for name in ("block", "to_hidden"):
        function = torch.compile(getattr(model_module, name), dynamic=False, backend="eager")
        monkeypatch.setattr(model_module, name, function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            packed = cells(6, seed)
            embedded = engine.model.embed(assemble(packed, np.arange(6)), 1024).cpu().numpy()
            assert np.isfinite(embedded).all()
    assert counters["stats"]["unique_graphs"] == 2


def test_several_are_handed_out_in_order(engine: Engine) -> None:
    added = [engine.add(cells(20, seed)) for seed in range(3)]
    assert not engine.hungry
    done = []
    while not engine.idle:
        if (work := engine.step()) is not None:
            done.append(work)
    assert done == added
    for seed, work in enumerate(done):
        assert relative_errors(work.embeddings, one_by_one(engine, cells(20, seed))).max() <= BOUND / 10


def test_memory_that_runs_out_halves_the_row_and_loses_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = [cells(60, seed) for seed in range(2)]
    expected = [one_by_one(engine, one) for one in packed]
    fail_when(monkeypatch, lambda row: len(row.tokens) > 600, torch.OutOfMemoryError("CUDA out of memory"))
    engine.row_length = 2048
    works = [engine.add(one) for one in packed]
    while not engine.idle:
        engine.step()
    assert engine.row_length == 512
    assert engine.counters.halvings == 2
    assert engine.counters.tokens == sum(len(one.tokens) for one in packed), "no cell is computed twice"
    for work, values in zip(works, expected, strict=True):
        assert work.failure is None
        assert relative_errors(work.embeddings, values).max() <= BOUND / 10


def test_memory_that_does_not_suffice_for_one_cell(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_when(monkeypatch, lambda row: True, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        engine.embed(cells(20, seed=0))
    assert engine.row_length == 128
    assert engine.idle


def test_one_failure_leaves_the_others_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = cells(20, seed=0), cells(20, seed=1)
    expected = one_by_one(engine, good)
    fail_when(monkeypatch, lambda row: np.isin(bad.bias[:50], row.bias).any(), ValueError("these cells"))
    works = [engine.add(bad), engine.add(good)]
    while not engine.idle:
        engine.step()
    assert str(works[0].failure) == "these cells"
    assert works[1].failure is None
    assert relative_errors(works[1].embeddings, expected).max() <= BOUND / 10
