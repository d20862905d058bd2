"""A few cells of a shard are compared with upstream's own code, or the result says why not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.pipeline import check_upstream, upstream
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.quality.upstream_comparison import NOT_INSTALLED, UpstreamComparison
from census_tf_dagster.quality.verdicts import of_comparison
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import fill, tiny, value_of
from tests.support.in_process import Deployment
from tests.support.project import RELEASE, Project, UpstreamCommand


@pytest.fixture
def context(project: Project) -> Iterator[ReleaseContext]:
    tiny(project, cells=64, shards=2, storage_precision="bfloat16")
    with project.context("tiny") as opened:
        yield opened


def compare(context: ReleaseContext, command: Path | None, shard: int = 0, *, anew: bool = False) -> UpstreamComparison:
    """Compare the array with upstream."""
    plan = read_plan(context.store, context.folder.plan)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    with check_upstream.checking_upstream(context, plan, array, shard, command, anew=anew) as finish:
        found = finish()
    assert found is not None
    return found


def script(folder: Path, text: str) -> Path:
    """Make a command whose Python reports upstream's version, but runs something else."""
    command = folder / "bin" / "transcriptformer"
    command.parent.mkdir()
    command.touch()
    (command.parent / "python").write_text(
        f'#!/bin/sh\ncase "$2" in *importlib.metadata*) echo transcriptformer 0.6.1; exit;; esac\n{text}\n'
    )
    (command.parent / "python").chmod(0o755)
    return command


@pytest.mark.upstream
def test_upstream_agrees_with_a_shard_and_finds_wrong_values(
    context: ReleaseContext, upstream_command: UpstreamCommand
) -> None:
    make_plan(context)
    summary = embed_shard(context, 0, upstream=upstream_command.command)
    found = summary.comparison
    assert found is not None
    verdict = of_comparison(found)
    assert verdict.passed, verdict.text
    assert len(found.joinids) == check_upstream.CELLS
    # The array holds fp32 values, rounded to bfloat16, so the difference is that of rounding and not 0.
    assert 1e-4 < found.relative_rms < found.worst_cell < found.bound < 4e-3
    assert found.centred_cosine > 0.99
    # A shard with nothing to do shows the stored comparison and starts no other.
    assert embed_shard(context, 0, upstream=Path("/nowhere/transcriptformer")).comparison == found

    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    plan = read_plan(context.store, context.folder.plan)
    (ids, *_) = plan.read_ids(context.store, plan.shard(0)[:1])
    with array.reading() as read:
        values = np.concatenate([table["soma_data"].to_numpy() for table in read(slice(int(ids[0]), int(ids[-1])))])
    # Each cell of the first megabatch has its neighbour's embedding.
    array.write(ids, np.roll(values.reshape(len(ids), -1), 1, axis=0))
    wrong = compare(context, upstream_command.command, anew=True)
    verdict = of_comparison(wrong)
    assert (verdict.passed, verdict.grave) == (False, True)
    assert wrong.worst_cell > wrong.bound


