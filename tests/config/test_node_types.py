"""What is left of a node for a shard, against figures that the platforms' own tools publish."""

import pytest

from census_tf_dagster.config.node_types import (
    NODE_TYPES,
    NodeType,
    Platform,
    Room,
    allocatable_on_ecs,
    allocatable_on_eks,
    allocatable_on_gke,
    shortfall,
)


@pytest.mark.parametrize(
    ("name", "millicores", "memory_mib"),
    [
        # The allocatable resources that Karpenter's reference of instance types lists.
        ("g5.xlarge", 3920, 14162),
        ("g6e.xlarge", 3920, 29317),
        ("g6e.2xlarge", 7910, 59627),
        ("g6.12xlarge", 47810, 178933),
        ("g6e.48xlarge", 191450, 1449132),
        ("p4d.24xlarge", 95690, 1082712),
        ("p5.48xlarge", 191450, 1938410),
    ],
)
def test_eks(name: str, millicores: int, memory_mib: int) -> None:
    assert allocatable_on_eks(NODE_TYPES[name]) == Room(millicores, memory_mib)


def test_gke() -> None:
    # Of 29.6 GiB that are visible: 1 + 0.8 + 0.8 + 0.816 GiB are reserved.
    assert allocatable_on_gke(NODE_TYPES["g2-standard-8"]) == Room(7910, 30310 - 3498 - 100)
    # Of 1731.6 GiB: 9.32 GiB of the first 128, and 2 % of the rest.
    assert allocatable_on_gke(NODE_TYPES["a3-highgpu-8g"]) == Room(207410, 1773158 - 42385 - 100)


def test_gke_is_cautious() -> None:
    # An e2-standard-4 with 16 GiB has 3,920m and 13,498,416 KiB, says Google's page about the sizes of nodes.
    found = allocatable_on_gke(NodeType("e2-standard-4", 4, 16, 0, "L4"))
    assert found.millicores == 3920
    assert 0.94 < found.memory_mib * 1024 / 13_498_416 < 1


def test_ecs() -> None:
    assert allocatable_on_ecs(NODE_TYPES["g6e.xlarge"]) == Room(4000, 30310)


@pytest.mark.parametrize(
    ("name", "platform", "asked", "expected"),
    [
        ("g6e.xlarge", "EKS", (1, 3.6, 28), None),
        ("g6e.xlarge", "ECS", (1, 4, 29), None),
        ("g2-standard-8", "GKE", (1, 7.6, 25), None),
        ("g6e.48xlarge", "EKS", (8, None, None), None),
        (
            "g6e.xlarge",
            "EKS",
            (1, 4, 28),
            "cpu 4 does not fit g6e.xlarge, which has 3.92 for pods on EKS, less what DaemonSets request: at most 3.6",
        ),
        (
            "g2-standard-8",
            "GKE",
            (1, 4, 28),
            "memory_gib 28 does not fit g2-standard-8, which has 26.1 for pods on GKE, less what DaemonSets request: "
            "at most 25",
        ),
        (
            "g6e.xlarge",
            "ECS",
            (1, 4, 32),
            "memory_gib 32 does not fit g6e.xlarge, which has 29.6 for tasks on ECS: at most 29",
        ),
        ("g6e.xlarge", "EKS", (2, 1, 1), "gpus 2 does not fit g6e.xlarge, which has 1"),
    ],
)
def test_a_shard_on_a_node(
    name: str, platform: Platform, asked: tuple[int, float | None, int | None], expected: str | None
) -> None:
    assert shortfall(NODE_TYPES[name], platform, *asked) == expected
