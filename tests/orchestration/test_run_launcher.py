"""On Kubernetes, one error of the API loses no worker, and no Job outlives its run."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.events import RunFailureReason
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.storage.tags import RUN_FAILURE_REASON_TAG
from dagster._daemon.monitoring import run_monitoring
from dagster_k8s.job import get_job_name_from_run_id

from census_tf_dagster.orchestration.sensors import lost_runs
from census_tf_dagster.orchestration.sensors.lost_runs import build_lost_runs, delete_jobs_left_behind
from census_tf_dagster.run_coordinator import lost_nodes
from tests.support.helm_chart import instance_of
from tests.support.k8s_deployment import CONTROL_IMAGE, read_values
from tests.support.k8s_double import KubernetesDouble, eks_node, outside_of_the_cluster, serving
from tests.support.launching import job
from tests.support.placements import PLACEMENT, TAGS

FITS = "g6e.2xlarge"
LABELS = PLACEMENT["kubernetes"]["nodes"]["spot"]["node_selector"]


@dataclass
class Deployment:
    """A Dagster instance with the launcher of deploy/k8s, and the cluster."""

    instance: dg.DagsterInstance
    cluster: KubernetesDouble

    def launch(self, status: dg.DagsterRunStatus) -> dg.DagsterRun:
        """Launch a run with a shard's placement, which waits for its node or has begun."""
        origin = RepositoryPythonOrigin("python", ModuleCodePointer("census_tf_dagster", "defs"), CONTROL_IMAGE)
        tags = {"dagster-k8s/config": TAGS["dagster-k8s/config"]}
        run = self.instance.create_run_for_job(
            job, status=status, tags=tags, job_code_origin=JobPythonOrigin("job", origin)
        )
        if status == dg.DagsterRunStatus.NOT_STARTED:
            self.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
        else:
            self.instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
        return run

    def monitor(self) -> None:
        """Let Dagster's run monitoring look at all runs once."""
        process: Any = SimpleNamespace(instance=self.instance, create_request_context=lambda: None)
        errors = run_monitoring.execute_run_monitoring_iteration(process, logging.getLogger())
        assert not any(errors)

    def status(self, run: dg.DagsterRun) -> str:
        found = self.instance.get_run_by_id(run.run_id)
        assert found is not None
        return found.status.value


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    cluster = KubernetesDouble()
    with serving(cluster) as address:
        whole = instance_of(read_values())
        config = {name: whole[name] for name in ("run_launcher", "run_monitoring", "run_retries", "telemetry")}
        config["run_launcher"]["config"] |= outside_of_the_cluster(tmp_path, address)
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(config))
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            yield Deployment(instance, cluster)


@pytest.fixture
def a_minute_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers have had the time to exit after the end of their runs."""
    monkeypatch.setattr(lost_runs, "LINGER_SECONDS", 0.0)


def time_out(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run monitoring look an hour later."""
    now = run_monitoring.get_current_timestamp
    with monkeypatch.context() as patch:
        patch.setattr(run_monitoring, "get_current_timestamp", lambda: now() + 3600)
        deployment.monitor()


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.usefixtures("a_minute_later")
def test_a_job_that_waited_too_long_never_starts(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, looked: bool
) -> None:
    run = deployment.launch(dg.DagsterRunStatus.NOT_STARTED)
    name = get_job_name_from_run_id(run.run_id)
    deployment.monitor()
    assert deployment.status(run) == "STARTING"
    time_out(deployment, monkeypatch)
    ended = deployment.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE
    assert ended.tags[RUN_FAILURE_REASON_TAG] == RunFailureReason.START_TIMEOUT.value
    # Dagster leaves the Job behind.
    assert list(deployment.cluster.jobs) == [name]
    if looked:
        (sensor,) = build_lost_runs().sensors or ()
        assert isinstance(sensor, dg.SensorDefinition)
        with dg.build_sensor_context(deployment.instance) as context:
            said = [sensor.evaluate_tick(context).skip_message for _ in range(2)]
        assert said == [f"run {run.run_id} has ended, so its Job {name} was deleted", "nothing was lost"]
        assert (deployment.cluster.jobs, deployment.cluster.pods) == ({}, {})
    deployment.cluster.add_node(eks_node(FITS, LABELS))
    assert deployment.cluster.started == ([] if looked else [name])


@pytest.mark.parametrize("waited", [False, True])
def test_a_node_that_was_lost_or_did_not_come_counts(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, waited: bool
) -> None:
    run = deployment.launch(dg.DagsterRunStatus.NOT_STARTED if waited else dg.DagsterRunStatus.STARTED)
    if waited:
        time_out(deployment, monkeypatch)
    else:
        deployment.cluster.end(get_job_name_from_run_id(run.run_id), succeeded=False)
        deployment.monitor()
    assert deployment.status(run) == "FAILURE"
    names = {"root_run_id": run.run_id, "parent_run_id": run.run_id}
    tags = {f"dagster/{name}": value for name, value in names.items()}
    retry = deployment.instance.create_run_for_job(job, tags=tags, **names)
    assert lost_nodes(deployment.instance, retry) == 1


