"""On Kubernetes, one error of the API loses no worker."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._daemon.monitoring import run_monitoring
from dagster_k8s.job import get_job_name_from_run_id

from tests.support.helm_chart import instance_of
from tests.support.k8s_deployment import CONTROL_IMAGE, read_values
from tests.support.k8s_double import KubernetesDouble, eks_node, outside_of_the_cluster, serving
from tests.support.placements import PLACEMENT, TAGS

FITS = "g6e.2xlarge"
LABELS = PLACEMENT["kubernetes"]["nodes"]["spot"]["node_selector"]


@dg.op
def nothing() -> None:
    pass


@dg.job
def job() -> None:
    nothing()


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
