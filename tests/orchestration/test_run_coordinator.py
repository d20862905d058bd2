"""The placement that a run gets from its steps: disagreeing steps, the run's own tags, retries, unreadable plans."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import JobFailureData, RunFailureReason
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.test_utils import instance_for_test
from dagster_shared.check import CheckError

from census_tf_dagster.config.placement import Placement
from census_tf_dagster.errors import UserError
from census_tf_dagster.run_coordinator import (
    ASKED_TAG,
    PLACED_TAG,
    PURCHASE_TAG,
    PlacingRunCoordinator,
    lost_nodes,
    place,
    step_tags,
)
from tests.support.placements import PLACEMENT, TAGS

ECS = {name: value for name, value in TAGS.items() if name.startswith(("ecs/", "census_tf/"))}
K8S = {name: TAGS[name] for name in ("dagster-k8s/config", "census_tf/node")}
MOVES = Placement.model_validate(PLACEMENT | {"on_demand_after": 2}).tags()
ON_DEMAND = Placement.model_validate(PLACEMENT | {"purchase": "on_demand"}).tags()
NEWER = Placement.model_validate(PLACEMENT | {"memory_gib": 60}).tags()


def placed(platform: str, step: dict[str, str], **run: str) -> dict[str, str]:
    """Return the placing tags of a run of one step, without the coordinator's own tags."""
    tags = place(platform, {"shard": step}, run)
    return {name: value for name, value in tags.items() if name not in (ASKED_TAG, PLACED_TAG)}


@pytest.mark.parametrize(("platform", "expected"), [("ecs", ECS), ("kubernetes", K8S)])
def test_a_run_gets_what_its_step_asks_for(platform: str, expected: dict[str, str]) -> None:
    assert placed(platform, TAGS) == expected
    assert place(platform, {"plan": {}, "check": {"other": "tag"}}, {}) == {}
    assert place(platform, {"plan": {}}, {"ecs/cpu": "512"}) == {}


def test_steps_that_ask_for_nothing_follow_and_steps_that_disagree_are_an_error() -> None:
    assert place("ecs", {"check": {}, "shard": TAGS, "same": TAGS}, {}) == place("ecs", {"shard": TAGS}, {})
    with pytest.raises(UserError, match="steps shard and other ask for different nodes"):
        place("ecs", {"shard": TAGS, "other": NEWER}, {})
    ecs_only = {"shard": TAGS, "other": TAGS | {"dagster-k8s/config": "{}"}}
    assert place("ecs", ecs_only, {}) == place("ecs", {"shard": TAGS}, {})


@pytest.mark.parametrize(("platform", "other"), [("ecs", K8S), ("kubernetes", ECS), ("ecs", {"census_tf/node": "gpu"})])
def test_a_gpu_without_a_placement_for_the_platform_is_refused(platform: str, other: dict[str, str]) -> None:
    with pytest.raises(UserError, match=rf"needs a GPU, and this deployment has no placement for {platform}"):
        place(platform, {"shard": other}, {})


def k8s(**changes: Any) -> str:
    return json.dumps(changes)


def test_own_tags_may_change_sizes() -> None:
    assert placed("ecs", TAGS, **{"ecs/memory": "61440"}) == ECS | {"ecs/memory": "61440"}
    asked = k8s(container_config={"resources": {"requests": {"memory": "60Gi"}, "limits": {"memory": "60Gi"}}})
    expected = json.loads(TAGS["dagster-k8s/config"])
    for kind in ("requests", "limits"):
        expected["container_config"]["resources"][kind]["memory"] = "60Gi"
    assert json.loads(placed("kubernetes", TAGS, **{"dagster-k8s/config": asked})["dagster-k8s/config"]) == expected


@pytest.mark.parametrize(
    ("platform", "name", "value"),
    [
        ("ecs", "ecs/run_task_kwargs", '{"launchType": "FARGATE"}'),
        ("ecs", "ecs/container_overrides", '{"cpu": 256}'),
        ("ecs", "ecs/task_overrides", '{"containerOverrides": []}'),
        ("kubernetes", "dagster-k8s/config", k8s(container_config={"resources": {"limits": {"nvidia.com/gpu": "0"}}})),
        ("kubernetes", "dagster-k8s/config", k8s(container_config={"image": "cpu-only"})),
        ("kubernetes", "dagster-k8s/config", k8s(pod_spec_config={"node_selector": {"example.com/pool": "cpu"}})),
        ("kubernetes", "dagster-k8s/config", k8s(pod_spec_config={"node_name": "node-1"})),
        ("kubernetes", "dagster-k8s/config", k8s(job_spec_config={"suspend": True})),
    ],
)
def test_own_tags_cannot_move_a_shard(platform: str, name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"the run's own tag {name} is .* Expected tags that change sizes only"):
        place(platform, {"shard": TAGS}, {name: value})


