"""Workers that die, stop, or run twice; and megabatches that cannot be embedded."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pytest

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.census import Organism
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.embed_shard import MOST_SET_ASIDE, SetAsideError, embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array, verify_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.write_notes import read_notes
from tests.support.builders import tiny
from tests.support.census_edits import rewrite, set_counts
from tests.support.overflowing import OVERFLOWS_FP16, OVERFLOWS_FP32, build_overflowing
from tests.support.processes import children, gone_within
from tests.support.project import BOUND, RELEASE, REPOSITORY, Project, read_array, relative_errors
from tests.support.warm_processes import WarmProcess

pytestmark = pytest.mark.takes(90)

CELLS = 400


def start(project: Project, name: str = "tiny", pause: float = 0.0) -> WarmProcess:
    arguments = [str(project.folder), name, "0", str(pause)]
    return WarmProcess("tests.support.shard_driver", arguments, REPOSITORY, os.environ)


def add_and_plan(project: Project, name: str) -> int:
    """Declare another set on the same cells, with its own array; return its number of megabatches."""
    project.add_set(name, organism="homo_sapiens", shards=1, megabatch_size=16)
    with project.context(name) as context:
        return make_plan(context).totals.megabatches


def finished_values(project: Project, name: str, cells: int) -> np.ndarray:
    """Finish a set and read it back: every cell once, with all its values."""
    with project.context(name) as context:
        finish_array(context)
    stored = read_array(project.array(name), project.folder)
    assert np.array_equal(stored.ids, np.arange(cells))
    assert stored.stored_values == cells * 16
    return stored.values


def kill_at_random_moments(project: Project, kills: int, seed: int) -> None:
    tiny(project, cells=CELLS, shards=1)
    add_and_plan(project, "calm")
    with project.context("calm") as context:
        embed_shard(context, 0)
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
                assert worker.stdout.readline() == "started\n"
                output = ""
                if delivered + killed < kills:
                    # One in four workers is killed while the device process starts, the others while all stages work.
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


@pytest.mark.usefixtures("real_devices")
def test_sigkill_at_five_moments(project: Project) -> None:
    kill_at_random_moments(project, kills=5, seed=1)


@pytest.mark.soak
@pytest.mark.usefixtures("real_devices")
def test_sigkill_at_fifty_moments(project: Project) -> None:
    kill_at_random_moments(project, kills=50, seed=2)


def test_sigterm_to_the_command_commits_nothing_partial_and_ends_as_interrupted(project: Project) -> None:
    tiny(project, cells=3000, shards=1)
    assert project.command("release", "add", RELEASE).returncode == 0
    with project.context("tiny") as context:
        total = make_plan(context).totals.megabatches
    with project.start_materialize("tiny/shard_embeddings", f"{RELEASE}|0") as worker:
        worker.until_it_logs("cells/s")
        worker.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        code = worker.wait(timeout=60)
    assert time.monotonic() - stopped < 15
    assert code != 0
    with project.context("tiny") as context:
        plan = read_plan(context.store, context.folder.plan)
        rest = embed_shard(context, 0)
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
    with project.context("twice") as context:
        summary = finish_array(context)
    assert (summary.fragments, summary.excess_fragments) == (2 * megabatches, megabatches)
    add_and_plan(project, "calm")
    with project.context("calm") as context:
        embed_shard(context, 0)
    expected = finished_values(project, "calm", 300)
    assert relative_errors(finished_values(project, "twice", 300), expected).max() <= BOUND


@pytest.fixture
def with_bad_cell(project: Project) -> Project:
    """Plan a project; then make a count impossible in a cell of shard 1 that planning did not sample."""
    tiny(project, megabatch_size=8)
    with project.context("tiny") as context:
        make_plan(context)
    set_counts(project, [77], -1.0)
    return project


def listed(context: ReleaseContext) -> pd.DataFrame:
    """Read the consumers' list."""
    return pd.read_parquet(context.folder.obs_ids).set_index("soma_joinid")


