"""Dagster's launchers start a run of each asset: Jobs that fit the API's schema, and both instances.

In this process, so that the coordinator can be taken away: without it no shard comes to a GPU node.
"""

import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import dagster as dg
import kubernetes_validate
import pytest
import yaml
from dagster._core.definitions.run_request import InstigatorType

from census_tf_dagster.run_coordinator import PlacingRunCoordinator
from tests.support import k8s_deployment
from tests.support.ecs_deployment import STOCK, doubles, on_cpu, on_gpu_node, write_dagster_yaml
from tests.support.k8s_double import KubernetesDouble, outside_of_the_cluster, serving
from tests.support.launching import ASSETS, launch
from tests.support.placements import PLACEMENT, declare
from tests.support.postgres import PASSWORD, postgres
from tests.support.project import Project

VERSIONS = ("1.31", "1.37")


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, KubernetesDouble]]:
    """The instance of deploy/k8s with its own PostgreSQL, and a double of the cluster, which has no node."""
    project = Project(tmp_path_factory.mktemp("kubernetes"))
    project.add_set("tiny", organism="homo_sapiens", device="cuda")
    declare(project.folder / "sets")
    cluster = KubernetesDouble()
    with serving(cluster) as address, postgres() as database:
        outside = outside_of_the_cluster(project.folder, address)
        k8s_deployment.write_dagster_yaml(project.folder / "dagster_home", database, **outside)
        image = {"DAGSTER_CURRENT_IMAGE": k8s_deployment.CONTROL_IMAGE}
        with mock.patch.dict(os.environ, database | k8s_deployment.environment() | image):
            yield project, cluster


def job_of(kubernetes: tuple[Project, KubernetesDouble], asset: str, **own_tags: str) -> dict[str, Any]:
    """The Job of a run of one asset, after the schema has taken it."""
    project, cluster = kubernetes
    launch(project, asset, own_tags)
    job = cluster.created.pop()
    assert not cluster.created
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)
    return job


