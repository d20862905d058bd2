"""The run coordinator that copies a shard's placement from its asset to its run.

Dagster's launchers read the tags of a *run*, but an asset's placement is in the tags of a *step*. Every submitted run
(from the web interface, the daemon or `launch`) passes through the coordinator, which reads the steps from the run's
execution plan. `config.placement` makes the tags; this module only carries them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import dagster as dg
from dagster._core.events import RunFailureReason
from dagster._core.instance import DagsterInstance
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext
from dagster._core.storage.tags import ROOT_RUN_ID_TAG, RUN_FAILURE_REASON_TAG
from dagster._serdes import ConfigurableClassData

from census_tf_dagster.config.placement import NODE_TAG, ON_DEMAND_TAG
from census_tf_dagster.errors import UserError

Platform = Literal["ecs", "kubernetes"]
Tags = Mapping[str, str]

PLACED_BY: dict[str, dict[str, str]] = {
    "ecs": dict.fromkeys(
        ("ecs/run_task_kwargs", "ecs/container_overrides", "ecs/task_overrides", "ecs/cpu", "ecs/memory"), ""
    ),
    "kubernetes": {"dagster-k8s/config": "{}"},
}
"""The tags with which each launcher places a run, each with its neutral value. The first one names the node."""

SIZES = ("ecs/cpu", "ecs/memory")
SIZE_RESOURCES = ("cpu", "memory", "ephemeral-storage")
"""The sizes that a run's own tags may change."""

ASKED_TAG, PLACED_TAG = "census_tf/placement_asked", "census_tf/placement_digest"
"""On a run that was placed: the run's own placing tags, and a digest of the result. A retry inherits both."""

PURCHASE_TAG, MISSED_TAG = "census_tf/purchase", "census_tf/nodes_missed"
"""On a run: ``on_demand`` once its shard has moved to such nodes, and how often ECS had no node for it. A retry
inherits both."""
_ON_DEMAND = {ON_DEMAND_TAG: "", PURCHASE_TAG: "on_demand"}
FAULTS = {
    RunFailureReason.STEP_FAILURE.value,
    RunFailureReason.RUN_EXCEPTION.value,
    RunFailureReason.JOB_INITIALIZATION_FAILURE.value,
}
"""Dagster's reasons of a failure whose worker was there. Run monitoring gives no reason for a worker that was lost."""


class PlacingRunCoordinator(QueuedRunCoordinator[DagsterInstance]):
    """Dagster's queue, which places each run when it is submitted.

    Configure it in `dagster.yaml` under ``run_coordinator``, with ``platform``: ``ecs`` or ``kubernetes``.
    """

    def __init__(self, platform: Platform, inst_data: ConfigurableClassData | None = None, **queue: Any) -> None:
        super().__init__(inst_data=inst_data, **queue)
        self._platform = platform

    @classmethod
    def config_type(cls) -> Any:
        """Return the configuration that `dagster.yaml` may have."""
        platforms = dg.Enum("Platform", [dg.EnumValue(name) for name in PLACED_BY])
        return {**super().config_type(), "platform": dg.Field(platforms)}  # type: ignore[dict-item]

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Make a coordinator from the configuration in `dagster.yaml`."""
        return cls(inst_data=inst_data, **config_value)

    def submit_run(self, context: SubmitRunContext) -> dg.DagsterRun:
        """Place the run, then queue it.

        Raises
        ------
        UserError
            When the run's plan cannot be read, its steps disagree, or its own tags would move it to another node.
            Dagster marks the run as failed.
        """
        run = context.dagster_run
        if run.status == dg.DagsterRunStatus.NOT_STARTED:
            try:
                steps = step_tags(self._instance, run)
                may_move = any(ON_DEMAND_TAG in tags for tags in steps.values())
                lost = lost_nodes(self._instance, run) if may_move else 0
                self._instance.add_run_tags(run.run_id, place(self._platform, steps, run.tags, lost))
            except UserError:
                # Otherwise Dagster would submit the run again and again, and each time it would be refused.
                self._instance.add_run_tags(run.run_id, {"dagster/max_retries": "0"})
                raise
        return super().submit_run(context)


def step_tags(instance: DagsterInstance, run: dg.DagsterRun) -> dict[str, Tags]:
    """Return the tags of the steps that a run will execute, from its persisted plan.

    Raises
    ------
    UserError
        When the plan cannot be read. Such a run might need a GPU, so it must not start.
    """
    try:
        if run.execution_plan_snapshot_id is None:
            raise LookupError("the run has no plan")
        plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
        steps = {step.key: step.tags or {} for step in plan.steps}
        return {key: steps[key] for key in plan.step_keys_to_execute}
    except Exception as error:
        raise UserError(
            f"run {run.run_id}: its execution plan cannot be read ({type(error).__name__}: {error}), so its node is "
            "unknown. The run was not started; launch it again."
        ) from error


def lost_nodes(instance: DagsterInstance, run: dg.DagsterRun) -> int:
    """Count the nodes that a run's shard has lost, or did not get, in this run and those that it retries."""
    missed = int(run.tags.get(MISSED_TAG, "0"))
    if run.root_run_id is None:
        return missed
    group = [
        *instance.get_runs(dg.RunsFilter(run_ids=[run.root_run_id])),
        *instance.get_runs(dg.RunsFilter(tags={ROOT_RUN_ID_TAG: run.root_run_id})),
    ]
    failed = [one for one in group if one.status == dg.DagsterRunStatus.FAILURE]
    return missed + sum(one.tags.get(RUN_FAILURE_REASON_TAG) not in FAULTS for one in failed)