def test_a_bad_cell_is_set_aside_and_all_others_are_there(with_bad_cell: Project) -> None:
    with with_bad_cell.context("tiny") as context:
        plan = read_plan(context.store, context.folder.plan)
        (batch,) = [one for one in plan.megabatches if one.first <= 77 <= one.last]
        summary = embed_shard(context, batch.shard)
        assert summary.verified
        assert summary.cells_computed == summary.cells - 1
        (reason,) = summary.set_aside.values()
        assert re.fullmatch(r"X/raw holds -\d+\.0, which is not a count", reason)
        assert embed_shard(context, batch.shard).megabatches_computed == 0
        for shard in {0, 1, 2, 3} - {batch.shard}:
            assert embed_shard(context, shard).set_aside == {}
        finished = finish_array(context)
        assert (finished.cells, finished.set_aside) == (199, {77: reason})
        record = EmbeddingsArray.open(context.folder.array, context.store, context.identity).read_record()
        assert (record["cells"], record["cells_set_aside"], record["set_aside"]) == (199, 1, [[reason, 1]])
        assert listed(context)["set_aside"].dropna().to_dict() == {77: reason}
        assert all(not one.wrong for one in verify_array(context, full=True))
    stored = read_array(with_bad_cell.array("tiny"), with_bad_cell.folder)
    assert np.array_equal(stored.ids, np.setdiff1d(np.arange(200), [77]))

    set_counts(with_bad_cell, [77], -1.0)
    with with_bad_cell.context("tiny") as context:
        assert embed_shard(context, batch.shard).set_aside == {77: reason}
        assert embed_shard(context, batch.shard, recompute=True).set_aside == {}
        finished_values(with_bad_cell, "tiny", 200)
        assert listed(context)["set_aside"].isna().all()


@pytest.mark.parametrize(
    ("gain", "precision", "reason"),
    [
        (OVERFLOWS_FP16, "fp16", None),
        (OVERFLOWS_FP32, "bf16", "Its embedding is not finite in bf16, nor in fp32."),
    ],
)
def test_cells_that_leave_the_range_are_computed_wider_or_set_aside_alone(
    project: Project, gain: float, precision: str, reason: str | None
) -> None:
    made: list[Organism] = []
    tiny(project, shards=1, compute_precision=precision, change=made.append)
    genes, counts = made[0].genes["feature_id"].tolist(), made[0].counts.tocsc()
    # The checkpoint knows all genes but the first six.
    rare = min(range(6, len(genes)), key=lambda gene: abs(counts[:, gene].nnz - 5))
    hot = np.sort(counts[:, rare].indices).tolist()
    assert 0 < len(hot) < 20
    shutil.rmtree(project.checkpoint)
    sizes = {"embed_dim": 32, "num_heads": 2, "seq_len": 63, "block_len": 64}
    build_overflowing(project.checkpoint, genes[6:], KNOWN_ASSAYS, genes[rare], gain, **sizes)
    with project.context("tiny") as context:
        make_plan(context)
        summary = embed_shard(context, 0)
        assert summary.cells_widened == (0 if reason else len(hot))
        assert summary.set_aside == (dict.fromkeys(hot, reason) if reason else {})
        assert finish_array(context).cells == 200 - len(summary.set_aside)
        assert listed(context)["set_aside"].dropna().to_dict() == summary.set_aside
        plan = read_plan(context.store, context.folder.plan)
        notes = [note for some in read_notes(context.store, context.folder, plan, [0]).values() for note in some]
    assert sorted(joinid for note in notes for joinid in note.widened) == ([] if reason else hot)
    stored = read_array(project.array("tiny"), project.folder)
    assert np.array_equal(stored.ids, np.setdiff1d(np.arange(200), list(summary.set_aside)))


