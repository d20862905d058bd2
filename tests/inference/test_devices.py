"""Several device processes give the same values; none outlives its parent or ends without an error."""

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import devices
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import kernel_folders, prepare
from census_tf_dagster.inference.devices import DeviceLostError, open_devices
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.pipeline.stages import Times, outcomes
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import tiny
from tests.support.cells import ASSAYS, GENES, cells
from tests.support.processes import alive, device_processes
from tests.support.project import Project, load_engine, relative_errors

pytestmark = pytest.mark.usefixtures("real_devices")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    build_checkpoint(folder / "checkpoint", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128)
    return prepare(read_checkpoint(folder / "checkpoint"), "fp32", folder / "cache")


def test_a_device_is_the_engine(prepared: Path) -> None:
    folder = prepared.parent.parent.parent
    expected = load_engine(read_checkpoint(folder / "checkpoint"), GENES).embed(cells(30, seed=0))
    with open_devices(prepared, GENES, "cpu", None) as (device,):
        assert np.array_equal(device.embed(cells(30, seed=0)), expected)
        assert device.about["name"] == "CPU"
        pid = device.process.pid
    assert not alive(pid)


def variables(pid: int) -> dict[str, str]:
    """Return the environment with which a process was started."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_compiled_kernels_are_kept_for_the_next_process(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen/by/the/deployment")
    with open_devices(prepared, GENES, "cpu", None) as (device,):
        found = variables(device.process.pid)
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(prepared.parents[1] / "inductor")
    assert found["TRITON_CACHE_DIR"] == "/chosen/by/the/deployment"


def test_kernels_are_kept_nowhere_near_a_cache_that_is_not_writable(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would fail to compile. It then keeps them in the folder of temporary files."""
    assert set(kernel_folders(prepared)) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert kernel_folders(Path("/proc/none/prepared/file")) == {}


def test_a_second_answer_waits_until_the_first_is_committed(prepared: Path) -> None:
    with open_devices(prepared, GENES, "cpu", None) as (device,):
        device.send(0, cells(30, seed=0))
        device.send(1, cells(30, seed=1))
        assert device.receive().key == 0
        assert device.process.stdout is not None
        assert select.select([device.process.stdout], [], [], 1.0)[0] == []
        device.commit()
        assert device.receive().key == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(prepared: Path) -> None:
    with (
        pytest.raises(UserError, match="has `device: cuda`, but this machine has no GPU"),
        open_devices(prepared, GENES, "cuda", None),
    ):
        pass


def test_a_device_process_that_dies(prepared: Path) -> None:
    with open_devices(prepared, GENES, "cpu", None) as (device,):
        device.process.send_signal(signal.SIGKILL)
        device.process.wait()
        with pytest.raises(DeviceLostError, match=r"the process of CPU ended with signal 9; .* Run the shard again"):
            device.embed(cells(30, seed=0))


def test_several_devices_give_each_megabatch_once_with_the_same_values(project: Project) -> None:
    tiny(project, megabatch_size=8, shards=1)
    found: dict[int, dict[int, np.ndarray]] = {}
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        ids = plan.read_ids(context.store, plan.megabatches)
        for processes in (1, 3):
            times = Times()
            with outcomes(context, plan.megabatches, ids, times, processes) as leaving:
                done = list(leaving)
            assert sorted(one.batch.index for one in done) == list(range(len(plan.megabatches)))
            assert len(times.devices) == processes
            assert all(one["tokens"] for one in times.counters.values()), "every device had its share"
            assert sum(one["tokens"] for one in times.counters.values()) == sum(one.tokens for one in done)
            found[processes] = {one.batch.index: one.embeddings for one in done if one.embeddings is not None}
    for index, values in found[1].items():
        assert relative_errors(found[3][index], values).max() <= 1e-6


def test_a_device_that_dies_in_the_middle_stops_the_shard_at_once(project: Project) -> None:
    tiny(project, megabatch_size=4, shards=1)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        ids = plan.read_ids(context.store, plan.megabatches)
        done = []
        with pytest.raises(DeviceLostError), outcomes(context, plan.megabatches, ids, Times(), 2) as leaving:  # noqa: PT012
            for outcome in leaving:
                done.append(outcome)
                if len(done) == 3:
                    os.kill(device_processes(os.getpid())[0], signal.SIGKILL)
    assert 3 <= len(done) < len(plan.megabatches)
    assert not device_processes(os.getpid())


def test_a_write_that_fails_stops_all_stages_at_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(project, megabatch_size=4, shards=1)
    own = EmbeddingsArray.writing

    @contextmanager
    def on_a_full_disk(self: EmbeddingsArray) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
        with own(self) as write:

            def full(joinids: np.ndarray, embeddings: np.ndarray) -> None:
                if joinids[0] > 50:
                    raise OSError(28, "No space left on device")
                write(joinids, embeddings)

            yield full

    monkeypatch.setattr(EmbeddingsArray, "writing", on_a_full_disk)
    with project.context("tiny") as context:
        make_plan(context)
        threads = threading.active_count()
        with pytest.raises(OSError, match="No space left on device"):
            embed_shard(context, 0)
        assert not device_processes(os.getpid())
        assert threading.active_count() == threads
        monkeypatch.undo()
        rest = embed_shard(context, 0)
    assert 0 < rest.cells_before < rest.cells


def test_stages_are_counted(project: Project) -> None:
    tiny(project, megabatch_size=8, shards=1)
    with project.context("tiny") as context:
        make_plan(context)
        summary = embed_shard(context, 0)
    stages = summary.times.stages
    assert list(stages) == ["read", "tokens", "packing", "compute", "write"]
    assert all(0 < stage.busy < 60 and 0 <= stage.waiting < 60 for stage in stages.values())
    assert summary.times.limit() in stages
    assert summary.times.fill() == 1.0
    (counters,) = summary.times.counters.values()
    assert counters["tokens"] == summary.tokens_computed


HUNG = """
import os, sys, time
from census_tf_dagster.inference import device_process, watchdog

class Engine(device_process.Engine):
    def step(self):
        time.sleep(600)

device_process.Engine = Engine
device_process.Watchdog = lambda what: watchdog.Watchdog(what, longest=2.0)
device_process.main()
"""


def test_a_device_that_hangs_is_a_lost_one(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = devices.subprocess.Popen
    monkeypatch.setattr(
        devices.subprocess, "Popen", lambda command, **more: popen([command[0], "-c", HUNG, *command[3:]], **more)
    )
    with open_devices(prepared, GENES, "cpu", None) as (device,):
        device.send(0, cells(3, seed=0))
        with pytest.raises(DeviceLostError, match="the process of CPU ended with exit code 1"):
            device.receive()
