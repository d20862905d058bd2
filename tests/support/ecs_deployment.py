"""deploy/ecs/dagster.yaml unchanged, with its own PostgreSQL and a double in place of the cluster."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml

from tests.support.deployment import Operator, running
from tests.support.ecs_double import Call, EcsDouble, serving
from tests.support.moto_servers import moto_server
from tests.support.placements import declare
from tests.support.postgres import postgres
from tests.support.project import RELEASE, REPOSITORY, Project

CAP = 2
CLUSTER, CONTROL, WORKER = "census-tf", "census-tf-control", "census-tf-worker"
NETWORK = {"awsvpcConfiguration": {"subnets": ["subnet-1"], "securityGroups": ["sg-1"], "assignPublicIp": "DISABLED"}}
REGION = "us-west-2"
STOCK = {"run_coordinator": {"module": "dagster.core.run_coordinator", "class": "QueuedRunCoordinator"}}
"""A change to dagster.yaml that removes the placing run coordinator."""


@dataclass
class EcsDeployment:
    """The parts of the deployment that a test reads."""

    operator: Operator
    ecs: EcsDouble


def aws_env(moto: str, ecs: str) -> dict[str, str]:
    """Variables that direct boto3 to the doubles."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": moto,
        "AWS_ENDPOINT_URL_ECS": ecs,
        "CENSUS_TF_LOG_BUCKET": "dagster-logs",
        "CENSUS_TF_CONTROL_TASK": CONTROL,
        "CENSUS_TF_CLUSTER": CLUSTER,
    }


def prepare_account(moto: str) -> None:
    """Create the bucket, the cluster with a node, and both task definitions."""

    def client(service: str) -> Any:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client(service, region_name=REGION, endpoint_url=moto, **keys)

    place = {"LocationConstraint": REGION}
    client("s3").create_bucket(Bucket="dagster-logs", CreateBucketConfiguration=place)
    ecs, ec2 = client("ecs"), client("ec2")
    ecs.create_cluster(clusterName=CLUSTER)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    # moto's nodes have the ECS agent's resources of one size; several make room for all that runs at once.
    for node in ec2.run_instances(ImageId=image, MinCount=4, MaxCount=4, InstanceType="g6e.xlarge")["Instances"]:
        document = f'{{"instanceId": "{node["InstanceId"]}"}}'
        ecs.register_container_instance(cluster=CLUSTER, instanceIdentityDocument=document)
    for family in (CONTROL, *[WORKER] * 7):
        container = {"name": "run", "image": f"registry.example/{family}", "memory": 16}
        ecs.register_task_definition(family=family, containerDefinitions=[container])


def write_dagster_yaml(home: Path, **changes: Any) -> None:
    """Write deploy/ecs/dagster.yaml to a DAGSTER_HOME, with the changes that only a test needs."""
    config = yaml.safe_load((REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text())
    config["concurrency"]["runs"]["tag_concurrency_limits"][0]["limit"] = CAP
    config["run_monitoring"]["poll_interval_seconds"] = 2
    config["run_coordinator"]["config"]["dequeue_interval_seconds"] = 1
    # There is no task around the daemon whose network could be taken.
    config["run_launcher"]["config"]["use_current_ecs_task_config"] = False
    config["run_launcher"]["config"]["run_task_kwargs"]["networkConfiguration"] = NETWORK
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_text(yaml.safe_dump(config | changes))


def on_gpu_node(call: Call) -> bool:
    """Tell whether a RunTask has everything that takes it to a GPU node, and nothing that contradicts it."""
    (container,) = call["overrides"]["containerOverrides"]
    return (
        container.get("resourceRequirements") == [{"type": "GPU", "value": "1"}]
        and (container["cpu"], container["memory"]) == (4096, 28672)
        and call.get("capacityProviderStrategy") == [{"capacityProvider": "gpu-spot", "weight": 1}]
        and call["taskDefinition"] == "census-tf-worker:7"
        and not call.keys() & {"launchType", "networkConfiguration"}
    )


def on_cpu(call: Call) -> bool:
    """Tell whether a RunTask belongs to a run without a placement."""
    (container,) = call["overrides"]["containerOverrides"]
    return (
        "resourceRequirements" not in container
        and "capacityProviderStrategy" not in call
        and call["launchType"] == "FARGATE"
        and f"task-definition/{CONTROL}:" in call["taskDefinition"]
    )


@contextmanager
def doubles(project: Project) -> Iterator[EcsDouble]:
    """Start PostgreSQL, moto and the ECS double, and direct a project to them."""
    with ExitStack() as stack:
        moto = stack.enter_context(moto_server())
        prepare_account(moto)
        double = EcsDouble(moto=moto, env=project.env, folder=project.folder)
        ecs = stack.enter_context(serving(double))
        project.env |= stack.enter_context(postgres()) | aws_env(moto, ecs)
        project.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{project.env['PATH']}"
        declare(project.folder / "sets")
        write_dagster_yaml(project.folder / "dagster_home")
        yield double


@contextmanager
def ecs_deployment(project: Project) -> Iterator[EcsDeployment]:
    """Run webserver and daemon of tests/support/placed_definitions.py against the doubles."""
    with doubles(project) as double:
        added = project.command("release", "add", RELEASE)
        assert added.returncode == 0, added.stderr[-3000:]
        with running(project, daemon=True, module="tests.support.placed_definitions") as operator:
            yield EcsDeployment(operator, double)