@pytest.mark.usefixtures("a_minute_later")
def test_only_jobs_whose_run_has_ended_are_deleted(deployment: Deployment) -> None:
    cluster, instance = deployment.cluster, deployment.instance
    begun, started, canceled, finished = (deployment.launch(dg.DagsterRunStatus.STARTED) for _ in range(4))
    waiting = deployment.launch(dg.DagsterRunStatus.NOT_STARTED)
    of_others = deployment.launch(dg.DagsterRunStatus.STARTED)
    instance.delete_run(of_others.run_id)
    assert not list(delete_jobs_left_behind(instance))
    cluster.end(get_job_name_from_run_id(finished.run_id), succeeded=False)
    instance.report_run_failed(finished)
    instance.report_run_failed(begun)
    instance.report_run_canceled(canceled)
    assert len(list(delete_jobs_left_behind(instance))) == 2
    kept = {get_job_name_from_run_id(run.run_id) for run in (started, finished, waiting, of_others)}
    assert cluster.jobs.keys() == kept


@pytest.mark.usefixtures("a_minute_later")
@pytest.mark.parametrize("reached", [True, False])
def test_a_cancellation_ends_the_job(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, reached: bool) -> None:
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    deployment.cluster.resets = 0 if reached else math.inf
    deployment.instance.run_launcher.terminate(run.run_id)
    deployment.cluster.resets = 0
    assert deployment.status(run) == "CANCELING"
    assert len(deployment.cluster.jobs) == len(deployment.cluster.pods) == (not reached)
    monkeypatch.setattr(run_monitoring, "time", SimpleNamespace(time=lambda: time.time() + 300))
    deployment.monitor()
    assert deployment.status(run) == "CANCELED"
    assert len(list(delete_jobs_left_behind(deployment.instance))) == (not reached)
    assert (deployment.cluster.jobs, deployment.cluster.pods) == ({}, {})


def test_a_worker_has_time_to_exit(deployment: Deployment) -> None:
    deployment.cluster.add_node(eks_node(FITS, LABELS))
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    deployment.instance.report_run_failed(run)
    assert not list(delete_jobs_left_behind(deployment.instance))
    assert len(deployment.cluster.jobs) == 1


@pytest.mark.usefixtures("a_minute_later")
def test_a_job_that_cannot_be_deleted_is_tried_again(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    deployment.instance.report_run_failed(run)
    deployment.cluster.resets = math.inf
    (said,) = delete_jobs_left_behind(deployment.instance)
    assert "the Jobs cannot be listed" in said
    deployment.cluster.resets = 0
    with monkeypatch.context() as patch:
        patch.setattr(deployment.cluster, "_delete", None)
        (said,) = delete_jobs_left_behind(deployment.instance)
    assert "cannot be deleted" in said
    (said,) = delete_jobs_left_behind(deployment.instance)
    assert "was deleted" in said


def test_one_unknown_look_fails_no_run(deployment: Deployment) -> None:
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    # The client itself repeats a request three times, so it survives the first. The others are not in a row.
    for resets in (1, math.inf, math.inf):
        deployment.cluster.resets = resets
        deployment.monitor()
        deployment.cluster.resets = 0
        deployment.monitor()
        assert deployment.status(run) == "STARTED"


@pytest.mark.parametrize("how", ["reset", "not found"])
def test_two_unknown_looks_fail_the_run(deployment: Deployment, how: str) -> None:
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    seen = deployment.launch(dg.DagsterRunStatus.STARTED)
    if how == "reset":
        deployment.cluster.resets = math.inf
    else:
        del deployment.cluster.jobs[get_job_name_from_run_id(run.run_id)]
    deployment.monitor()
    assert deployment.status(run) == "STARTED"
    deployment.monitor()
    assert deployment.status(run) == "FAILURE"
    assert deployment.status(seen) == ("FAILURE" if how == "reset" else "STARTED")


def test_a_failed_job_fails_its_run_at_once(deployment: Deployment) -> None:
    deployment.cluster.add_node(eks_node(FITS, LABELS))
    run = deployment.launch(dg.DagsterRunStatus.STARTED)
    deployment.monitor()
    assert deployment.status(run) == "STARTED"
    deployment.cluster.end(get_job_name_from_run_id(run.run_id), succeeded=False)
    deployment.monitor()
    assert deployment.status(run) == "FAILURE"


def test_other_launchers_are_not_even_made(tmp_path: Path) -> None:
    absent = {"module": "absent", "class": "EcsRunLauncher"}
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"run_launcher": absent}))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not list(delete_jobs_left_behind(instance))
    with dg.DagsterInstance.ephemeral() as instance:
        assert not list(delete_jobs_left_behind(instance))
