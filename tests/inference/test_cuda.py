"""The engine's calls of CUDA are right, tested without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import devices, gpu
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.device_process import _about
from census_tf_dagster.inference.devices import open_devices
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.gpu import choose_device
from tests.support.cells import ASSAYS, GENES, cells, fail_when
from tests.support.cuda_double import GIB, gpus_of_tests, interpreter
from tests.support.project import BOUND, relative_errors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    build_checkpoint(folder / "checkpoint", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128)
    return prepare(read_checkpoint(folder / "checkpoint"), "fp32", folder / "cache")


@pytest.fixture(scope="module")
def expected(prepared: Path) -> np.ndarray:
    return Engine.load(prepared, GENES, "cpu").embed(cells(30, seed=0))


def embed_on(prepared: Path, device: str) -> np.ndarray:
    # The reference implementation of FlexAttention needs short rows.
    engine = Engine.load(prepared, GENES, device, batch_size=8)
    return engine.embed(cells(30, seed=0))


def test_the_default_device_loads_and_embeds(prepared: Path, expected: np.ndarray) -> None:
    with gpus_of_tests(2) as machine:
        found = embed_on(prepared, "cuda")
    assert relative_errors(found, expected).max() <= BOUND
    assert machine.used == {0}


def test_one_of_several(prepared: Path, expected: np.ndarray) -> None:
    with gpus_of_tests(2) as machine:
        found = embed_on(prepared, "cuda:1")
    assert relative_errors(found, expected).max() <= BOUND
    assert (machine.used, machine.current) == ({1}, 1)


@pytest.mark.parametrize(
    ("visible", "device", "chosen"),
    [
        (None, "cuda", 0),
        (None, "cuda:1", 1),
        ("1", "cuda", 0),
        ("1", "cuda:0", 0),
        ("0,1", "cuda:1", 1),
        ("1,0", "cuda", 0),
    ],
)
def test_devices_have_an_index(monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, chosen: int) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with gpus_of_tests(2):
        assert choose_device(device) == torch.device("cuda", chosen)


@pytest.mark.parametrize(
    ("visible", "device", "message"),
    [
        (None, "cuda:2", "cuda:2 .* 2 GPUs: cuda:0 to cuda:1"),
        ("1", "cuda:1", "cuda:1 .* 1 GPU"),
        ("", "cuda", "no GPU that torch can use.*CUDA_VISIBLE_DEVICES is ''"),
        ("-1", "cuda", "no GPU that torch can use.*CUDA_VISIBLE_DEVICES is '-1'"),
        ("7", "cuda", "no GPU that torch can use.*CUDA_VISIBLE_DEVICES is '7'"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, message: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with gpus_of_tests(2), pytest.raises(UserError, match=message):
        choose_device(device)


def test_a_torch_without_cuda_says_so() -> None:
    with pytest.raises(UserError, match=r"this torch \(.*\) is built without CUDA"):
        choose_device("cuda")


def test_what_a_device_reports(prepared: Path) -> None:
    with gpus_of_tests(2) as machine:
        engine = Engine.load(prepared, GENES, "cuda:1", batch_size=8)
        about = _about(engine)
        assert engine.peak_bytes() == 5 * GIB + 1
    assert about["name"] == "GPU 1"
    assert about["attention"] == "FlexAttention: Triton"
    assert about["row_length"] == 8 * 128
    assert machine.peak_of == [1]


def test_rows_follow_free_memory(prepared: Path) -> None:
    with gpus_of_tests(1, free=2**21):
        assert Engine.load(prepared, GENES, "cuda").row_length < 1024


def test_several_are_under_way_and_time_is_counted(prepared: Path, expected: np.ndarray) -> None:
    with gpus_of_tests(1) as machine:
        engine = Engine.load(prepared, GENES, "cuda", batch_size=4)
        works = [engine.add(cells(30, seed=0)) for _ in range(2)]
        done = []
        most = 0
        while not engine.idle:
            done.append(engine.step())
            most = max(most, machine.queued - machine.finished)
    assert most == 1
    assert [work for work in done if work] == works
    assert all(relative_errors(work.embeddings, expected).max() <= BOUND for work in works)
    assert engine.counters.busy > 0


def test_memory_that_runs_out_halves_the_row(
    prepared: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpus_of_tests(1) as machine:
        engine = Engine.load(prepared, GENES, "cuda", batch_size=8)
        error = torch.OutOfMemoryError("CUDA out of memory")
        fail_when(monkeypatch, lambda row: len(row.tokens) > 600, error)
        found = engine.embed(cells(30, seed=0))
    assert relative_errors(found, expected).max() <= BOUND
    assert (engine.counters.halvings, engine.row_length) == (1, 512)
    assert machine.emptied == 1


@pytest.mark.parametrize("at", ["load_model", "Model.embed"])
def test_a_model_that_does_not_fit(prepared: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"census_tf_dagster.inference.engine.{at}", full)
    with gpus_of_tests(1, free=3 * GIB), pytest.raises(UserError, match=r"GPU 0 .* 3\.0 of 80\.0 GiB are free"):
        Engine.load(prepared, GENES, "cuda")


@pytest.mark.parametrize("named", [True, False], ids=["AcceleratorError", "torch 2.5"])
def test_a_lost_device_is_not_a_fault_of_the_cells(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    kind = torch.AcceleratorError if named else RuntimeError
    if not named:
        monkeypatch.delattr(torch, "AcceleratorError")
    error = kind("CUDA error: an illegal memory access was encountered")
    engine = Engine.load(prepared, GENES, "cpu")
    fail_when(monkeypatch, lambda row: True, error)
    with pytest.raises(kind, match="illegal memory access"):
        engine.embed(cells(30, seed=0))


def test_compilers_that_triton_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="no C compiler"):
        gpu.require_compiler()

    def install(name: str) -> None:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)

    install("cc")
    # Triton looks only for gcc and clang.
    with pytest.raises(UserError, match="no C compiler"):
        gpu.require_compiler()
    install("gcc")
    gpu.require_compiler()
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(UserError, match="'/no/such/compiler'"):
        gpu.require_compiler()
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"Python\.h"):
        gpu.require_compiler()


@pytest.mark.usefixtures("real_devices")
@pytest.mark.parametrize(("visible", "names"), [(None, ["GPU 0", "GPU 1"]), ("1", ["GPU 0"])])
def test_a_process_for_each_device(
    prepared: Path,
    expected: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    names: list[str],
) -> None:
    monkeypatch.setattr(devices.sys, "executable", str(interpreter(tmp_path, gpus=2)))
    monkeypatch.setattr(devices, "count_gpus", lambda: len(names))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with open_devices(prepared, GENES, "cuda", 8) as started:
        assert [device.about["name"] for device in started] == names
        for number, device in enumerate(started):
            device.send(0, cells(30, seed=0))
            answer = device.receive()
            assert relative_errors(answer.embeddings, expected).max() <= BOUND
            assert answer.counters["peak_bytes"] == 5 * GIB + number


@pytest.mark.usefixtures("real_devices")
def test_no_process_without_a_device(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.sys, "executable", str(interpreter(tmp_path, gpus=2)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES is ''"), open_devices(prepared, GENES, "cuda", 8):
        pass


DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { char *seen = getenv("CUDA_VISIBLE_DEVICES"); return seen && !*seen ? 100 : 0; }
int cuDeviceGetCount(int *count) {
    char *seen = getenv("CUDA_VISIBLE_DEVICES");
    *count = 4;
    if (seen) for (*count = 1; (seen = strchr(seen, ',')); seen++) ++*count;
    return 0;
}
"""
"""Answers of NVIDIA's driver library for four GPUs; 100 is its error code for no GPU."""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the driver's double needs gcc")
def test_the_driver_counts_what_is_visible(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    build = ["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")]
    subprocess.run(build, check=True)
    count = "from census_tf_dagster.inference.devices import count_gpus; print(count_gpus())"
    found = []
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "2,0"}, {"CUDA_VISIBLE_DEVICES": ""}):
        env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), **visible}
        found.append(
            int(subprocess.run([sys.executable, "-c", count], env=env, check=True, capture_output=True).stdout)
        )
    assert found == [4, 1, 2, 0]
