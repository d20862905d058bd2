"""Workers that die, stop, or run twice; and megabatches that cannot be embedded."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.steps.embedding import MOST_SET_ASIDE, SetAsideError, embed_shard
from census_tf_dagster.steps.finishing import finish_array
from census_tf_dagster.steps.planning import make_plan
from tests.builders import tiny
from tests.support import BOUND, RELEASE, REPOSITORY, Project, read_array, relative_errors
from tests.test_devices import children, gone_within

CELLS = 400


def start(project: Project, name: str = "tiny", pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.shard_driver", str(project.folder), name, "0", str(pause)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def add_and_plan(project: Project, name: str) -> int:
    """Declare one more set on the same cells, with an array of its own; return its number of megabatches."""
    project.add_set(name, organism="homo_sapiens", shards=1, megabatch_size=16)
    with project.job(name) as job:
        return make_plan(job).totals.megabatches


def finished_values(project: Project, name: str, cells: int) -> np.ndarray:
    """Finish a set and read it back: every cell once, with all its values."""
    with project.job(name) as job:
        finish_array(job)
    stored = read_array(project.array(name), project.folder)
    assert np.array_equal(stored.ids, np.arange(cells))
    assert stored.stored_values == cells * 16
    return stored.values


def kill_at_random_moments(project: Project, kills: int, seed: int) -> None:
    tiny(project, cells=CELLS, shards=1)
    add_and_plan(project, "calm")
    with project.job("calm") as job:
        embed_shard(job, 0)
    expected = finished_values(project, "calm", CELLS)
    rng = random.Random(seed)
    delivered = lives = 0
    while delivered < kills:
        name = f"life{lives}"
        lives += 1
        megabatches = add_and_plan(project, name)
        computed = killed = 0
        done = False
        while not done:
            with start(project, name, pause=0.02) as worker:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "started\n"
                output = ""
                if delivered + killed < kills:
                    # One in four while the device process starts, the others while all stages work.
                    if rng.random() > 0.25:
                        output = worker.stdout.readline()
                    time.sleep(rng.uniform(0, 1.5))
                    killed += worker.poll() is None
                    devices = children(worker.pid)
                    worker.send_signal(signal.SIGKILL)
                    assert gone_within(devices, 2), "a device process outlived its parent"
                output += worker.stdout.read()
            computed += output.count("computed")
            done = "done" in output
        assert computed - megabatches <= killed
        delivered += killed
        assert relative_errors(finished_values(project, name, CELLS), expected).max() <= BOUND


def test_sigkill_at_five_moments(project: Project) -> None:
    kill_at_random_moments(project, kills=5, seed=1)


@pytest.mark.soak
def test_sigkill_at_fifty_moments(project: Project) -> None:
    kill_at_random_moments(project, kills=50, seed=2)


def test_sigterm_to_the_command_commits_nothing_partial_and_ends_as_interrupted(project: Project) -> None:
    tiny(project, cells=3000, shards=1)
    assert project.command("release", "add", RELEASE).returncode == 0
    with project.job("tiny") as job:
        total = make_plan(job).totals.megabatches
    log = project.folder / "log"
    with log.open("w") as output:
        worker = project.start_materialize("tiny/shard_embeddings", f"{RELEASE}|0", output)
        deadline = time.monotonic() + 120
        while "cells/s" not in log.read_text():
            assert worker.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        worker.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        code = worker.wait(timeout=60)
    assert time.monotonic() - stopped < 15
    assert code != 0
    with project.job("tiny") as job:
        plan = read_plan(job.store, job.folder.plan)
        rest = embed_shard(job, 0)
    assert 0 < rest.cells_before < rest.cells
    assert rest.megabatches_computed < total
    assert plan.totals.cells == rest.cells_before + rest.cells_computed
    finished_values(project, "tiny", 3000)


def test_two_workers_on_one_shard_slow_and_fast(project: Project) -> None:
    tiny(project, cells=300, shards=1)
    megabatches = add_and_plan(project, "twice")
    workers = [start(project, "twice", pause) for pause in (0.0, 0.2)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert all(output.endswith("done\n") for output in outputs)
    assert [output.count("committed") for output in outputs] == [megabatches, megabatches]
    with project.job("twice") as job:
        summary = finish_array(job)
    assert (summary.fragments, summary.excess_fragments) == (2 * megabatches, megabatches)
    add_and_plan(project, "calm")
    with project.job("calm") as job:
        embed_shard(job, 0)
    expected = finished_values(project, "calm", 300)
    assert relative_errors(finished_values(project, "twice", 300), expected).max() <= BOUND


def set_counts(project: Project, joinids: list[int], factor: float) -> None:
    """Multiply the first count of some cells in the Census itself."""
    uri = str(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw")
    for joinid in joinids:
        with tiledbsoma.open(uri) as array:
            table = array.read(coords=(slice(joinid, joinid),)).tables().concat()
        first = table.slice(0, 1)
        value = first["soma_data"].to_numpy() * factor
        with tiledbsoma.open(uri, "w") as array:
            array.write(first.set_column(2, first.schema.field("soma_data"), [value.astype(np.float32)]))


@pytest.fixture
def poisoned(project: Project) -> Project:
    """A planned project in which one cell of shard 1, that planning did not sample, is no count any more."""
    tiny(project, megabatch_size=8)
    with project.job("tiny") as job:
        make_plan(job)
    set_counts(project, [77], 0.5)
    return project


def test_a_poisoned_megabatch_is_set_aside_and_completed_later(poisoned: Project) -> None:
    with poisoned.job("tiny") as job:
        plan = read_plan(job.store, job.folder.plan)
        (batch,) = [one for one in plan.megabatches if one.first <= 77 <= one.last]
        with pytest.raises(SetAsideError) as caught:
            embed_shard(job, batch.shard)
        assert [one.batch for one in caught.value.failed] == [batch]
        assert f"megabatch {batch.index} (joinids {batch.first} to {batch.last}, 8 cells)" in str(caught.value)
        assert "have other counts in X/raw than obs.nnz says, joinids [77]" in str(caught.value)
        for shard in {0, 1, 2, 3} - {batch.shard}:
            embed_shard(job, shard)
        with pytest.raises(Exception, match="1 of 4 shards have not finished"):
            finish_array(job)
    mend(poisoned)
    with poisoned.job("tiny") as job:
        again = embed_shard(job, batch.shard)
        assert again.megabatches_computed == 1
    finished_values(poisoned, "tiny", 200)


def mend(project: Project) -> None:
    """Remove the poisoned cell's changed value: fragments of the Census that came last."""
    uri = project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw"
    newest = max((uri / "__fragments").iterdir(), key=lambda path: int(path.name.split("_")[2]))
    commit = uri / "__commits" / f"{newest.name}.wrt"
    commit.unlink()


