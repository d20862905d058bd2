"""A placement is read from YAML, replaced entry by entry, and rendered as tags of the GPU asset only."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from census_tf_dagster.config.placement import FILE, Placement, read_placement, shard_tags
from census_tf_dagster.definitions import load_sets
from census_tf_dagster.errors import UserError
from census_tf_dagster.orchestration.partitions import RELEASES
from tests.support.placements import PLACEMENT, TAGS, declare
from tests.support.project import RELEASE, Project

NETWORK = {"subnets": ["subnet-1"], "security_groups": ["sg-1"]}
ECS_NAMES = ("ecs/run_task_kwargs", "ecs/container_overrides", "ecs/cpu", "ecs/memory")


def op_tags(sets: Path, asset: str) -> dict[str, str]:
    """The tags of the one asset of this name."""
    (found,) = [
        one for one in load_sets(sets).assets or () if isinstance(one, dg.AssetsDefinition) and one.key.path[1] == asset
    ]
    return {key: value for key, value in found.op.tags.items() if not key.startswith("dagster/")}


def test_one_declaration_renders_for_both_platforms() -> None:
    assert TAGS.keys() == {"census_tf/node", "dagster-k8s/config", *ECS_NAMES}
    assert json.loads(TAGS["ecs/run_task_kwargs"]) == {
        "taskDefinition": "census-tf-worker:7",
        "capacityProviderStrategy": [{"capacityProvider": "gpu-spot", "weight": 1}],
        "networkConfiguration": None,
    }
    assert json.loads(TAGS["ecs/container_overrides"]) == {"resourceRequirements": [{"type": "GPU", "value": "1"}]}
    assert (TAGS["ecs/cpu"], TAGS["ecs/memory"]) == ("4096", "28672")
    assert json.loads(TAGS["dagster-k8s/config"]) == {
        "container_config": {
            "image": "registry.example/census-tf-worker:0.1.0",
            "resources": {
                "requests": {"cpu": "4000m", "memory": "28Gi"},
                "limits": {"memory": "28Gi", "nvidia.com/gpu": "1"},
            },
        },
        "pod_spec_config": {
            "node_selector": {"example.com/pool": "gpu", "example.com/purchase": "spot"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "service_account_name": "census-tf-worker",
        },
        "pod_template_spec_metadata": {
            "annotations": {
                "karpenter.sh/do-not-disrupt": "true",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            }
        },
        "merge_behavior": "SHALLOW",
    }


def test_disk_and_network() -> None:
    ecs = PLACEMENT["ecs"] | {
        "network": {"subnets": ["subnet-1"], "security_groups": ["sg-1"]},
        "disk": {"volume": "cache", "role_arn": "arn:aws:iam::123456789012:role/ebs"},
    }
    tags = Placement.model_validate(PLACEMENT | {"ecs": ecs, "disk_gib": 100}).tags()
    run_task = json.loads(tags["ecs/run_task_kwargs"])
    network = {"subnets": ["subnet-1"], "securityGroups": ["sg-1"]}
    assert run_task["networkConfiguration"] == {"awsvpcConfiguration": network}
    (volume,) = run_task["volumeConfigurations"]
    assert (volume["name"], volume["managedEBSVolume"]["sizeInGiB"]) == ("cache", 100)
    resources = json.loads(tags["dagster-k8s/config"])["container_config"]["resources"]
    assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"] == "100Gi"
    with pytest.raises(UserError, match=r"disk_gib is 100 and ecs\.disk is missing"):
        Placement.model_validate(PLACEMENT | {"disk_gib": 100}).tags()


def test_a_set_replaces_what_it_names() -> None:
    deployment = Placement.model_validate(PLACEMENT)
    own = Placement.model_validate({"gpus": 2, "purchase": "on_demand"})
    tags = shard_tags("cuda", own, deployment)
    assert '"value": "2"' in tags["ecs/container_overrides"]
    assert '"gpu-on-demand"' in tags["ecs/run_task_kwargs"]
    assert tags["ecs/memory"] == TAGS["ecs/memory"]
    assert '"example.com/purchase": "on_demand"' in tags["dagster-k8s/config"]


def test_a_spot_placement_may_name_when_it_moves_to_on_demand_nodes() -> None:
    tags = Placement.model_validate(PLACEMENT | {"on_demand_after": 2}).tags()
    move = json.loads(tags.pop("census_tf/on_demand"))
    assert tags == TAGS
    on_demand = Placement.model_validate(PLACEMENT | {"purchase": "on_demand"}).tags()
    assert (move["after"], move["tags"].keys()) == (2, {"ecs/run_task_kwargs", "dagster-k8s/config"})
    assert TAGS | move["tags"] == on_demand
    bought = Placement.model_validate(PLACEMENT | {"purchase": "on_demand", "on_demand_after": 2})
    assert bought.tags() == on_demand


@pytest.mark.parametrize(("platform", "kinds"), [("ecs", "capacity_providers"), ("kubernetes", "nodes")])
def test_on_demand_nodes_that_are_nowhere_are_refused(platform: str, kinds: str) -> None:
    part = PLACEMENT[platform] | {kinds: {"spot": PLACEMENT[platform][kinds]["spot"]}}
    placement = Placement.model_validate(PLACEMENT | {platform: part, "on_demand_after": 2})
    with pytest.raises(UserError, match=rf"^placement: on_demand_after is 2, and {platform}\.{kinds} has only spot\."):
        placement.tags()


def kubernetes_config(placement: Placement) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(placement.tags()["dagster-k8s/config"])
    return config


def test_a_set_replaces_single_entries_inside_a_platform() -> None:
    deployment = Placement.model_validate(PLACEMENT | {"ecs": PLACEMENT["ecs"] | {"network": NETWORK}})
    own = Placement.model_validate(
        {
            "ecs": {"capacity_providers": {"spot": "large-spot"}, "network": {**NETWORK, "subnets": ["subnet-2"]}},
            "kubernetes": {
                "service_account": "reader",
                "nodes": {"on_demand": {"node_selector": {"example.com/pool": "large"}}},
            },
        }
    )
    found = deployment.replaced_by(own)
    assert found.ecs is not None
    assert found.ecs.task_definition == "census-tf-worker:7"
    assert found.ecs.capacity_providers == {"spot": "large-spot", "on_demand": "gpu-on-demand"}
    assert found.ecs.network is not None
    assert (found.ecs.network.subnets, found.ecs.network.security_groups) == (["subnet-2"], ["sg-1"])
    spot = kubernetes_config(found)
    assert spot["container_config"]["image"] == "registry.example/census-tf-worker:0.1.0"
    assert spot["pod_spec_config"]["service_account_name"] == "reader"
    assert spot["pod_spec_config"]["node_selector"] == {"example.com/pool": "gpu", "example.com/purchase": "spot"}
    # A kind of purchase is replaced as a whole: its labels and its taints belong together.
    on_demand = kubernetes_config(found.replaced_by(Placement(purchase="on_demand")))["pod_spec_config"]
    assert (on_demand["node_selector"], on_demand["tolerations"]) == ({"example.com/pool": "large"}, [])


def test_a_set_removes_an_entry_with_null() -> None:
    own = Placement.model_validate({"kubernetes": {"service_account": None}, "ecs": None})
    found = Placement.model_validate(PLACEMENT).replaced_by(own)
    assert found.ecs is None
    assert "service_account_name" not in kubernetes_config(found)["pod_spec_config"]


@pytest.mark.parametrize(
    ("platform", "entries", "missing"),
    [
        ("ecs", ("task_definition",), "ecs.task_definition is missing"),
        ("ecs", ("capacity_providers",), "ecs.capacity_providers is missing"),
        ("kubernetes", ("image",), "kubernetes.image is missing"),
        ("kubernetes", ("nodes", "image"), "kubernetes.image, kubernetes.nodes are missing"),
    ],
)
def test_what_neither_file_names_is_one_line(platform: str, entries: tuple[str, ...], missing: str) -> None:
    part = {name: value for name, value in PLACEMENT[platform].items() if name not in entries}
    deployment = Placement.model_validate(PLACEMENT | {platform: part})
    with pytest.raises(UserError, match=f"^placement: {missing} in placement.yaml and in the set's own placement"):
        shard_tags("cuda", None, deployment)
    own = Placement.model_validate({platform: {name: PLACEMENT[platform][name] for name in entries}})
    assert shard_tags("cuda", own, deployment) == TAGS


def test_annotations_are_merged_over_those_that_keep_a_shard_on_its_node() -> None:
    kubernetes = PLACEMENT["kubernetes"] | {"annotations": {"karpenter.sh/do-not-disrupt": "12h", "example.com/a": "1"}}
    deployment = Placement.model_validate(PLACEMENT | {"kubernetes": kubernetes})
    own = Placement.model_validate({"kubernetes": {"annotations": {"example.com/a": "2"}}})
    assert kubernetes_config(deployment.replaced_by(own))["pod_template_spec_metadata"]["annotations"] == {
        "karpenter.sh/do-not-disrupt": "12h",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "example.com/a": "2",
    }


def test_the_runtime_class() -> None:
    kubernetes = PLACEMENT["kubernetes"] | {"runtime_class": "nvidia"}
    pod = kubernetes_config(Placement.model_validate(PLACEMENT | {"kubernetes": kubernetes}))["pod_spec_config"]
    assert pod["runtime_class_name"] == "nvidia"


ON_EKS = {"cpu": 3.5, "memory_gib": 24, "kubernetes": PLACEMENT["kubernetes"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_types": ["g6e.xlarge"]}, None),
        ({"instance_types": ["g6e.xlarge"], "cpu": None, "memory_gib": None, "gpu_type": "L40S"}, None),
        ({"instance_types": ["g6e.xlarge", "g6e.2xlarge"], "cpu": 7}, None),
        ({"instance_types": ["g2-standard-8"], "cpu": 7}, None),
        (
            {"instance_types": ["g6e.xlarge"], "cpu": 4},
            "placement: cpu 4 does not fit g6e.xlarge, which has 3.92 for pods on EKS, less what DaemonSets request: "
            "at most 3.6. Ask for less, or for larger nodes.",
        ),
        (
            {"instance_types": ["g6e.xlarge", "g2-standard-8"], "memory_gib": 40},
            "placement: memory_gib 40 does not fit g6e.xlarge, which has 28.6 for pods on EKS, less what DaemonSets "
            "request: at most 28; memory_gib 40 does not fit g2-standard-8, which has 26.1 for pods on GKE, less what "
            "DaemonSets request: at most 25. Ask for less, or for larger nodes.",
        ),
        (
            {"instance_types": ["g6.xlarge"], "memory_gib": 8, "gpu_type": "L40S"},
            "placement: gpu_type L40S does not fit g6.xlarge, which has L4. Ask for less, or for larger nodes.",
        ),
        ({"instance_types": ["g6e.xlarge"], "cpu": 4, "kubernetes": None, "ecs": PLACEMENT["ecs"]}, None),
        (
            {"instance_types": ["g2-standard-8"], "kubernetes": None, "ecs": PLACEMENT["ecs"]},
            "placement: g2-standard-8 is not a type of EC2. Ask for less, or for larger nodes.",
        ),
        ({"instance_types": ["g6e.xlarge"], "cpu": 64, "kubernetes": None}, None),
    ],
)
def test_a_shard_that_fits_no_node_of_its_pool(changes: dict[str, Any], message: str | None) -> None:
    placement = Placement.model_validate(ON_EKS | changes)
    if message is None:
        assert placement.tags()
        return
    with pytest.raises(UserError) as caught:
        placement.tags()
    assert str(caught.value) == message


def test_a_set_on_the_cpu_is_placed_only_when_it_says_so() -> None:
    deployment = Placement.model_validate(PLACEMENT)
    assert shard_tags("cpu", None, deployment) == {}
    assert shard_tags("cuda", None, deployment) == TAGS
    assert shard_tags("cuda", None, None) == {"census_tf/node": "gpu"}
    # Empty: the task definition's sizes. Without a tag the launcher would give those of CPU runs.
    unsized = shard_tags("cuda", Placement(cpu=None, memory_gib=None), deployment)
    assert (unsized["ecs/cpu"], unsized["ecs/memory"]) == ("", "")
    large = shard_tags("cpu", Placement(gpus=0), deployment)
    assert large.keys() == TAGS.keys() - {"census_tf/node", "ecs/container_overrides"}
    assert "nvidia.com/gpu" not in json.loads(large["dagster-k8s/config"])["container_config"]["resources"]["limits"]


def test_a_kind_of_purchase_without_nodes() -> None:
    ecs = PLACEMENT["ecs"] | {"capacity_providers": {"on_demand": "gpu-on-demand"}}
    with pytest.raises(UserError, match=r"purchase is spot, and ecs\.capacity_providers has only on_demand"):
        Placement.model_validate(PLACEMENT | {"ecs": ecs}).tags()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": 1}, "gpu is unknown. Did you mean gpus?"),
        ({"gpus": "1"}, "gpus is '1'. It should be a valid integer"),
        ({"purchase": "cheap"}, "purchase is 'cheap'. It should be 'on_demand' or 'spot'"),
        ({"ecs": {"task_definition": "x", "capacity_providers": {}}}, "ecs.capacity_providers is {}"),
        ({"instance_types": ["g6e.xlarg"]}, "is 'g6e.xlarg'. It should be a known type such as g6e.xlarge, "),
        ({"ecs": PLACEMENT["ecs"] | {"launch_type": "EC2"}}, "ecs.launch_type is unknown"),
        ({"memory_gib": 0}, "memory_gib is 0. It should be greater than or equal to 1"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    declare(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_placement(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / FILE}:")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "2020-01-01"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=FILE):
        read_placement(tmp_path)


def test_only_the_gpu_asset_carries_it(project: Project) -> None:
    project.add_set("tiny", organism="homo_sapiens", device="cuda", placement={"memory_gib": 60})
    sets = project.folder / "sets"
    assert op_tags(sets, "shard_embeddings") == {"census_tf/node": "gpu"}
    declare(sets)
    assert op_tags(sets, "shard_embeddings") == TAGS | {
        "ecs/memory": "61440",
        "dagster-k8s/config": TAGS["dagster-k8s/config"].replace("28Gi", "60Gi"),
    }
    assert op_tags(sets, "obs_id_plan") == op_tags(sets, "embeddings_array") == {}


def test_without_a_gpu_a_set_that_needs_one_names_launch(project: Project) -> None:
    project.add_set("tiny", organism="homo_sapiens", device="cuda")
    project.env["CUDA_VISIBLE_DEVICES"] = ""
    with dg.DagsterInstance.from_config(project.env["DAGSTER_HOME"]) as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
    done = project.materialize("tiny/shard_embeddings", f"{RELEASE}|0")
    assert done.returncode != 0
    sentence = (
        "set 'tiny' has `device: cuda`, but this machine has no GPU. Expected one: run `census-tf-dagster launch tiny "
        f"{RELEASE}` to send the work to the deployment's GPU nodes."
    )
    assert sentence in done.stdout + done.stderr
