"""On which nodes the shards of a set run: declared once, rendered to the tags that Dagster's launchers read.

The defaults of a deployment stand in ``placement.yaml`` in its folder of sets; a set's own YAML replaces single
entries. `run_coordinator` carries the tags from the asset to each of its runs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from census_tf_dagster.config.cost import GpuType
from census_tf_dagster.config.field_types import Line, Name
from census_tf_dagster.config.yaml_problems import read_mapping
from census_tf_dagster.errors import UserError

FILE, PAGE = "placement.yaml", "docs/placement.md"
"""In the folder of sets, and what shows it."""

NODE_TAG = "census_tf/node"
"""On runs that take a place in the fleet of GPU nodes: ``gpu``. What caps the fleet counts it."""

Purchase = Literal["on_demand", "spot"]
T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Network(_Strict):
    """Where a task of network mode ``awsvpc`` gets its address."""

    subnets: list[Name] = Field(min_length=1, description="Subnets of the GPU nodes.")
    security_groups: list[Name] = Field(min_length=1, description="Security groups of the task.")


class Disk(_Strict):
    """An EBS volume that ECS makes with the task and deletes with it."""

    volume: Name = Field(description="Name of the worker task definition's volume that is configured at launch.")
    role_arn: Name = Field(description="Role with which ECS makes the volume.")


class Ecs(_Strict):
    """Nodes and worker of an ECS deployment."""

    task_definition: Name = Field(
        description="Registered task definition with the worker's image, for EC2; its container has the name that the "
        "launcher expects. Family, family:revision or ARN."
    )
    capacity_providers: dict[Purchase, Name] = Field(
        min_length=1, description="Capacity provider of each kind of purchase."
    )
    network: Network | None = Field(
        default=None, description="For a task definition of network mode awsvpc; left out: mode bridge or host."
    )
    disk: Disk | None = Field(default=None, description="What disk_gib is made of; left out: the node's own disk.")


class Toleration(_Strict):
    """A taint that pods of shards tolerate."""

    key: Name = Field(description="The taint's key.")
    operator: Literal["Exists", "Equal"] = Field(default="Exists", description="Equal: `value` must be the taint's.")
    value: Line | None = Field(default=None, description="The taint's value, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect; left out: any."
    )


class NodeKind(_Strict):
    """How nodes of one kind of purchase are found."""

    node_selector: dict[Name, Line] = Field(min_length=1, description="Labels of the GPU nodes.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints of the GPU nodes.")


class Kubernetes(_Strict):
    """Nodes and worker of a Kubernetes deployment."""

    image: Name = Field(description="The worker's image.")
    nodes: dict[Purchase, NodeKind] = Field(min_length=1, description="Nodes of each kind of purchase.")
    service_account: Name | None = Field(default=None, description="Left out: that of all runs.")


class Placement(_Strict):
    """What a shard asks for. Every entry can be left out, so a set's own may name only what differs."""

    gpus: int = Field(default=1, ge=0, le=16, description="GPUs of a shard.")
    cpu: float | None = Field(default=None, gt=0, le=4096, allow_inf_nan=False, description="Cores of a shard.")
    memory_gib: int | None = Field(default=None, ge=1, le=65536, description="Memory of a shard.")
    disk_gib: int | None = Field(default=None, ge=1, le=65536, description="Disk of a shard.")
    purchase: Purchase = Field(default="on_demand", description="Kind of node.")
    gpu_type: GpuType | None = Field(
        default=None, description="GPU of these nodes: what is assumed of its speed before anything was measured."
    )
    usd_per_gpu_hour: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000_000,
        allow_inf_nan=False,
        description="Price of an hour of such a node, divided by its GPUs: what costs are told with.",
    )
    fleet_gpus: int | None = Field(
        default=None, ge=1, le=100_000, description="GPUs that work at once: what finish times are told with."
    )
    ecs: Ecs | None = Field(default=None, description="For a deployment on ECS.")
    kubernetes: Kubernetes | None = Field(default=None, description="For a deployment on Kubernetes.")

    def replaced_by(self, own: "Placement") -> Self:
        """Return this with every entry that `own` names."""
        return self.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})

    def tags(self) -> dict[str, str]:
        """Render what a step, and by the run coordinator a run, carries.

        Raises
        ------
        UserError
            When the kind of purchase has no nodes, or disk is asked for and ECS was told no way to make it.
        """
        tags = {NODE_TAG: "gpu"} if self.gpus else {}
        if self.ecs is not None:
            tags |= self._ecs_tags(self.ecs)
        if self.kubernetes is not None:
            tags["dagster-k8s/config"] = json.dumps(self._kubernetes_config(self.kubernetes), sort_keys=True)
        return tags

    def _ecs_tags(self, ecs: Ecs) -> dict[str, str]:
        provider = self._of_purchase(ecs.capacity_providers, "ecs.capacity_providers")
        network = ecs.network and {
            "awsvpcConfiguration": {"subnets": ecs.network.subnets, "securityGroups": ecs.network.security_groups}
        }
        # The launcher would give its own network, which asks for a public address that EC2 refuses; null takes it away.
        run_task: dict[str, Any] = {
            "taskDefinition": ecs.task_definition,
            "capacityProviderStrategy": [{"capacityProvider": provider, "weight": 1}],
            "networkConfiguration": network,
        }
        if self.disk_gib is not None:
            if ecs.disk is None:
                raise UserError(
                    f"placement: disk_gib is {self.disk_gib} and ecs.disk is missing: on EC2 a task has the disk of "
                    "its node. Name the volume and the role to make one (ecs.disk), or leave disk_gib out."
                )
            ebs = {"sizeInGiB": self.disk_gib, "roleArn": ecs.disk.role_arn, "filesystemType": "ext4"}
            run_task["volumeConfigurations"] = [{"name": ecs.disk.volume, "managedEBSVolume": ebs}]
        tags = {"ecs/run_task_kwargs": json.dumps(run_task, sort_keys=True)}
        if self.gpus:
            gpus = {"resourceRequirements": [{"type": "GPU", "value": str(self.gpus)}]}
            tags["ecs/container_overrides"] = json.dumps(gpus)
        # Empty: those of the task definition. Without a tag the launcher would give the sizes of CPU runs.
        tags["ecs/cpu"] = "" if self.cpu is None else str(round(self.cpu * 1024))
        tags["ecs/memory"] = "" if self.memory_gib is None else str(self.memory_gib * 1024)
        return tags

    def _kubernetes_config(self, kubernetes: Kubernetes) -> dict[str, Any]:
        nodes = self._of_purchase(kubernetes.nodes, "kubernetes.nodes")
        sizes: dict[str, str] = {}
        if self.memory_gib is not None:
            sizes["memory"] = f"{self.memory_gib}Gi"
        if self.disk_gib is not None:
            sizes["ephemeral-storage"] = f"{self.disk_gib}Gi"
        requests = sizes | ({"cpu": f"{round(self.cpu * 1000)}m"} if self.cpu is not None else {})
        limits = sizes | ({"nvidia.com/gpu": str(self.gpus)} if self.gpus else {})
        resources = {name: values for name, values in (("requests", requests), ("limits", limits)) if values}
        pod: dict[str, Any] = {
            "node_selector": dict(nodes.node_selector),
            "tolerations": [one.model_dump(exclude_none=True) for one in nodes.tolerations],
        }
        if kubernetes.service_account is not None:
            pod["service_account_name"] = kubernetes.service_account
        return {
            "container_config": {"image": kubernetes.image, "resources": resources},
            "pod_spec_config": pod,
            # A deep merge would leave the node selector of CPU runs beside this one, and no node has both.
            "merge_behavior": "SHALLOW",
        }

    def _of_purchase(self, kinds: Mapping[Purchase, T], where: str) -> T:
        if self.purchase not in kinds:
            raise UserError(f"placement: purchase is {self.purchase}, and {where} has only {', '.join(sorted(kinds))}.")
        return kinds[self.purchase]


def read_placement(folder: Path) -> Placement | None:
    """Read the placement of a deployment from its folder of sets; None when there is none.

    Raises
    ------
    UserError
        Naming file, line, value and remedy of each mistake.
    """
    return read_mapping(folder / FILE, Placement, PAGE)


def shard_tags(device: str, own: Placement | None, deployment: Placement | None) -> dict[str, str]:
    """Return the tags of a set's GPU asset.

    Parameters
    ----------
    device
        The set's. One on the CPU is placed only when its YAML has a placement.
    own, deployment
        The set's placement, and the one that its entries replace.

    Raises
    ------
    UserError
        As `Placement.tags` does.
    """
    if device == "cpu" and own is None:
        return {}
    return effective(own, deployment).tags()


def effective(own: Placement | None, deployment: Placement | None) -> Placement:
    """Return a deployment's placement with what a set's own replaces."""
    return (deployment or Placement()).replaced_by(own or Placement())
