"""Runs whose worker is gone, retries that were lost, and a deployment whose processes are all killed at once."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from dagster._core.execution.asset_backfill import backfill_runs_are_complete
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.utils import make_new_run_id
from dagster._daemon.auto_run_reexecution.event_log_consumer import _create_cursor_key

from census_tf_dagster.config.dagster_names import LOST_RUNS, RETRIED_BY_TAG, SHARDS, WILL_RETRY_TAG
from census_tf_dagster.demo.run import INSTANCE
from census_tf_dagster.io.worker_process import WORKER_TAG, WorkerProcess
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.observations import ShardProgress
from census_tf_dagster.operate.remote_set import find_set
from census_tf_dagster.operate.runs import Run, fetch_runs
from census_tf_dagster.operate.stuck_runs import why_stuck
from census_tf_dagster.orchestration.sensors import lost_runs
from census_tf_dagster.orchestration.sensors.lost_runs import (
    MOST_ASKED,
    ask_for_lost_retries,
    build_lost_runs,
    end_lost_runs,
    marking_executor,
)
from tests.support.builders import tiny
from tests.support.deployment import Operator, running, until
from tests.support.project import RELEASE, Project, read_array

pytestmark = pytest.mark.takes(270)

HOLD = "import sys; print('here', flush=True); sys.stdin.read()"


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance on disk that retries runs."""
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"run_retries": {"enabled": True, "max_retries": 3}}))
    with dg.DagsterInstance.from_config(str(tmp_path)) as found:
        yield found


def worker_of(run: str, process: subprocess.Popen[bytes]) -> WorkerProcess:
    """Return the record of another process."""
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(WorkerProcess.this(run), pid=process.pid, started=ticks)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is there until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as found:
        assert found.stdout is not None
        assert found.stdout.readline() == b"here\n"
        yield found
        found.kill()


def test_a_process_is_known_by_more_than_its_number(process: subprocess.Popen[bytes]) -> None:
    worker = worker_of("a", process)
    assert WorkerProcess.this("a").alive() is True
    assert worker.alive() is True
    process.send_signal(signal.SIGSTOP)
    assert worker.alive() is True
    assert replace(worker, started="1").alive() is False
    assert replace(worker, boot="before the reboot").alive() is False
    elsewhere = [{"host": "other"}, {"machine": "other"}, {"namespace": "other"}, {"boot": ""}]
    assert [replace(worker, **change).alive() for change in elsewhere] == [None] * 4
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert worker.alive() is False, "a zombie works no more"
    process.wait()
    assert worker.alive() is False


def test_a_retry_is_not_taken_for_its_parents_worker() -> None:
    worker = WorkerProcess.this("parent")
    assert WorkerProcess.of("parent", worker.tags()) == worker
    assert WorkerProcess.of("retry", worker.tags()) is None
    assert WorkerProcess.of("demo", WorkerProcess.this("").tags()) is not None
    for broken in ({}, {WORKER_TAG: ""}, {WORKER_TAG: "[]"}, {WORKER_TAG: '{"run": "x"}'}):
        assert WorkerProcess.of("x", broken) is None


@dg.op
def ask_who_works(context: dg.OpExecutionContext) -> None:
    run = context.instance.get_run_by_id(context.run_id)
    assert run is not None
    worker = WorkerProcess.of(run.run_id, run.tags)
    assert worker is not None
    assert (worker.pid, worker.alive()) == (os.getpid(), True)


@dg.job(executor_def=marking_executor)
def asking() -> None:
    ask_who_works()


def test_a_run_names_its_worker_and_ends_as_it_should(instance: dg.DagsterInstance) -> None:
    with dg.execute_job(dg.reconstructable(asking), instance, raise_on_error=True) as result:
        assert result.success
    assert not list(end_lost_runs(instance))


def test_only_a_run_whose_worker_is_gone_is_ended(
    instance: dg.DagsterInstance, process: subprocess.Popen[bytes]
) -> None:
    def add(run: str, status: dg.DagsterRunStatus, worker: WorkerProcess | None) -> str:
        tags = worker.tags() if worker else {}
        return instance.create_run_for_job(asking, run_id=run, status=status, tags=tags).run_id

    (lost, ended_by_hand, retry, elsewhere, unknown) = (make_new_run_id() for _ in range(5))
    add(lost, dg.DagsterRunStatus.STARTED, worker_of(lost, process))
    add(ended_by_hand, dg.DagsterRunStatus.CANCELING, worker_of(ended_by_hand, process))
    add(retry, dg.DagsterRunStatus.STARTED, worker_of(lost, process))
    add(elsewhere, dg.DagsterRunStatus.STARTED, replace(worker_of(elsewhere, process), host="other"))
    add(unknown, dg.DagsterRunStatus.STARTED, None)
    assert not list(end_lost_runs(instance))
    process.kill()
    process.wait()
    assert len(list(end_lost_runs(instance))) == 2
    statuses = {run.run_id: run.status.value for run in instance.get_runs()}
    assert (statuses[lost], statuses[ended_by_hand]) == ("FAILURE", "CANCELED")
    assert {statuses[run] for run in (retry, elsewhere, unknown)} == {"STARTED"}
    found = instance.get_run_by_id(lost)
    assert found is not None
    assert found.tags[WILL_RETRY_TAG] == "true"
    assert not list(end_lost_runs(instance))