def move_on_ecs(instance: DagsterInstance, run: dg.DagsterRun) -> bool:
    """Tell whether a run for which no spot node came now moves to on-demand nodes, and change its tags.

    The caller notes in `MISSED_TAG` that no node came, once ECS has accepted a new task.
    """
    move = json.loads(run.tags.get(ON_DEMAND_TAG) or "null")
    if move is None or lost_nodes(instance, run) + 1 < move["after"]:
        return False
    moved = {name: value for name, value in move["tags"].items() if name in PLACED_BY["ecs"]}
    placed = {name: run.tags[name] for name in PLACED_BY["ecs"] if name in run.tags} | moved
    instance.add_run_tags(run.run_id, {**moved, **_ON_DEMAND, PLACED_TAG: _digest(placed)})
    return True


def place(platform: str, steps: Mapping[str, Tags], run: Tags, lost: int = 0) -> dict[str, str]:
    """Return the tags that place a run.

    Steps without a placement run on the node of the other steps.

    Parameters
    ----------
    platform
        The platform whose tags are used.
    steps
        The tags of each step, by step key.
    run
        The run's own tags. A retry's tags include the placement of its parent.
    lost
        Number of spot nodes that the shard has lost or did not get.

    Raises
    ------
    UserError
        When steps disagree, when a step needs a GPU and no placement for this platform is declared, or when the run's
        own tags change more than sizes.
    """
    names = PLACED_BY[platform]
    own = {name: run[name] for name in names if run.get(name)}
    if run.get(PLACED_TAG) == _digest(own):
        # A retry inherited these tags from its parent. The plan may have a newer placement, so they are dropped.
        own = json.loads(run[ASKED_TAG])
        stale = {name: nothing for name, nothing in names.items() if run.get(name)} | {NODE_TAG: "cpu"}
        stale |= {name: "" for name in (ON_DEMAND_TAG, PURCHASE_TAG) if run.get(name)}
    else:
        stale = {}
    wanted = _agreed(platform, steps)
    if not wanted:
        return stale | own if stale else {}
    placed = {name: value for name, value in wanted.items() if name in names}
    purchase: Tags = {}
    if ON_DEMAND_TAG in wanted:
        move = json.loads(wanted[ON_DEMAND_TAG])
        purchase = {ON_DEMAND_TAG: wanted[ON_DEMAND_TAG]}
        if run.get(PURCHASE_TAG) == "on_demand" or lost >= move["after"]:
            placed |= {name: value for name, value in move["tags"].items() if name in names}
            purchase = _ON_DEMAND
    for name, value in own.items():
        placed[name] = _resized(name, placed.get(name, ""), value)
    return {
        **stale,
        **placed,
        **{name: wanted[name] for name in (NODE_TAG,) if name in wanted},
        **purchase,
        ASKED_TAG: json.dumps(own),
        PLACED_TAG: _digest(placed),
    }


def _agreed(platform: str, steps: Mapping[str, Tags]) -> Tags:
    """Return the placing tags that all steps with a placement have; none when no step has one."""
    names = (NODE_TAG, *PLACED_BY[platform], ON_DEMAND_TAG)
    asks = {key: {name: tags[name] for name in names if name in tags} for key, tags in steps.items()}
    asking = {key: tags for key, tags in asks.items() if tags}
    if not asking:
        return {}
    (first, wanted), *others = asking.items()
    for key, tags in others:
        if tags != wanted:
            raise UserError(
                f"steps {first} and {key} ask for different nodes: {wanted} and {tags}; a run has only one node. "
                "Launch them as separate runs."
            )
    if NODE_TAG in wanted and names[1] not in wanted:
        raise UserError(
            f"step {first} needs a GPU, and this deployment has no placement for {platform}. Declare it in "
            "placement.yaml in the folder of sets (docs/placement.md)."
        )
    return wanted


def _resized(name: str, wanted: str, own: str) -> str:
    """Return the asset's placing tag with the sizes of the run's own tag."""
    if name in SIZES or own == wanted:
        return own
    if name == "dagster-k8s/config":
        config, asked = json.loads(wanted or "{}"), json.loads(own)
        for kind in ("requests", "limits"):
            resources = asked.get("container_config", {}).get("resources", {}).get(kind, {})
            sizes = {key: resources.pop(key) for key in SIZE_RESOURCES if key in resources}
            if sizes:
                config["container_config"]["resources"].setdefault(kind, {}).update(sizes)
        if _within(asked, config):
            return json.dumps(config, sort_keys=True)
    raise UserError(
        f"the run's own tag {name} is {own}, but its asset's placement says {wanted or 'nothing'}. Expected tags that "
        f"change sizes only ({', '.join(SIZES)}; in dagster-k8s/config the resources "
        f"{', '.join(SIZE_RESOURCES)}). Change the set's placement instead."
    )


def _within(part: Any, whole: Any) -> bool:
    """Tell whether everything in `part` is also in `whole`, with the same value."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(
            _within(value, whole.get(key, {} if isinstance(value, dict) else None)) for key, value in part.items()
        )
    return bool(part == whole)


def _digest(placed: Tags) -> str:
    # An empty tag says nothing, and a retry cannot know whether its parent had it.
    stated = sorted((name, value) for name, value in placed.items() if value)
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:16]
