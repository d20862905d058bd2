"""Cells that leave a precision's range are computed again or set aside; their neighbours keep their values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from census_tf_dagster.inference import engine as engine_module
from census_tf_dagster.inference.cell_errors import NonFiniteError
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.devices import open_devices
from census_tf_dagster.inference.engine import Engine, PendingCells
from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.non_finite import NonFiniteCells, RowResult
from census_tf_dagster.inference.packing import PackedCells, assemble
from tests.support.cells import ASSAYS, GENES, START
from tests.support.cuda_double import gpus_of_tests
from tests.support.overflowing import OVERFLOWS_FP16, OVERFLOWS_FP32, build_overflowing
from tests.support.project import DEVICE, relative_errors

SEQ_LEN = 127
HOT = START + 1 + GENES.index(GENES[7])
CULPRITS = [2, 11]
CELLS = 16

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")


def prepared(folder: Path, gain: float, precision: str) -> Path:
    sizes = {"embed_dim": 32, "num_heads": 2, "num_layers": 3, "seq_len": SEQ_LEN, "block_len": 128}
    build_overflowing(folder / "checkpoint", GENES, ASSAYS, GENES[7], gain, **sizes)
    return prepare(read_checkpoint(folder / "checkpoint"), precision, folder / "cache")


@pytest.fixture(scope="module")
def overflows_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("fp16"), OVERFLOWS_FP16, "fp16")


@pytest.fixture(scope="module")
def overflows_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("bf16"), OVERFLOWS_FP32, "bf16")


def packed(hot: tuple[int, ...] | list[int] = tuple(CULPRITS)) -> PackedCells:
    """Make cells of various lengths. Some have the gene that overflows, and every second one has an assay token."""
    rng = np.random.default_rng(0)
    parts = []
    for number in range(CELLS):
        genes = rng.choice(np.arange(START + 1, START + 1 + len(GENES)), rng.integers(5, 50), replace=False)
        genes = np.sort(genes[genes != HOT])
        if number in hot:
            genes[len(genes) // 2] = HOT
        parts.append(np.concatenate([[1] if number % 2 else [], [START], genes]))
    tokens = np.concatenate(parts).astype(np.int32)
    return PackedCells(tokens, rng.random(len(tokens), np.float32), np.cumsum([0, *map(len, parts)]))


def others(cells: list[int] = CULPRITS) -> np.ndarray:
    return np.setdiff1d(np.arange(CELLS), cells)


def finish(engine: Engine, cells: PackedCells) -> PendingCells:
    engine.add(cells)
    while (work := engine.step()) is None:
        pass
    return work


def by_itself(model: Model, cells: PackedCells) -> np.ndarray:
    rows = [assemble(cells, np.array([cell])) for cell in range(len(cells.lengths()))]
    return np.concatenate([model.embed(row).cpu().numpy() for row in rows])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_in_a_packed_row_neighbours_are_harmed(overflows_fp16: Path) -> None:
    """Neighbours are harmed without recomputation: a masked key still multiplies its value, and 0 x NaN is NaN."""
    model = Engine.load(overflows_fp16, GENES, "cpu").model
    alone = by_itself(model, packed())
    assert np.flatnonzero(~np.isfinite(alone).all(axis=1)).tolist() == CULPRITS
    row = assemble(packed(), np.arange(CELLS))
    together = model.embed(row, 1024).numpy()
    assert (~np.isfinite(together).all(axis=1)).sum() > len(CULPRITS)


def test_only_the_cell_itself_is_computed_again(overflows_fp16: Path) -> None:
    engine = Engine.load(overflows_fp16, GENES, DEVICE)
    work = finish(engine, packed())
    assert (work.failure, work.set_aside, work.widened) == (None, {}, CULPRITS)
    assert np.isfinite(work.embeddings).all()
    assert np.array_equal(work.embeddings[others()], engine.embed(packed(hot=[]))[others()])


def test_the_wider_precision_is_fp32_of_the_same_weights(overflows_fp16: Path, tmp_path: Path) -> None:
    exact = Engine.load(prepared(tmp_path, OVERFLOWS_FP16, "fp32"), GENES, "cpu").embed(packed())
    found = Engine.load(overflows_fp16, GENES, "cpu").embed(packed())
    assert relative_errors(found, exact).max() < 5e-3


@without_gpu
def test_in_a_packed_row_neighbours_keep_their_values_bit_for_bit(overflows_fp16: Path) -> None:
    with gpus_of_tests(1):
        engine = Engine.load(overflows_fp16, GENES, "cuda", batch_size=6)
        work = finish(engine, packed())
        without = finish(engine, packed(hot=[]))
        elsewhere = finish(engine, packed(hot=[4]))
    assert (work.failure, work.set_aside, work.widened) == (None, {}, CULPRITS)
    assert (without.set_aside, without.widened) == ({}, [])
    assert elsewhere.widened == [4]
    assert np.array_equal(work.embeddings[others()], without.embeddings[others()])
    assert np.array_equal(elsewhere.embeddings[others([4])], without.embeddings[others([4])])
    wide = Engine.load(overflows_fp16, GENES, "cpu").embed(packed())
    assert relative_errors(work.embeddings, wide).max() < 5e-3


@without_gpu
def test_a_cell_that_is_not_finite_in_any_precision_is_given_up_alone(overflows_fp32: Path) -> None:
    reason = "Its embedding is not finite in bf16, nor in fp32."
    plain = Engine.load(overflows_fp32, GENES, "cpu")
    works = [finish(plain, packed())]
    expected = [plain.embed(packed(hot=[]))]
    with gpus_of_tests(1):
        engine = Engine.load(overflows_fp32, GENES, "cuda", batch_size=6)
        works.append(finish(engine, packed()))
        expected.append(engine.embed(packed(hot=[])))
    for work, values in zip(works, expected, strict=True):
        assert (work.failure, work.widened) == (None, [])
        assert work.set_aside == dict.fromkeys(CULPRITS, reason)
        assert np.isnan(work.embeddings[CULPRITS]).all()
        assert np.array_equal(work.embeddings[others()], values[others()])


def test_nothing_is_wider_than_fp32(tmp_path: Path) -> None:
    engine = Engine.load(prepared(tmp_path, OVERFLOWS_FP32, "fp32"), GENES, "cpu")
    assert finish(engine, packed()).set_aside == dict.fromkeys(CULPRITS, "Its embedding is not finite in fp32.")
    message = r"2 cells have embeddings that are not finite, positions \[2, 11\]\. The first cell: .* in fp32\."
    with pytest.raises(NonFiniteError, match=message):
        engine.embed(packed())


@without_gpu
def test_only_culprits(overflows_fp32: Path) -> None:
    everyone = list(range(CELLS))
    with gpus_of_tests(1):
        work = finish(Engine.load(overflows_fp32, GENES, "cuda", batch_size=6), packed(hot=everyone))
    assert (work.failure, list(work.set_aside)) == (None, everyone)


def test_the_second_precision_is_loaded_once_and_only_when_needed(
    overflows_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[torch.dtype | None] = []
    load = engine_module.load_model

    def counted(prepared: Path, genes: list[str], device: torch.device, dtype: torch.dtype | None = None) -> object:
        loads.append(dtype)
        return load(prepared, genes, device, dtype)

    monkeypatch.setattr(engine_module, "load_model", counted)
    engine = Engine.load(overflows_fp16, GENES, "cpu")
    engine.embed(packed(hot=[]))
    assert loads == [None]
    for _ in range(2):
        engine.embed(packed())
    assert loads == [None, torch.float32]


def test_memory_that_does_not_suffice_for_the_wider_precision_costs_those_cells_alone(
    overflows_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = engine_module.load_model

    def full(prepared: Path, genes: list[str], device: torch.device, dtype: torch.dtype | None = None) -> object:
        if dtype is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(prepared, genes, device)

    monkeypatch.setattr(engine_module, "load_model", full)
    work = finish(Engine.load(overflows_fp16, GENES, "cpu"), packed())
    reason = "Its embedding is not finite in fp16, and the device's memory does not suffice to compute it in fp32."
    assert (work.failure, work.set_aside) == (None, dict.fromkeys(CULPRITS, reason))
    assert np.isfinite(work.embeddings[others()]).all()


@without_gpu
def test_memory_that_runs_out_in_the_recomputation_halves_the_row(
    overflows_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpus_of_tests(1):
        engine = Engine.load(overflows_fp16, GENES, "cuda", batch_size=6)
        recompute, errors = NonFiniteCells.__call__, [torch.OutOfMemoryError("CUDA out of memory")]

        def full(self: NonFiniteCells, *arguments: Any) -> RowResult:
            if errors:
                raise errors.pop()
            return recompute(self, *arguments)

        monkeypatch.setattr(NonFiniteCells, "__call__", full)
        work = finish(engine, packed())
    assert engine.counters.halvings == 1
    assert (work.failure, work.set_aside, work.widened) == (None, {}, CULPRITS)
    assert np.isfinite(work.embeddings).all()


@without_gpu
def test_cells_that_overflow_do_not_keep_a_model_from_loading(
    overflows_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warming up embeds cells that no Census has, so their values do not matter."""
    embed = Model.embed

    def infinite(self: Model, *arguments: object) -> torch.Tensor:
        return embed(self, *arguments) * torch.inf  # type: ignore[arg-type]

    with gpus_of_tests(1):
        monkeypatch.setattr(Model, "embed", infinite)
        assert Engine.load(overflows_fp32, GENES, "cuda", batch_size=2).idle


def test_a_device_says_which_cells(overflows_fp16: Path, overflows_fp32: Path) -> None:
    with open_devices(overflows_fp16, GENES, "cpu", None) as (device,):
        device.send(5, packed())
        answer = device.receive()
        assert (answer.key, answer.failure, answer.set_aside, answer.widened) == (5, "", {}, CULPRITS)
        assert answer.embeddings is not None
        assert np.isfinite(answer.embeddings).all()
        device.commit()
        assert np.array_equal(device.embed(packed()), answer.embeddings)
    with open_devices(overflows_fp32, GENES, "cpu", None) as (device,):
        device.send(5, packed())
        answer = device.receive()
        assert (answer.failure, list(answer.set_aside), answer.widened) == ("", CULPRITS, [])
        assert answer.embeddings is not None
        assert np.isnan(answer.embeddings[CULPRITS]).all()
        device.commit()
        with pytest.raises(ArithmeticError, match=r"2 cells .* positions \[2, 11\]"):
            device.embed(packed())