def test_several_faults_together_end_in_a_right_array(project: Project) -> None:
    """Bad cells, a killed worker, a lost file and a stray value occur before and after a daemon's retry."""
    tiny(project, cells=CELLS, shards=1)
    add_and_plan(project, "calm")
    with project.context("calm") as context:
        embed_shard(context, 0)
    expected = finished_values(project, "calm", CELLS)
    add_and_plan(project, "story")
    bad = [17, 18, 200, 399]
    set_counts(project, bad, -1.0)
    with start(project, "story", pause=0.02) as worker:
        assert worker.stdout is not None
        while "committed" not in worker.stdout.readline():
            assert worker.poll() is None
        worker.send_signal(signal.SIGKILL)
    with project.context("story") as context:
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        first = array.fragments()[0]
        (Path(context.folder.array) / "__fragments" / first.name / "a0.tdb").unlink()
        array.write(np.array([first.first]), np.full((1, 16), 0.5, np.float32))
        summary = embed_shard(context, 0)
        assert summary.set_aside.keys() == set(bad)
        # The damaged fragment is removed, and it held everything that was committed before the kill.
        assert summary.cells_before == 0
        assert finish_array(context).cells == CELLS - len(bad)
        assert all(not one.wrong for one in verify_array(context, full=True))
    stored = read_array(project.array("story"), project.folder)
    kept = np.setdiff1d(np.arange(CELLS), bad)
    assert np.array_equal(stored.ids, kept)
    assert relative_errors(stored.values, expected[kept]).max() <= BOUND


@pytest.mark.parametrize(("fractional_counts", "set_aside"), [("embed", set()), ("set_aside", {77})])
def test_fractions_are_embedded_as_upstream_does_or_set_aside(
    project: Project, fractional_counts: str, set_aside: set[int]
) -> None:
    tiny(project, megabatch_size=8, fractional_counts=fractional_counts)
    set_counts(project, [77], 0.3)
    with project.context("tiny") as context:
        make_plan(context)
        (batch,) = [
            one for one in read_plan(context.store, context.folder.plan).megabatches if one.first <= 77 <= one.last
        ]
        summary = embed_shard(context, batch.shard)
        assert summary.set_aside.keys() == set_aside
        assert summary.cells_fractional == 1 - len(set_aside)


def test_a_fault_of_most_cells_stops_early(project: Project) -> None:
    tiny(project, megabatch_size=16, shards=1)
    with project.context("tiny") as context:
        make_plan(context)
    set_counts(project, list(range(200)), -1.0)
    with project.context("tiny") as context, pytest.raises(SetAsideError) as caught:
        embed_shard(context, 0)
    assert f"at most {MOST_SET_ASIDE} of its 200" in str(caught.value)
    assert caught.value.details[0].startswith("joinid ")
    with project.context("tiny") as context:
        assert len(EmbeddingsArray.open(context.folder.array, context.store, context.identity).fragments()) == 0


def test_a_megabatch_that_cannot_be_read_at_all_fails_and_the_others_are_committed(project: Project) -> None:
    tiny(project, megabatch_size=8)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
    obs = project.census / "census_data" / "homo_sapiens" / "obs"
    rewrite(obs, lambda table: table.filter(pa.compute.not_equal(table["soma_joinid"], 77)))
    (batch,) = [one for one in plan.megabatches if one.first <= 77 <= one.last]
    with project.context("tiny") as context:
        with pytest.raises(
            SetAsideError, match=r"1 megabatches failed on 2 tries each, and all others are committed"
        ) as caught:
            embed_shard(context, batch.shard)
        assert caught.value.details[0].startswith(f"megabatch {batch.index} (joinids {batch.first} to {batch.last}, 8 ")
        assert "e.g. joinids [77]" in caught.value.details[0]
        with pytest.raises(SetAsideError, match="`recompute: true`"):
            embed_shard(context, batch.shard, recompute=True)
        with pytest.raises(Exception, match="4 of 4 shards have not finished"):
            finish_array(context)


def test_an_unreachable_census_fails_at_once(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        fragments = Path(context.release.counts.uri.removeprefix("file://")) / "__fragments"
        for file in fragments.rglob("*.tdb"):
            file.write_bytes(b"")
        with pytest.raises(Exception) as caught:  # noqa: PT011
            embed_shard(context, 0)
    assert not isinstance(caught.value, SetAsideError)
