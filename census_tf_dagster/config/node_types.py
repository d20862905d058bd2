"""The GPU node types of AWS and Google Cloud, and how much of a node a shard can get.

A node's own software takes a part of its cores and memory, so a shard that asks for all of a node never starts. This
module only computes what is left; `config.placement` compares it with what a shard asks for. A node's disk is missing
here, because its size belongs to the pool and not to the type.
"""

from dataclasses import dataclass
from typing import Literal

from census_tf_dagster.config.cost import GpuType

Platform = Literal["EKS", "GKE", "ECS"]

DAEMON_SETS_MILLICORES, DAEMON_SETS_MIB = 300, 512
"""The part of a Kubernetes node that is left to DaemonSets.

EKS's own (VPC CNI, kube-proxy, EBS CSI, GPU device plugin) request about half of it. The rest is for agents that
collect logs and metrics. A cluster with larger agents has less room than `room` says.
"""

VM_MEMORY_SHARE = 0.925
"""The part of the nominal memory that the system of a virtual machine sees.

Karpenter's default (`vmMemoryOverheadPercent: 0.075`, https://karpenter.sh/docs/reference/settings/). It is cautious:
most types show 2 to 6 % less than their nominal memory.
"""

EVICTION_MIB = 100
"""Free memory below which the kubelets of EKS and GKE evict pods."""


@dataclass(frozen=True)
class NodeType:
    """A type of node.

    Attributes
    ----------
    vcpus, memory_gib, gpus, gpu_type
        Its nominal size.
    max_pods
        On EKS, the most pods that the VPC CNI gives addresses to; 0 on Google Cloud, where nothing depends on it.
    """

    name: str
    vcpus: int
    memory_gib: int
    gpus: int
    gpu_type: GpuType
    max_pods: int = 0

    @property
    def on_aws(self) -> bool:
        """Whether the type is one of EC2's."""
        return self.max_pods > 0


@dataclass(frozen=True)
class Room:
    """Cores (in thousandths) and memory (in MiB) of a node that its platform gives to containers."""

    millicores: int
    memory_mib: int


# AWS: https://karpenter.sh/docs/reference/instance-types/ (sizes and pods), read in August 2026. Google Cloud:
# https://cloud.google.com/compute/docs/accelerator-optimized-machines; it says GB and means GiB.
NODE_TYPES: dict[str, NodeType] = {
    one.name: one
    for one in (
        NodeType("g5.xlarge", 4, 16, 1, "A10G", 58),
        NodeType("g5.2xlarge", 8, 32, 1, "A10G", 58),
        NodeType("g5.4xlarge", 16, 64, 1, "A10G", 234),
        NodeType("g5.8xlarge", 32, 128, 1, "A10G", 234),
        NodeType("g5.12xlarge", 48, 192, 4, "A10G", 737),
        NodeType("g5.16xlarge", 64, 256, 1, "A10G", 234),
        NodeType("g5.24xlarge", 96, 384, 4, "A10G", 737),
        NodeType("g5.48xlarge", 192, 768, 8, "A10G", 345),
        NodeType("g6.xlarge", 4, 16, 1, "L4", 58),
        NodeType("g6.2xlarge", 8, 32, 1, "L4", 58),
        NodeType("g6.4xlarge", 16, 64, 1, "L4", 234),
        NodeType("g6.8xlarge", 32, 128, 1, "L4", 234),
        NodeType("g6.12xlarge", 48, 192, 4, "L4", 234),
        NodeType("g6.16xlarge", 64, 256, 1, "L4", 737),
        NodeType("g6.24xlarge", 96, 384, 4, "L4", 737),
        NodeType("g6.48xlarge", 192, 768, 8, "L4", 737),
        NodeType("g6e.xlarge", 4, 32, 1, "L40S", 58),
        NodeType("g6e.2xlarge", 8, 64, 1, "L40S", 58),
        NodeType("g6e.4xlarge", 16, 128, 1, "L40S", 234),
        NodeType("g6e.8xlarge", 32, 256, 1, "L40S", 234),
        NodeType("g6e.12xlarge", 48, 384, 4, "L40S", 292),
        NodeType("g6e.16xlarge", 64, 512, 1, "L40S", 737),
        NodeType("g6e.24xlarge", 96, 768, 4, "L40S", 492),
        NodeType("g6e.48xlarge", 192, 1536, 8, "L40S", 492),
        NodeType("p4d.24xlarge", 96, 1152, 8, "A100", 737),
        NodeType("p4de.24xlarge", 96, 1152, 8, "A100", 737),
        NodeType("p5.4xlarge", 16, 256, 1, "H100", 118),
        NodeType("p5.48xlarge", 192, 2048, 8, "H100", 100),
        NodeType("p5e.48xlarge", 192, 2048, 8, "H200", 100),
        NodeType("p5en.48xlarge", 192, 2048, 8, "H200", 198),
        NodeType("g2-standard-4", 4, 16, 1, "L4"),
        NodeType("g2-standard-8", 8, 32, 1, "L4"),
        NodeType("g2-standard-12", 12, 48, 1, "L4"),
        NodeType("g2-standard-16", 16, 64, 1, "L4"),
        NodeType("g2-standard-24", 24, 96, 2, "L4"),
        NodeType("g2-standard-32", 32, 128, 1, "L4"),
        NodeType("g2-standard-48", 48, 192, 4, "L4"),
        NodeType("g2-standard-96", 96, 384, 8, "L4"),
        NodeType("a2-highgpu-1g", 12, 85, 1, "A100"),
        NodeType("a2-highgpu-2g", 24, 170, 2, "A100"),
        NodeType("a2-highgpu-4g", 48, 340, 4, "A100"),
        NodeType("a2-highgpu-8g", 96, 680, 8, "A100"),
        NodeType("a3-highgpu-1g", 26, 234, 1, "H100"),
        NodeType("a3-highgpu-2g", 52, 468, 2, "H100"),
        NodeType("a3-highgpu-4g", 104, 936, 4, "H100"),
        NodeType("a3-highgpu-8g", 208, 1872, 8, "H100"),
    )
}


