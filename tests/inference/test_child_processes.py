"""No child process outlives a killed worker, whatever the child is doing at that moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from tests.support.cells import ASSAYS, GENES
from tests.support.processes import alive, children, device_processes
from tests.support.project import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

LONGEST = 2.0
"""Seconds."""

WORKER = """
import sys
from pathlib import Path
import numpy as np
from census_tf_dagster.inference.devices import open_devices
from census_tf_dagster.inference.packing import PackedCells
genes, cells = sys.argv[2].split(), int(sys.argv[3])
with open_devices(Path(sys.argv[1]), genes, "cpu", None) as (device,):
    print("loaded", flush=True)
    tokens, bias = np.full(cells * 100, 3, np.int32), np.zeros(cells * 100, np.float32)
    device.send(0, PackedCells(tokens, bias, np.arange(cells + 1) * 100))
    print("sent", flush=True)
    sys.stdin.read()
"""
"""Imports no torch."""
UPSTREAM_WORKER = """
import subprocess, sys
from census_tf_dagster.pipeline.upstream import run_upstream
process = subprocess.Popen([sys.executable, "-c", run_upstream()], stdin=subprocess.PIPE)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orphans")
    build_checkpoint(folder / "checkpoint", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128)
    return prepare(read_checkpoint(folder / "checkpoint"), "fp32", folder / "cache")


@pytest.fixture
def stuck_import(tmp_path: Path) -> str:
    """Return a PYTHONPATH on which importing torch is a native call that holds Python's lock for a minute."""
    (tmp_path / "torch.py").write_text(
        f"import ctypes, pathlib\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\nctypes.PyDLL(None).sleep(60)\n"
    )
    return os.pathsep.join([str(tmp_path), str(REPOSITORY)])


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def started(code: str, *arguments: object, path: str = str(REPOSITORY)) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdin=pipe, stdout=pipe, text=True
    ) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def seconds_after_kill(worker: "subprocess.Popen[str]") -> float:
    """Kill a worker and return how long its children survived."""
    found = children(worker.pid)
    assert found
    began = time.monotonic()
    worker.kill()
    try:
        while any(alive(pid) for pid in found) and time.monotonic() - began < 3 * LONGEST:
            time.sleep(0.01)
        return time.monotonic() - began
    finally:
        for pid in filter(alive, found):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_while_a_native_call_keeps_pythons_lock(prepared: Path, stuck_import: str, tmp_path: Path) -> None:
    with started(WORKER, prepared, " ".join(GENES), 1, path=stuck_import) as worker:
        wait_for((tmp_path / "importing").exists)
        assert seconds_after_kill(worker) < LONGEST


@pytest.mark.parametrize("moment", [0.0, 0.4, 0.8])
def test_while_torch_is_imported(prepared: Path, moment: float) -> None:
    with started(WORKER, prepared, " ".join(GENES), 1) as worker:
        # Imports may start other children, which end by themselves.
        wait_for(lambda: device_processes(worker.pid))
        time.sleep(moment)
        assert seconds_after_kill(worker) < LONGEST


@pytest.mark.parametrize(
    ("said", "cells"),
    [("loaded", 20_000), ("sent", 20_000), ("sent", 2_000)],
    ids=["receiving", "computing", "answering"],
)
def test_while_it_works(prepared: Path, said: str, cells: int) -> None:
    with started(WORKER, prepared, " ".join(GENES), cells) as worker:
        assert worker.stdout is not None
        while worker.stdout.readline() != f"{said}\n":
            pass
        if cells == 2_000:
            # The megabatch is computed within this time. Then its answer fills the pipe, which nobody reads.
            time.sleep(1.0)
        assert seconds_after_kill(worker) < LONGEST


def test_a_parent_that_ended_before(stuck_import: str) -> None:
    command = [sys.executable, "-m", "census_tf_dagster.inference.device_process", str(os.getppid())]
    env = {**os.environ, "PYTHONPATH": stuck_import}
    began = time.monotonic()
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.wait(timeout=10) == 1
        finally:
            process.kill()
    assert time.monotonic() - began < 10


def test_upstreams_command_ends_as_well(stuck_import: str, tmp_path: Path) -> None:
    with started(UPSTREAM_WORKER, path=stuck_import) as worker:
        wait_for((tmp_path / "importing").exists)
        assert seconds_after_kill(worker) < LONGEST
