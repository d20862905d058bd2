"""The nodes on which the shards of a set run, and the tags with which Dagster's launchers choose them.

``placement.yaml`` in the folder of sets holds the deployment's defaults. A set's own YAML replaces single entries.
`run_coordinator` copies the tags from the asset to each of its runs; nothing here talks to Dagster.
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from census_tf_dagster.config.cost import GpuType
from census_tf_dagster.config.field_types import Line, Name
from census_tf_dagster.config.node_types import NODE_TYPES, Platform, shortfall
from census_tf_dagster.config.yaml_problems import read_mapping
from census_tf_dagster.errors import UserError

FILE, PAGE = "placement.yaml", "docs/placement.md"
"""The file in the folder of sets, and the page that shows an example."""

NODE_TAG = "census_tf/node"
"""``gpu`` on each run that needs a GPU node. The limit on the size of the fleet counts this tag."""

ON_DEMAND_TAG = "census_tf/on_demand"
"""On a shard that may move from spot to on-demand nodes: JSON with ``after``, the number of spot nodes that it may lose
or not get, and ``tags``, the placing tags that then replace its own."""

KEPT_ON_ITS_NODE = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
}
"""Annotations of each shard's pod. Without them, an autoscaler may end a shard to move it to a cheaper node."""

Purchase = Literal["on_demand", "spot"]
T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Replaceable(_Strict):
    """Fields of which a set may replace single ones."""

    def replaced_by(self, own: Self) -> Self:
        """Return a copy with every field that `own` names taken from `own`.

        Fields of `ecs` and `kubernetes` are replaced one by one; so are the keys of their mappings (kinds of purchase,
        annotations). Everything else is replaced as a whole.
        """
        return self.model_copy(
            update={name: _replaced(getattr(self, name), getattr(own, name)) for name in own.model_fields_set}
        )

    def _require(self, platform: str, *names: str) -> None:
        missing = [f"{platform}.{name}" for name in names if not getattr(self, name)]
        if missing:
            raise UserError(
                f"placement: {', '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing in {FILE} and in the "
                "set's own placement."
            )


def _replaced(old: Any, new: Any) -> Any:
    if isinstance(old, _Replaceable) and isinstance(new, _Replaceable):
        return old.replaced_by(new)
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def _instance_type(name: str) -> str:
    if name not in NODE_TYPES:
        near = ", ".join(get_close_matches(name, NODE_TYPES, n=3, cutoff=0))
        raise ValueError(f"It should be a known type such as {near}. Leave instance_types out if the pool has others")
    return name


class Network(_Strict):
    """The network of a task whose network mode is ``awsvpc``."""

    subnets: list[Name] = Field(min_length=1, description="Subnets of the GPU nodes.")
    security_groups: list[Name] = Field(min_length=1, description="Security groups of the task.")


class Disk(_Strict):
    """An EBS volume that ECS creates for the task and deletes with it."""

    volume: Name = Field(
        description="Name of the volume that the worker's task definition marks as configured at launch."
    )
    role_arn: Name = Field(description="Role with which ECS creates the volume.")


class Ecs(_Replaceable):
    """The GPU nodes and the worker of a deployment on ECS."""

    task_definition: Name | None = Field(
        default=None,
        description="Task definition for EC2 with the worker's image: family, family:revision or ARN. Its container "
        "must have the name that the launcher expects. Required here or in the set.",
    )
    capacity_providers: dict[Purchase, Name] = Field(
        default_factory=dict,
        min_length=1,
        description="Capacity provider of each kind of purchase. Required here or in the set.",
    )
    network: Network | None = Field(
        default=None,
        description="Needed when the task definition's network mode is awsvpc. Leave it out for bridge or host.",
    )
    disk: Disk | None = Field(
        default=None, description="Volume for disk_gib. Default: the task uses the node's own disk."
    )


class Toleration(_Strict):
    """A taint that the pods of shards tolerate."""

    key: Name = Field(description="The taint's key.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="Exists: the key is enough. Equal: `value` must also match the taint."
    )
    value: Line | None = Field(default=None, description="The taint's value; needed for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="The taint's effect. Default: any effect."
    )


class NodeKind(_Strict):
    """The labels and taints of nodes of one kind of purchase."""

    node_selector: dict[Name, Line] = Field(min_length=1, description="Labels of the GPU nodes.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints of the GPU nodes.")