def allocatable_on_eks(node: NodeType) -> Room:
    """Return what EKS's node image leaves to pods.

    The kubelet reserves a part of the cores (`_unreserved_millicores`), and 255 MiB of memory and 11 MiB for each pod
    that the node may have. Source: ``nodeadm/internal/kubelet/config.go`` in
    https://github.com/awslabs/amazon-eks-ami. If the CNI delegates prefixes, small nodes may have 110 pods instead of
    `max_pods`, and about 0.6 GiB less.
    """
    reserved = 255 + 11 * node.max_pods
    return Room(_unreserved_millicores(node.vcpus), _visible_mib(node) - reserved - EVICTION_MIB)


def allocatable_on_gke(node: NodeType) -> Room:
    """Return what a node of GKE Standard leaves to pods.

    GKE reserves the same part of the cores as EKS, and of the memory 25 % of the first 4 GiB, 20 % of the next 4, 10 %
    of the next 8, 6 % of the next 112, and 2 % of the rest. Source:
    https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes.
    """
    visible, reserved, start = _visible_mib(node), 0.0, 0
    for end, share in ((4, 0.25), (8, 0.20), (16, 0.10), (128, 0.06), (node.memory_gib, 0.02)):
        reserved += share * max(0, min(visible, end * 1024) - start * 1024)
        start = end
    return Room(_unreserved_millicores(node.vcpus), visible - round(reserved) - EVICTION_MIB)


def allocatable_on_ecs(node: NodeType) -> Room:
    """Return what the ECS agent registers for tasks.

    That is every vCPU, and the memory that the kernel sees less ``ECS_RESERVED_MEMORY``, which our nodes leave at 0.
    Sources: ``getResources`` in https://github.com/aws/amazon-ecs-agent, and
    https://docs.aws.amazon.com/AmazonECS/latest/developerguide/memory-management.html.
    """
    return Room(1000 * node.vcpus, _visible_mib(node))


def _unreserved_millicores(vcpus: int) -> int:
    """Return the cores that kubelets do not reserve: 6 % of the first, 1 % of the second, 0.5 % of two, 0.25 %."""
    shares = [60, 10, 5, 5][:vcpus]
    return int(1000 * vcpus - sum(shares) - 2.5 * max(0, vcpus - 4))


def _visible_mib(node: NodeType) -> int:
    return int(node.memory_gib * 1024 * VM_MEMORY_SHARE)


def shortfall(
    node: NodeType,
    platform: Platform,
    gpus: int,
    cpu: float | None,
    memory_gib: int | None,
    gpu_type: GpuType | None = None,
) -> str | None:
    """Return why a shard does not fit on an empty node, and what would fit; None when it fits.

    Parameters
    ----------
    node, platform
        The node's type, and what runs it. DaemonSets take `DAEMON_SETS_MILLICORES` and `DAEMON_SETS_MIB` of a node of
        EKS or GKE.
    gpus, cpu, memory_gib, gpu_type
        What the shard asks for. None: nothing.
    """
    if platform == "ECS" and not node.on_aws:
        return f"{node.name} is not a type of EC2"
    if gpu_type not in (None, node.gpu_type):
        return f"gpu_type {gpu_type} does not fit {node.name}, which has {node.gpu_type}"
    if gpus > node.gpus:
        return f"gpus {gpus} does not fit {node.name}, which has {node.gpus}"
    rooms = {"EKS": allocatable_on_eks, "GKE": allocatable_on_gke, "ECS": allocatable_on_ecs}
    room = rooms[platform](node)
    millicores, mib, less = room.millicores, room.memory_mib, ""
    if platform != "ECS":
        millicores, mib = millicores - DAEMON_SETS_MILLICORES, mib - DAEMON_SETS_MIB
        less = ", less what DaemonSets request"
    users = "tasks" if platform == "ECS" else "pods"
    if cpu is not None and cpu * 1000 > millicores:
        return (
            f"cpu {cpu:g} does not fit {node.name}, which has {room.millicores / 1000:g} for {users} on "
            f"{platform}{less}: at most {millicores // 100 / 10:g}"
        )
    if memory_gib is not None and memory_gib * 1024 > mib:
        return (
            f"memory_gib {memory_gib} does not fit {node.name}, which has {room.memory_mib / 1024:.1f} for {users} on "
            f"{platform}{less}: at most {mib // 1024}"
        )
    return None