def test_without_upstream_it_is_not_done_and_says_so(context: ReleaseContext) -> None:
    make_plan(context)
    found = embed_shard(context, 1).comparison
    assert found is not None
    verdict = of_comparison(found)
    assert (verdict.passed, verdict.grave) == (False, False)
    assert "transcriptformer is not installed on the worker" in verdict.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo no memory for this >&2; exit 1", "failed:\nno memory for this"),
        ("exit 0", "FileNotFoundError"),
        ("sleep 60", "took more than 0 s"),
    ],
)
def test_an_upstream_that_fails_is_told_and_ends(
    context: ReleaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    fill(context)
    monkeypatch.setattr(check_upstream, "PATIENCE_SECONDS", 0.3 if "sleep" in text else 60.0)
    found = compare(context, script(tmp_path, text))
    assert said in found.not_done
    assert (
        UpstreamComparison.read(
            context.store, context.folder.comparison(read_plan(context.store, context.folder.plan).totals.plan, 0)
        )
        == found
    )
    # Upstream runs again as soon as it is installed.
    assert said not in compare(context, tmp_path / "nowhere" / "transcriptformer").not_done


def test_cells_that_the_array_lacks_are_told(context: ReleaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(context)
    monkeypatch.setattr(
        check_upstream, "read_embeddings", lambda *_: (_ for _ in ()).throw(ValueError("8 cells are not in"))
    )
    monkeypatch.setattr(check_upstream, "upstream_running", lambda *_, **__: _answering(value_of(np.arange(8), 16)))
    assert compare(context, Path("transcriptformer")).not_done == "ValueError: 8 cells are not in"


class _answering:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __enter__(self) -> object:
        return lambda _: self.values

    def __exit__(self, *_: object) -> None: ...


def test_chosen_cells_are_of_the_shard_and_the_same_every_time(context: ReleaseContext) -> None:
    make_plan(context)
    plan = read_plan(context.store, context.folder.plan)
    for shard in range(2):
        chosen = check_upstream._choose(context, plan, shard)
        assert np.array_equal(chosen, check_upstream._choose(context, plan, shard))
        ids = np.concatenate(plan.read_ids(context.store, plan.shard(shard)))
        assert np.isin(chosen, ids).all()
        assert len(chosen) == check_upstream.CELLS
        assert (np.diff(chosen) > 0).all()


def test_a_shard_without_cells_has_nothing_to_compare(project: Project) -> None:
    tiny(project, cells=3, shards=4)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        (empty, *_) = [shard for shard in range(4) if not plan.shard(shard)]
        assert embed_shard(context, empty).comparison is None


KILLED = """
import sys, time
from pathlib import Path
from tests.support.project import Project
from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.pipeline.upstream import upstream_running
import numpy as np
with Project(Path(sys.argv[1])).context("tiny") as context:
    cells = read_cells(context.release, np.arange(4), context.checkpoint.aux_column)
    with upstream_running(context, cells, Path(sys.argv[2])) as answer:
        print("running", flush=True)
        time.sleep(60)
"""


def test_upstream_dies_with_a_shard_that_is_killed(project: Project, tmp_path: Path) -> None:
    """Upstream may occupy a GPU, and does not react to SIGTERM for minutes."""
    tiny(project, cells=64)
    pid = tmp_path / "pid"
    # The real command first starts a thread that waits for the end of its standard input.
    command = script(tmp_path, f'echo $$ > {pid}; exec {sys.executable} -c "$RUN_INSTEAD"')
    waits = upstream.RUN.split("import torch")[0] + "\nimport time; time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(project.folder), str(command)],
        stdout=subprocess.PIPE,
        env={**os.environ, "RUN_INSTEAD": waits},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    while not pid.exists() or not pid.read_text().strip():
        time.sleep(0.05)
    child = int(pid.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_upstream_is_found_beside_python_and_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    assert upstream.find_upstream() is None
    for folder in (tmp_path, tmp_path / "venv"):
        folder.mkdir(exist_ok=True)
        (folder / "transcriptformer").write_text("#!/bin/sh\n")
        (folder / "transcriptformer").chmod(0o755)
        assert upstream.find_upstream() == folder / "transcriptformer"


def test_dagster_shows_each_shards_check(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(project, cells=64, shards=2)
    monkeypatch.setattr(upstream, "find_upstream", lambda: None)
    with dg.DagsterInstance.ephemeral() as instance:
        deployment = Deployment(project, instance)
        assert deployment.run("obs_id_plan", RELEASE).success
        assert deployment.run("shard_embeddings", f"{RELEASE}|1").success
        key = dg.AssetCheckKey(dg.AssetKey(["tiny", "shard_embeddings"]), "same_as_upstream")
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=5)
        evaluation = record.evaluation
        assert evaluation is not None
        assert evaluation.partition == f"{RELEASE}|1"
        assert (evaluation.passed, evaluation.severity) == (True, dg.AssetCheckSeverity.WARN), "a set on the CPU"
        assert "Not done: transcriptformer is not installed" in (evaluation.description or "")
    with project.context("tiny") as context:
        plan = read_plan(context.store, context.folder.plan)
        stored = json.loads(context.store.read(context.folder.comparison(plan.totals.plan, 1)))
        assert stored["not_done"] == NOT_INSTALLED
