"""deploy/ecs/template.yaml against what AWS documents, where moto does something else or nothing."""

import gzip
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import cfnlint.data.AdditionalSpecs
import pytest
from cfnlint.helpers import load_resource

from census_tf_dagster.config.placement import read_placement
from tests.support.aws_documented import (
    ACCOUNT,
    ARN_FORMATS,
    INSTANCE_TYPES,
    REGION,
    RESOURCE_TYPES,
    can_match,
    documented_policies,
    resolve,
    resource_type,
)
from tests.support.ecs_existing import VARIANTS
from tests.support.ecs_stack import TEMPLATE as TEMPLATE_FILE
from tests.support.iam_policies import allowed

TEMPLATE = VARIANTS[""]
STREAM = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/census-tf/runs:log-stream:worker/run/1"


def policies(role: str) -> list[dict[str, Any]]:
    return documented_policies(TEMPLATE, role)


def statements() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every statement about resources, with a name for messages."""
    for variant, template in VARIANTS.items():
        for name, resource in template["Resources"].items():
            if resource["Type"] == "AWS::IAM::Role":
                for document in documented_policies(template, name):
                    yield from ((f"{variant}{name}/{one['Sid']}", one) for one in document["Statement"])
            if resource["Type"] == "AWS::S3::BucketPolicy":
                document = resolve(template, resource["Properties"]["PolicyDocument"])
                yield from ((f"{variant}{name}/{one['Sid']}", one) for one in document["Statement"])


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def resource_types(actions: list[str]) -> Iterator[str | None]:
    """The types of the actions' resources; `s3:*` has all types of S3."""
    for action in actions:
        service, _, verb = action.partition(":")
        if verb == "*":
            yield from (kind for kind in ARN_FORMATS if kind.startswith(f"{service}:"))
        else:
            yield resource_type(action)


STATEMENTS = dict(statements())


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_reaches_resources_of_its_actions(name: str) -> None:
    """An ARN that is wrong in any part matches nothing, and IAM does not say so."""
    statement = STATEMENTS[name]
    resources, kinds = as_list(statement["Resource"]), list(resource_types(as_list(statement["Action"])))
    if None in kinds:
        assert (set(kinds), resources) == ({None}, ["*"])
        return
    for kind in kinds:
        assert kind is not None
        assert any(can_match(one, kind) for one in resources), f"no {kind} is one of {resources}"
    for one in resources:
        assert any(kind is not None and can_match(one, kind) for kind in kinds), f"{one} is none of {kinds}"


@pytest.mark.parametrize(
    ("pattern", "kind", "wanted"),
    [
        ("arn:aws:logs:us-west-2:123456789012:log-group:/x:*", "logs:log-stream", True),
        ("arn:aws:logs:us-west-2:123456789012:log-group:/x:log-stream:*", "logs:log-stream", True),
        ("arn:aws:logs:us-west-2:123456789012:log-group:/x:*:log-stream:*", "logs:log-stream", False),
        ("arn:aws:logs:us-west-2:123456789012:log-group:/x", "logs:log-stream", False),
        ("arn:aws:s3:::x", "s3:object", False),
        ("arn:aws:s3:::x/*", "s3:object", True),
        ("arn:aws:s3:us-west-2:123456789012:x/*", "s3:object", False),
        ("arn:aws:ecs:us-west-2:123456789012:task/x", "ecs:task", False),
        ("arn:aws:ecs:us-west-2:123456789012:cluster/x", "ecs:task", False),
    ],
)
def test_what_matches_a_resource_type(pattern: str, kind: str, wanted: bool) -> None:
    assert can_match(pattern, kind) is wanted


def test_resource_types_are_those_of_the_service_authorization_reference() -> None:
    reference = load_resource(cfnlint.data.AdditionalSpecs, "Policies.json")
    for action, kind in RESOURCE_TYPES.items():
        service, _, verb = action.partition(":")
        known = [one.lower() for one in reference[service]["Actions"][verb.lower()].get("Resources", [])]
        assert (kind in known) if kind else (known == []), (action, known)


def test_logs_that_aws_s_own_arns_open() -> None:
    """moto's ARN of a log group lacks the `:*` of AWS's."""
    assert allowed(policies("ControlRole"), "logs:GetLogEvents", STREAM)
    assert not allowed(policies("RunRole"), "logs:GetLogEvents", STREAM)
    for action in ("logs:CreateLogStream", "logs:PutLogEvents"):
        assert allowed(policies("ExecutionRole"), action, STREAM)
        assert not allowed(policies("ExecutionRole"), action, STREAM.replace("/runs:", "/other:"))


def test_a_service_that_does_not_start_goes_back_to_what_worked() -> None:
    services = [one["Properties"] for one in TEMPLATE["Resources"].values() if one["Type"] == "AWS::ECS::Service"]
    assert services
    for one in services:
        breaker = one["DeploymentConfiguration"].get("DeploymentCircuitBreaker")
        assert breaker == {"Enable": True, "Rollback": True}


# Instance types.


def test_sizes_of_instance_types_are_ec2_s() -> None:
    packed = files("moto").joinpath("ec2/resources/instance_types.json.gz").read_bytes()
    known = json.loads(gzip.decompress(packed))
    for name, size in INSTANCE_TYPES.items():
        (gpu,) = known[name]["GpuInfo"]["Gpus"]
        assert size.vcpus == known[name]["VCpuInfo"]["DefaultVCpus"], name
        assert size.memory_gib * 1024 == known[name]["MemoryInfo"]["SizeInMiB"], name
        assert size.gpus == gpu["Count"], name
        # 24 GB are sold, and 22,888 MiB reported.
        assert size.gpu_memory_gb == round(gpu["MemoryInfo"]["SizeInMiB"] * 1024**2 / 1e9), name
        assert "spot" in known[name]["SupportedUsageClasses"], name
        assert known[name]["ProcessorInfo"]["SupportedArchitectures"] == ["x86_64"], name


def default_types() -> list[str]:
    return str(TEMPLATE["Parameters"]["GpuInstanceTypes"]["Default"]).split(",")


def test_there_are_several_default_types_for_spot() -> None:
    assert len(set(default_types())) >= 3
    assert len({one.partition(".")[0] for one in default_types()}) >= 3
    for name in ("OnDemandNodes", "SpotNodes"):
        policy = TEMPLATE["Resources"][name]["Properties"]["MixedInstancesPolicy"]
        assert len(policy["LaunchTemplate"]["Overrides"]) >= len(default_types())
    distribution = TEMPLATE["Resources"]["SpotNodes"]["Properties"]["MixedInstancesPolicy"]["InstancesDistribution"]
    assert distribution["SpotAllocationStrategy"] == "price-capacity-optimized"


@pytest.mark.parametrize("name", default_types())
def test_a_shard_fits_each_default_type(name: str) -> None:
    task, size = TEMPLATE["Resources"]["WorkerTask"]["Properties"], INSTANCE_TYPES[name]
    placement = read_placement(TEMPLATE_FILE.parent)
    assert placement is not None
    assert (placement.cpu, placement.memory_gib) == (int(task["Cpu"]) / 1024, int(task["Memory"]) / 1024)
    assert int(task["Cpu"]) <= size.vcpus * 1024
    # The kernel and the ECS agent keep about a sixteenth of the memory.
    assert int(task["Memory"]) <= size.memory_gib * 1024 * 15 / 16
    # More GPUs than one would let two shards share what the task definition gives one.
    assert size.gpus == 1
    assert size.gpu_memory_gb >= 24
