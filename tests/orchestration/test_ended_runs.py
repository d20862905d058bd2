"""A worker whose run was ended without it stops after a megabatch, and reports nothing more."""

from collections.abc import Callable, Iterator

import dagster as dg
import pytest

from census_tf_dagster.orchestration.asset_support import RUN_IS_OVER
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project

CELLS = 2000
End = Callable[[dg.DagsterInstance, dg.DagsterRun], object]


@pytest.fixture
def planned(project: Project) -> Project:
    tiny(project, cells=CELLS, shards=1, megabatch_size=4)
    assert project.command("release", "add", RELEASE).returncode == 0
    with project.context("tiny") as context:
        make_plan(context)
    return project


@pytest.fixture
def instance(planned: Project) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(planned.folder / "dagster_home")) as found:
        yield found


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda instance, run: instance.report_run_failed(run, "its node seems to be lost"), "FAILURE"),
        (lambda instance, run: instance.report_run_canceled(run, "canceled by force"), "CANCELED"),
    ],
)
def test_a_worker_whose_run_was_ended(planned: Project, instance: dg.DagsterInstance, end: End, status: str) -> None:
    with planned.start_materialize("tiny/shard_embeddings", f"{RELEASE}|0") as worker:
        worker.until_it_logs("cells/s")
        (run,) = instance.get_runs()
        end(instance, run)
        with planned.context("tiny") as context:
            array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
            before = len(array.fragments())
            assert worker.wait(timeout=60) == RUN_IS_OVER
            # The one that was being written and, as reading the fragments took a moment, a few more.
            assert len(array.fragments()) <= before + 20 < CELLS / 4
        said = worker.errors.read_text()
    assert f"Run {run.run_id} has ended ({status}) without this worker, so the worker stops." in said
    (run,) = instance.get_runs()
    assert run.status.value == status
    wanted = {dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED, dg.DagsterEventType.STEP_FAILURE}
    ends = list(instance.all_logs(run.run_id, of_type=wanted))
    assert len(ends) == 1