class Kubernetes(_Replaceable):
    """The GPU nodes and the worker of a deployment on Kubernetes."""

    image: Name | None = Field(default=None, description="The worker's image. Required here or in the set.")
    nodes: dict[Purchase, NodeKind] = Field(
        default_factory=dict,
        min_length=1,
        description="Nodes of each kind of purchase. Required here or in the set.",
    )
    service_account: Name | None = Field(
        default=None, description="Service account of the pods. Default: the one of all runs."
    )
    runtime_class: Name | None = Field(
        default=None, description="RuntimeClass of the pods, such as nvidia. Default: the one of the cluster."
    )
    annotations: dict[Name, Line] = Field(
        default_factory=dict,
        description="Annotations of the pods. They are added to the two that keep Karpenter and the cluster autoscaler "
        "from moving a shard (docs/placement.md), or change them.",
    )


class Placement(_Replaceable):
    """The node that a shard needs. A set's own placement names only the entries that differ."""

    gpus: int = Field(default=1, ge=0, le=16, description="GPUs of each shard.")
    cpu: float | None = Field(default=None, gt=0, le=4096, allow_inf_nan=False, description="CPU cores of each shard.")
    memory_gib: int | None = Field(default=None, ge=1, le=65536, description="Memory of each shard, in GiB.")
    disk_gib: int | None = Field(default=None, ge=1, le=65536, description="Disk of each shard, in GiB.")
    purchase: Purchase = Field(default="on_demand", description="How the nodes are bought.")
    on_demand_after: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="With purchase: spot, the number of times that a shard may lose its node or get none. After that "
        "it runs on on-demand nodes. Default: it stays with spot nodes.",
    )
    gpu_type: GpuType | None = Field(
        default=None, description="GPU type of these nodes. Costs assume a speed for it until one has been measured."
    )
    instance_types: list[Annotated[Name, AfterValidator(_instance_type)]] = Field(
        default_factory=list,
        max_length=100,
        description="Instance types of the pool's nodes, such as g6e.xlarge or g2-standard-8. With them, `check` "
        "refuses a shard that fits none of them. Without them nothing is checked.",
    )
    usd_per_gpu_hour: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000_000,
        allow_inf_nan=False,
        description="Price of an hour of such a node, divided by its number of GPUs. Without it costs are unknown.",
    )
    fleet_gpus: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="GPUs that work at the same time. Without it finish times are unknown.",
    )
    ecs: Ecs | None = Field(default=None, description="Settings for a deployment on ECS.")
    kubernetes: Kubernetes | None = Field(default=None, description="Settings for a deployment on Kubernetes.")

    def tags(self) -> dict[str, str]:
        """Return the tags of a step. The run coordinator copies them to the run.

        Raises
        ------
        UserError
            When an entry of the platform is missing, the kind of purchase (or on-demand, with `on_demand_after`) has
            no nodes, a shard fits none of `instance_types`, or `disk_gib` is set and `ecs.disk` is missing.
        """
        tags = self._tags()
        if self.purchase == "spot" and self.on_demand_after is not None:
            then = self.model_copy(update={"purchase": "on_demand"})._tags()
            changes = {name: value for name, value in then.items() if value != tags[name]}
            tags[ON_DEMAND_TAG] = json.dumps({"after": self.on_demand_after, "tags": changes}, sort_keys=True)
        return tags

    def _tags(self) -> dict[str, str]:
        """Return the tags of one kind of purchase."""
        tags = {NODE_TAG: "gpu"} if self.gpus else {}
        if self.ecs is not None:
            self._require_room(dict.fromkeys(self.instance_types, "ECS"))
            tags |= self._ecs_tags(self.ecs)
        if self.kubernetes is not None:
            self._require_room({name: "EKS" if NODE_TYPES[name].on_aws else "GKE" for name in self.instance_types})
            tags["dagster-k8s/config"] = json.dumps(self._kubernetes_config(self.kubernetes), sort_keys=True)
        return tags

    def _require_room(self, platforms: Mapping[str, Platform]) -> None:
        asked = (self.gpus, self.cpu, self.memory_gib, self.gpu_type)
        short = [shortfall(NODE_TYPES[name], platform, *asked) for name, platform in platforms.items()]
        reasons = [one for one in short if one is not None]
        if short and len(reasons) == len(short):
            raise UserError(f"placement: {'; '.join(reasons)}. Ask for less, or for larger nodes.")

    def _ecs_tags(self, ecs: Ecs) -> dict[str, str]:
        ecs._require("ecs", "task_definition", "capacity_providers")
        provider = self._of_purchase(ecs.capacity_providers, "ecs.capacity_providers")
        network = ecs.network and {
            "awsvpcConfiguration": {"subnets": ecs.network.subnets, "securityGroups": ecs.network.security_groups}
        }
        # The launcher would add its own network with a public address, which EC2 refuses. null removes it.
        run_task: dict[str, Any] = {
            "taskDefinition": ecs.task_definition,
            "capacityProviderStrategy": [{"capacityProvider": provider, "weight": 1}],
            "networkConfiguration": network,
        }
        if self.disk_gib is not None:
            if ecs.disk is None:
                raise UserError(
                    f"placement: disk_gib is {self.disk_gib} and ecs.disk is missing; on EC2 a task uses the disk of "
                    "its node. Set ecs.disk (volume and role) to get a volume, or leave disk_gib out."
                )
            ebs = {"sizeInGiB": self.disk_gib, "roleArn": ecs.disk.role_arn, "filesystemType": "ext4"}
            run_task["volumeConfigurations"] = [{"name": ecs.disk.volume, "managedEBSVolume": ebs}]
        tags = {"ecs/run_task_kwargs": json.dumps(run_task, sort_keys=True)}
        if self.gpus:
            gpus = {"resourceRequirements": [{"type": "GPU", "value": str(self.gpus)}]}
            tags["ecs/container_overrides"] = json.dumps(gpus)
        # Empty: the sizes of the task definition. Without a tag the launcher would use the sizes of CPU runs.
        tags["ecs/cpu"] = "" if self.cpu is None else str(round(self.cpu * 1024))
        tags["ecs/memory"] = "" if self.memory_gib is None else str(self.memory_gib * 1024)
        return tags

    def _kubernetes_config(self, kubernetes: Kubernetes) -> dict[str, Any]:
        kubernetes._require("kubernetes", "image", "nodes")
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
        if kubernetes.runtime_class is not None:
            pod["runtime_class_name"] = kubernetes.runtime_class
        return {
            "container_config": {"image": kubernetes.image, "resources": resources},
            "pod_spec_config": pod,
            "pod_template_spec_metadata": {"annotations": {**KEPT_ON_ITS_NODE, **kubernetes.annotations}},
            # A deep merge would keep the node selector of CPU runs beside this one, and no node matches both.
            "merge_behavior": "SHALLOW",
        }

    def _of_purchase(self, kinds: Mapping[Purchase, T], where: str) -> T:
        if self.purchase == "spot" and self.on_demand_after is not None and "on_demand" not in kinds:
            raise UserError(
                f"placement: on_demand_after is {self.on_demand_after}, and {where} has only "
                f"{', '.join(sorted(kinds))}. Add on_demand there, or leave on_demand_after out."
            )
        if self.purchase not in kinds:
            raise UserError(
                f"placement: purchase is {self.purchase}, and {where} has only {', '.join(sorted(kinds))}. Add the "
                "missing kind there, or change purchase."
            )
        return kinds[self.purchase]


def read_placement(folder: Path) -> Placement | None:
    """Read a deployment's ``placement.yaml`` from its folder of sets; None when there is no such file.

    Raises
    ------
    UserError
        When the file has mistakes. The message gives file, line, value and remedy of each.
    """
    return read_mapping(folder / FILE, Placement, PAGE)


def shard_tags(device: str, own: Placement | None, deployment: Placement | None) -> dict[str, str]:
    """Return the placing tags of a set's asset `shard_embeddings`.

    Parameters
    ----------
    device
        The set's device. A set on the CPU is placed only when its own YAML has a placement.
    own, deployment
        The set's placement, and the deployment's, whose entries it replaces.

    Raises
    ------
    UserError
        As in `Placement.tags`.
    """
    if device == "cpu" and own is None:
        return {}
    return effective(own, deployment).tags()


def effective(own: Placement | None, deployment: Placement | None) -> Placement:
    """Return a deployment's placement with the entries that a set's own placement replaces."""
    return (deployment or Placement()).replaced_by(own or Placement())