def on_gpu_pod(job: dict[str, Any]) -> bool:
    """Tell whether a Job has everything that takes its pod to a GPU node."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    wanted = PLACEMENT["kubernetes"]
    kind = wanted["nodes"]["spot"]
    return bool(
        container["resources"]["limits"].get("nvidia.com/gpu") == "1"
        and container["resources"]["requests"]["cpu"] == "4000m"
        and container["image"] == wanted["image"]
        and pod.get("nodeSelector") == kind["node_selector"]
        and [one["key"] for one in pod.get("tolerations", [])] == ["nvidia.com/gpu"]
        and pod["serviceAccountName"] == wanted["service_account"]
    )


def test_a_shard_s_job(kubernetes: tuple[Project, KubernetesDouble]) -> None:
    job = job_of(kubernetes, "shard_embeddings")
    assert on_gpu_pod(job)
    assert job["spec"]["template"]["metadata"]["annotations"] == {
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }
    assert job["spec"]["backoffLimit"] == 0
    assert PASSWORD not in json.dumps(job)


@pytest.mark.parametrize("asset", ["obs_id_plan", "embeddings_array"])
def test_the_job_of_a_run_without_a_placement(kubernetes: tuple[Project, KubernetesDouble], asset: str) -> None:
    job = job_of(kubernetes, asset)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == k8s_deployment.CONTROL_IMAGE
    assert container["resources"] == {"requests": {"cpu": "2", "memory": "16Gi"}, "limits": {"memory": "16Gi"}}
    assert not pod.keys() & {"nodeSelector", "tolerations"}
    assert pod["serviceAccountName"] == "census-tf-run"


def test_a_job_with_another_size(kubernetes: tuple[Project, KubernetesDouble]) -> None:
    asked = {"container_config": {"resources": {"requests": {"memory": "60Gi"}, "limits": {"memory": "60Gi"}}}}
    job = job_of(kubernetes, "shard_embeddings", **{"dagster-k8s/config": json.dumps(asked)})
    assert on_gpu_pod(job)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] == "60Gi"


def test_the_node_selector_of_cpu_runs_does_not_reach_a_shard(
    kubernetes: tuple[Project, KubernetesDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kubernetes[0].folder / "dagster_home" / "dagster.yaml"
    before = path.read_text()
    config = yaml.safe_load(before)
    pod = config["run_launcher"]["config"]["run_k8s_config"]["pod_spec_config"]
    pod |= {"node_selector": {"example.com/size": "small"}, "tolerations": [{"key": "small", "operator": "Exists"}]}
    path.write_text(yaml.safe_dump(config))
    try:
        assert on_gpu_pod(job_of(kubernetes, "shard_embeddings"))
        small = job_of(kubernetes, "obs_id_plan")["spec"]["template"]["spec"]
        assert small["nodeSelector"] == {"example.com/size": "small"}
    finally:
        path.write_text(before)


def test_kubernetes_without_the_coordinator(kubernetes: tuple[Project, KubernetesDouble]) -> None:
    path = kubernetes[0].folder / "dagster_home" / "dagster.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | STOCK))
    try:
        assert not on_gpu_pod(job_of(kubernetes, "shard_embeddings"))
    finally:
        path.write_text(before)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
def test_ecs_with_and_without_the_coordinator(project: Project, ours: bool) -> None:
    project.add_set("tiny", organism="homo_sapiens", device="cuda")
    with doubles(project) as double:
        if not ours:
            write_dagster_yaml(project.folder / "dagster_home", **STOCK)
        with mock.patch.dict(os.environ, project.env):
            for asset in ASSETS:
                launch(project, asset)
            declare(project.folder / "sets", cpu=None, memory_gib=None)
            launch(project, "shard_embeddings")
    shard, plan, array, unsized = double.tasks
    assert on_gpu_node(shard.call) is ours
    assert on_cpu(plan.call)
    assert on_cpu(array.call)
    # Sizes that no placement states are the task definition's, not those of CPU runs.
    assert (unsized.container.keys() & {"cpu", "memory"} == set()) is ours


@pytest.mark.parametrize(
    ("platform", "launcher"), [("ecs", "EcsRunLauncher"), ("kubernetes", "KubernetesRunLauncher")], ids=["ecs", "k8s"]
)
def test_the_deploy_files_are_loaded(
    kubernetes: tuple[Project, KubernetesDouble], project: Project, platform: str, launcher: str
) -> None:
    def check(home: str) -> None:
        with dg.DagsterInstance.from_config(home) as instance:
            assert type(instance.run_launcher).__name__ == launcher
            assert isinstance(instance.run_coordinator, PlacingRunCoordinator)
            assert instance.run_coordinator._platform == platform
            assert type(instance.run_storage).__name__ == "PostgresRunStorage"
            assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
            assert type(instance.schedule_storage).__name__ == "PostgresScheduleStorage"
            assert type(instance.compute_log_manager).__name__ == "S3ComputeLogManager"
            assert not instance.telemetry_enabled
            assert instance.run_monitoring_enabled
            assert instance.run_monitoring_start_timeout_seconds == {"ecs": 86400, "kubernetes": 3600}[platform]
            assert instance.run_monitoring_max_resume_run_attempts == 0
            assert instance.run_retries_enabled
            assert instance.run_retries_max_retries == 5
            queue = instance.get_concurrency_config().run_queue_config
            assert queue is not None
            assert [limit["key"] for limit in queue.tag_concurrency_limits] == ["census_tf/node"]
            assert instance.get_tick_retention_settings(InstigatorType.SCHEDULE)

    if platform == "kubernetes":
        check(kubernetes[0].env["DAGSTER_HOME"])
        return
    with doubles(project), mock.patch.dict(os.environ, project.env):
        check(project.env["DAGSTER_HOME"])
