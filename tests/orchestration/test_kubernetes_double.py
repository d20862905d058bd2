"""The Kubernetes double takes and refuses pods as a scheduler does, also those of the deploy files."""

import json
from typing import Any

import pytest

from census_tf_dagster.config.placement import Placement, read_placement
from tests.support.k8s_deployment import FOLDER
from tests.support.k8s_double import KubernetesDouble, Node, eks_node, refuses, tolerates

SPOT = {"census-tf/pool": "gpu-spot"}
PATH = "/apis/batch/v1/namespaces/census-tf/jobs"


def shard_job(name: str = "shard", **changes: Any) -> dict[str, Any]:
    """A Job with the placement of deploy/k8s, or with some changes of it."""
    declared = read_placement(FOLDER)
    assert declared is not None
    placement = Placement.model_validate(declared.model_dump(exclude_none=True) | {"instance_types": []} | changes)
    config = json.loads(placement.tags()["dagster-k8s/config"])
    container = {"name": "dagster", "resources": config["container_config"]["resources"]}
    pod = config["pod_spec_config"]
    spec = {"containers": [container], "nodeSelector": pod["node_selector"], "tolerations": pod["tolerations"]}
    return {"metadata": {"name": name}, "spec": {"template": {"spec": spec}}}


def created(*jobs: dict[str, Any]) -> KubernetesDouble:
    double = KubernetesDouble()
    for job in jobs:
        assert double.answer("POST", PATH, {}, job)[0] == 201
    return double


def why_waiting(double: KubernetesDouble) -> str:
    """The reason in the FailedScheduling event of the only pod."""
    _, found = double.answer("GET", "/api/v1/namespaces/census-tf/events", {}, {})
    (event,) = found["items"]
    assert event["reason"] == "FailedScheduling"
    return str(event["message"])


@pytest.mark.parametrize(
    ("changes", "labels", "why"),
    [
        ({}, SPOT, None),
        # An EKS node of 4 vCPU has less than 4 cores for pods.
        ({"cpu": 4.0}, SPOT, "Insufficient cpu"),
        ({"memory_gib": 32}, SPOT, "Insufficient memory"),
        ({"disk_gib": 100}, SPOT, "Insufficient ephemeral-storage"),
        ({"gpus": 2}, SPOT, "Insufficient nvidia.com/gpu"),
        ({"purchase": "on_demand"}, SPOT, "node(s) didn't match Pod's node affinity/selector"),
        ({}, {}, "node(s) didn't match Pod's node affinity/selector"),
    ],
)
def test_a_shard_on_a_node(changes: dict[str, Any], labels: dict[str, str], why: str | None) -> None:
    double = created(shard_job(**changes))
    assert why_waiting(double).startswith("0/0 nodes")
    double.add_node(eks_node("g6e.xlarge", labels))
    assert double.started == ([] if why else ["shard"])
    if why:
        assert why_waiting(double) == f"0/1 nodes are available: {why}"
    # A pod that waits is active, too.
    assert double.jobs["shard"]["status"]["active"] == 1


def test_a_pod_without_the_toleration_stays_off_gpu_nodes() -> None:
    plan = {"metadata": {"name": "plan"}, "spec": {"template": {"spec": {"containers": [{"name": "dagster"}]}}}}
    double = created(plan)
    double.add_node(eks_node("g6e.xlarge", SPOT))
    assert why_waiting(double) == "0/1 nodes are available: node(s) had untolerated taint(s)"
    double.add_node(Node("cpu-1", {"cpu": "4"}))
    assert double.started == ["plan"]


def test_the_next_shard_waits_until_a_node_is_free() -> None:
    double = created(shard_job("first"), shard_job("second"))
    double.add_node(eks_node("g6e.xlarge", SPOT))
    assert double.started == ["first"]
    assert why_waiting(double).startswith("0/1 nodes are available: Insufficient ")
    double.end("first", succeeded=True)
    assert double.started == ["first", "second"]


@pytest.mark.parametrize(("policy", "pods"), [(None, 1), ("Orphan", 1), ("Background", 0)])
def test_a_deleted_job_leaves_its_pods_unless_asked(policy: str | None, pods: int) -> None:
    double = created(shard_job())
    query = {"propagationPolicy": policy} if policy else {}
    assert double.answer("DELETE", f"{PATH}/shard", query, {})[0] == 200
    assert double.answer("GET", f"{PATH}/shard/status", {}, {})[0] == 404
    assert len(double.pods) == pods
    double.add_node(eks_node("g6e.xlarge", SPOT))
    assert len(double.started) == pods


def test_tolerations() -> None:
    taint = {"key": "gpu", "value": "l40s", "effect": "NoSchedule"}
    exists = {"operator": "Exists"}
    assert tolerates({"key": "gpu", "value": "l40s"}, taint)
    assert tolerates({"key": "gpu", "effect": "NoSchedule"} | exists, taint)
    assert tolerates(exists, taint)
    for other in ({"key": "gpu"}, {"key": "gpu", "effect": "NoExecute"} | exists, {"key": "tpu"} | exists):
        assert not tolerates(other, taint)
    pod = {"spec": {"containers": []}}
    assert refuses(Node("soft", {}, {}, (taint | {"effect": "PreferNoSchedule"},)), pod, []) is None
    assert refuses(Node("hard", {}, {}, (taint,)), pod, []) is not None