def test_a_recomputation_that_was_set_aside_says_how_to_go_on(poisoned: Project) -> None:
    with poisoned.job("tiny") as job:
        plan = read_plan(job.store, job.folder.plan)
        (shard,) = {batch.shard for batch in plan.megabatches if batch.first <= 77 <= batch.last}
        with pytest.raises(SetAsideError, match=r"again with `recompute: true`"):
            embed_shard(job, shard, recompute=True)


def test_a_fault_of_all_cells_stops_early(project: Project) -> None:
    tiny(project, megabatch_size=4, shards=1)
    with project.job("tiny") as job:
        make_plan(job)
    set_counts(project, list(range(1, 200, 4)), 0.5)
    with project.job("tiny") as job, pytest.raises(SetAsideError, match="were not tried any more") as caught:
        embed_shard(job, 0)
    assert len(caught.value.failed) == MOST_SET_ASIDE


def test_an_unreachable_census_fails_at_once(project: Project) -> None:
    tiny(project)
    with project.job("tiny") as job:
        make_plan(job)
        fragments = Path(job.release.counts.uri.removeprefix("file://")) / "__fragments"
        for file in fragments.rglob("*.tdb"):
            file.write_bytes(b"")
        with pytest.raises(Exception) as caught:  # noqa: PT011
            embed_shard(job, 0)
    assert not isinstance(caught.value, SetAsideError)