@pytest.mark.parametrize(
    ("platform", "own", "size"),
    [
        ("ecs", {"ecs/cpu": "2048"}, ("ecs/cpu", "2048")),
        (
            "kubernetes",
            {"dagster-k8s/config": k8s(container_config={"resources": {"requests": {"cpu": "2000m"}}})},
            ("dagster-k8s/config", '"cpu": "2000m"'),
        ),
    ],
)
def test_a_retry_keeps_the_run_s_sizes_and_takes_a_newer_placement(
    platform: str, own: dict[str, str], size: tuple[str, str]
) -> None:
    first = own | place(platform, {"shard": TAGS}, own)
    again = first | place(platform, {"shard": TAGS}, first)
    assert again == first
    newer = again | place(platform, {"shard": NEWER}, again)
    assert newer != first
    assert ("61440" if platform == "ecs" else "60Gi") in str(newer)
    assert all(size[1] in tags[size[0]] for tags in (first, again, newer))
    # Edited by hand since: no longer what was placed, so it counts as the run's own.
    moved = {"ecs/run_task_kwargs": "{}"} if platform == "ecs" else {"dagster-k8s/config": '{"job_config": {"x": 1}}'}
    edited = first | moved
    with pytest.raises(UserError, match="Expected tags that change sizes only"):
        place(platform, {"shard": TAGS}, edited)


def test_what_a_newer_placement_no_longer_asks_for_is_taken_back() -> None:
    first = place("ecs", {"shard": TAGS}, {})
    without = {name: value for name, value in TAGS.items() if name != "ecs/cpu"}
    assert place("ecs", {"shard": without}, first)["ecs/cpu"] == ""
    assert place("ecs", {"shard": {}}, first) == {
        "ecs/run_task_kwargs": "",
        "ecs/container_overrides": "",
        "ecs/cpu": "",
        "ecs/memory": "",
        "census_tf/node": "cpu",
    }


@pytest.mark.parametrize(("platform", "node"), [("ecs", "ecs/run_task_kwargs"), ("kubernetes", "dagster-k8s/config")])
def test_a_shard_moves_to_on_demand_nodes_and_stays_there(platform: str, node: str) -> None:
    first = place(platform, {"shard": MOVES}, {})
    second = first | place(platform, {"shard": MOVES}, first, 1)
    assert first[node] == second[node] == TAGS[node]
    assert PURCHASE_TAG not in second
    third = second | place(platform, {"shard": MOVES}, second, 2)
    assert (third[node], third[PURCHASE_TAG]) == (ON_DEMAND[node], "on_demand")
    # A count that starts again, as when the records of old runs were deleted.
    assert third | place(platform, {"shard": MOVES}, third) == third
    back = third | place(platform, {"shard": TAGS}, third, 3)
    assert (back[node], back[PURCHASE_TAG]) == (TAGS[node], "")


def test_a_retry_moves_though_the_task_definition_has_the_sizes() -> None:
    unsized = {"cpu": None, "memory_gib": None, "on_demand_after": 1}
    moves = Placement.model_validate(PLACEMENT | unsized).tags()
    first = place("ecs", {"shard": moves}, {})
    assert place("ecs", {"shard": moves}, first, 1)["ecs/run_task_kwargs"] == ON_DEMAND["ecs/run_task_kwargs"]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    coordinator = {
        "module": "census_tf_dagster.run_coordinator",
        "class": "PlacingRunCoordinator",
        "config": {"platform": "ecs"},
    }
    with instance_for_test({"run_coordinator": coordinator}) as found:
        yield found


@dg.asset(op_tags=TAGS)
def shard() -> None: ...


@dg.asset(op_tags=MOVES)
def moving() -> None: ...


