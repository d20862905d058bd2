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
        ({"ecs": {"task_definition": "x"}}, "ecs.capacity_providers is missing"),
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