def lose_retry(instance: dg.DagsterInstance, backfill: str) -> str:
    """Create a failed run whose retry is announced, without a daemon that reads it."""
    run = instance.create_run_for_job(asking, status=dg.DagsterRunStatus.STARTED, tags={"dagster/backfill": backfill})
    instance.report_run_failed(run)
    return run.run_id


def add_backfill(instance: dg.DagsterInstance, name: str, status: BulkActionStatus) -> None:
    backfill = PartitionBackfill(
        backfill_id=name, status=status, from_failure=False, tags={}, backfill_timestamp=time.time(), partition_names=[]
    )
    instance.add_backfill(backfill)


def failures(instance: dg.DagsterInstance, run: str) -> int:
    return len(instance.all_logs(run, of_type=dg.DagsterEventType.RUN_FAILURE))


def test_a_lost_retry_is_asked_for_until_it_comes_or_never_will(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backfill(instance, "running", BulkActionStatus.REQUESTED)
    run = lose_retry(instance, "running")
    # What makes Dagster's backfill wait for ever.
    assert not backfill_runs_are_complete("running", instance, logging.getLogger())
    assert not list(ask_for_lost_retries(instance)), "it is not late yet"
    monkeypatch.setattr(lost_runs, "OWED_SECONDS", 0.0)
    for asked in range(MOST_ASKED):
        assert failures(instance, run) == 1 + asked
        (line,) = ask_for_lost_retries(instance)
        assert "was requested again" in line
    (line,) = ask_for_lost_retries(instance)
    assert "it will not be retried any more" in line
    assert failures(instance, run) == 1 + MOST_ASKED
    assert backfill_runs_are_complete("running", instance, logging.getLogger())
    assert not list(ask_for_lost_retries(instance))


def test_no_retry_is_asked_for_that_was_made_or_that_nobody_waits_for(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_runs, "OWED_SECONDS", 0.0)
    add_backfill(instance, "running", BulkActionStatus.REQUESTED)
    add_backfill(instance, "ended", BulkActionStatus.CANCELED)
    made = lose_retry(instance, "running")
    instance.add_run_tags(made, {RETRIED_BY_TAG: make_new_run_id()})
    lone = [lose_retry(instance, name) for name in ("ended", "deleted")]
    assert len(list(ask_for_lost_retries(instance))) == 2
    assert [failures(instance, run) for run in (made, *lone)] == [1, 1, 1]
    assert not list(ask_for_lost_retries(instance))


def test_the_sensor_says_what_it_found(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    (sensor,) = build_lost_runs().sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    monkeypatch.setattr(lost_runs, "OWED_SECONDS", 0.0)
    said = []
    for _ in range(2):
        with dg.build_sensor_context(instance) as context:
            said.append(sensor.evaluate_tick(context).skip_message)
        if len(said) == 1:
            run = lose_retry(instance, "deleted")
    assert said == ["nothing was lost", f"run {run}: it will not be retried any more"]


def running_run(worker: WorkerProcess | None, asset: str = SHARDS) -> Run:
    """Return a run that has been running for an hour."""
    hour = time.time() - 3600
    return Run("a", asset, f"{RELEASE}|0", "STARTED", hour, hour, None, hour, recompute=False, worker=worker)


def test_a_silent_run_is_shown_where_its_worker_cannot_be_seen() -> None:
    here = WorkerProcess.this("a")
    elsewhere = replace(here, host="other")
    assert why_stuck(running_run(here), None) is None
    lost = why_stuck(running_run(replace(here, started="1")), None)
    assert lost == (f"has lost its worker (process {os.getpid()} on {here.host})", True)
    silent = why_stuck(running_run(elsewhere), None)
    assert silent is not None
    assert silent[0].startswith("has reported nothing for 60 min, and its worker (process ")
    assert silent[1] is False
    assert why_stuck(running_run(None), ShardProgress(1, 1.0, "read", time.time() - 2000)) is not None
    assert why_stuck(running_run(elsewhere), ShardProgress(1, 1.0, "read", time.time())) is None
    assert why_stuck(running_run(elsewhere, "embeddings_array"), None) is None


CELLS = 160
START = "mutation Start($selector: SensorSelector!) { startSensor(sensorSelector: $selector) { __typename } }"
STOP = "mutation Stop($id: String!) { stopSensor(id: $id) { __typename } }"
SENSOR_ID = """query Id($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) { ... on Sensor { sensorState { id } } }
}"""


@dataclass
class Story:
    """A machine stops in the middle of a release, and this is what an operator sees afterwards."""

    operator: Operator
    status: dict[str, Any]
    shown: str
    refused: subprocess.CompletedProcess[str]
    launched: tuple[int, str]


def kill_everything(operator: Operator) -> None:
    """What a reboot does: webserver, daemon, code servers and workers end at once."""
    servers = [psutil.Process(server.pid) for server in operator.servers.values()]
    everything = [one for server in servers for one in (*server.children(recursive=True), server)]
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    for server in operator.servers.values():
        server.wait()
    assert not psutil.wait_procs(everything, timeout=20)[1]
    operator.servers.clear()


def lose_the_retry_of(operator: Operator, run: str) -> None:
    """Fail a run as Dagster does, as if Dagster's daemon had read it a moment too early."""
    with dg.DagsterInstance.from_config(operator.project.env["DAGSTER_HOME"]) as instance:
        found = instance.get_run_by_id(run)
        assert found is not None
        instance.report_run_failed(found)
        last = instance.event_log_storage.get_maximum_record_id()
        instance.daemon_cursor_storage.set_cursor_values(
            {_create_cursor_key(dg.DagsterEventType.RUN_FAILURE): str(last)}
        )


def switch(operator: Operator, *, on: bool) -> None:
    """Switch the sensor on or off, as the web interface does."""
    deployment = Deployment.at(operator.url)
    selector = {
        "repositoryLocationName": operator.module,
        "repositoryName": "__repository__",
        "sensorName": LOST_RUNS,
    }
    if on:
        answer = deployment.ask(START, selector=selector)["startSensor"]
        expect(answer, "Sensor", "switching on")
    else:
        found = deployment.ask(SENSOR_ID, selector=selector)["sensorOrError"]["sensorState"]["id"]
        expect(deployment.ask(STOP, id=found)["stopSensor"], "StopSensorMutationResult", "switching off")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    project = tiny(Project(tmp_path_factory.mktemp("lost")), cells=CELLS, shards=2, megabatch_size=1)
    home = Path(project.env["DAGSTER_HOME"])
    (home / "dagster.yaml").write_text(INSTANCE.replace("max_concurrent_runs: 1", "max_concurrent_runs: 2"))
    assert project.command("release", "add", RELEASE).returncode == 0
    planned = project.materialize("tiny/obs_id_plan", RELEASE)
    assert planned.returncode == 0, planned.stderr[-3000:]
    with running(project, daemon=True) as operator:
        launched = operator.begin("launched", "launch", "tiny", RELEASE, "--shards", "0-1")
        launched.says("launched backfill")
        deployment = Deployment.at(operator.url)
        of = find_set(deployment, "tiny")

        def shards_at_work() -> dict[int, str]:
            runs = fetch_runs(deployment, of, {"statuses": ["STARTED"]})
            return {run.shard: run.id for run in runs if run.asset == SHARDS}

        fragments = project.array("tiny") / "__fragments"
        until(lambda: len(shards_at_work()) == 2 and len(list(fragments.iterdir())) > 1, "two shards at work")
        runs = shards_at_work()
        kill_everything(operator)
        lose_the_retry_of(operator, runs[1])
        operator.serve("dagster-webserver")
        until(operator.answers, "the webserver again")
        status, shown = operator.status("tiny"), operator.command("status", "tiny", RELEASE).stdout
        switch(operator, on=False)
        refused = operator.command("launch", "tiny", RELEASE, "--shards", "1")
        switch(operator, on=True)
        operator.serve("dagster-daemon")
        yield Story(operator, status, shown, refused, launched.end())


def test_a_release_survives_that_its_machine_restarts(story: Story, tmp_path: Path) -> None:
    code, said = story.launched
    assert code == 0, said
    project = story.operator.project
    array = read_array(project.array("tiny"), tmp_path)
    assert array.ids.tolist() == list(range(CELLS))
    assert array.stored_values == CELLS * 16
    runs = story.operator.runs()
    assert [runs["tiny/shard_embeddings", f"{RELEASE}|{shard}"] for shard in (0, 1)] == [2, 2]
    # What the lost workers had committed was not computed again.
    assert len(list((project.array("tiny") / "__fragments").iterdir())) <= CELLS + 2
    assert story.operator.status("tiny")["stuck"] == []


def test_status_shows_stuck_runs_and_what_repairs_them(story: Story) -> None:
    lost, owed = sorted(story.status["stuck"], key=lambda one: str(one["partition"]))
    assert (lost["partition"], owed["partition"]) == (f"{RELEASE}|0", f"{RELEASE}|1")
    assert lost["why"].startswith("has lost its worker (process ")
    assert "the retry that Dagster announced has not started" in owed["why"]
    assert f"  stuck   shard_embeddings {RELEASE}|0 has lost its worker" in story.shown
    assert "  repair  the sensor lost_runs repairs this within minutes\n" in story.shown
    assert "  again   " not in story.shown, "a launch of the shard would only wait, too"


def test_a_launch_does_not_wait_for_a_run_that_nothing_repairs(story: Story) -> None:
    assert story.refused.returncode == 1
    assert "is stuck, and nothing repairs it: shard_embeddings" in story.refused.stderr
    assert "switch on the sensor lost_runs" in story.refused.stderr


def test_a_running_launch_reports_stuck_runs(story: Story) -> None:
    assert " stuck (`status` says why)" in story.launched[1]