def of_retry(first: dg.DagsterRun, failed: dg.DagsterRun) -> dict[str, Any]:
    """What Dagster gives to the retry of a failed run: its tags, and the names of both."""
    names = {"dagster/root_run_id": first.run_id, "dagster/parent_run_id": failed.run_id}
    return {"root_run_id": first.run_id, "parent_run_id": failed.run_id, "tags": {**failed.tags, **names}}


@pytest.mark.parametrize(
    ("reason", "lost"),
    [
        (None, 1),  # Run monitoring gives none for a worker that was lost.
        (RunFailureReason.UNEXPECTED_TERMINATION, 1),  # SIGTERM, such as that of a drained node of Kubernetes.
        (RunFailureReason.START_TIMEOUT, 1),
        (RunFailureReason.RUN_WORKER_RESTART, 1),
        (RunFailureReason.STEP_FAILURE, 0),
        (RunFailureReason.RUN_EXCEPTION, 0),
        (RunFailureReason.JOB_INITIALIZATION_FAILURE, 0),
    ],
)
def test_only_nodes_that_were_lost_count(
    instance: dg.DagsterInstance, reason: RunFailureReason | None, lost: int
) -> None:
    assets = dg.Definitions(assets=[shard]).resolve_implicit_global_asset_job_def()
    other, first = instance.create_run_for_job(assets), instance.create_run_for_job(assets)
    instance.report_run_failed(other)
    ended = JobFailureData(error=None, failure_reason=reason) if reason else None
    instance.report_run_failed(first, "it failed", ended)
    second = instance.create_run_for_job(assets, **of_retry(first, first))
    assert (lost_nodes(instance, first), lost_nodes(instance, second)) == (0, lost)
    instance.report_run_failed(second, "it failed", ended)
    third = instance.create_run_for_job(assets, **of_retry(first, second))
    assert lost_nodes(instance, third) == 2 * lost


def test_a_shard_that_lost_its_nodes_is_submitted_for_others(instance: dg.DagsterInstance) -> None:
    assets = dg.Definitions(assets=[moving]).resolve_implicit_global_asset_job_def()
    run = first = instance.create_run_for_job(assets)
    used = []
    for _ in range(4):
        submitted = SubmitRunContext(run, workspace=None)  # type: ignore[arg-type]
        with pytest.raises(CheckError, match="external_pipeline_origin"):
            instance.run_coordinator.submit_run(submitted)
        placed = instance.get_run_by_id(run.run_id)
        assert placed is not None
        used.append(json.loads(placed.tags["ecs/run_task_kwargs"])["capacityProviderStrategy"][0]["capacityProvider"])
        instance.report_run_failed(placed, "its node is gone")
        run = instance.create_run_for_job(assets, **of_retry(first, placed))
    assert used == ["gpu-spot", "gpu-spot", "gpu-on-demand", "gpu-on-demand"]


def test_the_plan_is_read_as_it_was_persisted(instance: dg.DagsterInstance) -> None:
    run = instance.create_run_for_job(dg.Definitions(assets=[shard]).resolve_implicit_global_asset_job_def())
    assert step_tags(instance, run) == {"shard": TAGS}


@pytest.mark.parametrize("snapshot", [None, "gone"])
def test_a_run_whose_plan_cannot_be_read_is_not_queued(instance: dg.DagsterInstance, snapshot: str | None) -> None:
    run = instance.create_run_for_job(dg.Definitions(assets=[shard]).resolve_implicit_global_asset_job_def())
    coordinator = instance.run_coordinator
    assert isinstance(coordinator, PlacingRunCoordinator)
    unreadable = run._replace(execution_plan_snapshot_id=snapshot)
    with pytest.raises(UserError, match=f"run {run.run_id}: its execution plan cannot be read"):
        coordinator.submit_run(SubmitRunContext(unreadable, workspace=None))  # type: ignore[arg-type]
    left = instance.get_run_by_id(run.run_id)
    assert left is not None
    assert left.status == dg.DagsterRunStatus.NOT_STARTED
    assert left.tags["dagster/max_retries"] == "0"


def test_the_platform_must_be_said(tmp_path: Path) -> None:
    overrides = {"module": "census_tf_dagster.run_coordinator", "class": "PlacingRunCoordinator"}
    for config in ({}, {"platform": "docker"}):
        with (
            pytest.raises(dg.DagsterInvalidConfigError, match="platform"),
            instance_for_test({"run_coordinator": overrides | {"config": config}}) as found,
        ):
            assert found.run_coordinator
