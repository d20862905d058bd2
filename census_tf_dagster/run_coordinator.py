"""The run coordinator that carries a shard's placement from its asset to its run, however the run was started.

Dagster's launchers read the tags of a *run*; what an asset asks for stands in the tags of a *step*. The persisted
execution plan has both: whoever submits a run (web interface, daemon, `launch`) comes through here.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import dagster as dg
from dagster._core.instance import DagsterInstance
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext
from dagster._serdes import ConfigurableClassData

from census_tf_dagster.config.placement import NODE_TAG
from census_tf_dagster.errors import UserError

Platform = Literal["ecs", "kubernetes"]
Tags = Mapping[str, str]

PLACED_BY: dict[str, dict[str, str]] = {
    "ecs": dict.fromkeys(
        ("ecs/run_task_kwargs", "ecs/container_overrides", "ecs/task_overrides", "ecs/cpu", "ecs/memory"), ""
    ),
    "kubernetes": {"dagster-k8s/config": "{}"},
}
"""The tags with which a launcher places a run, each with a value that says nothing; first the one that names a node."""

SIZES = ("ecs/cpu", "ecs/memory")
SIZE_RESOURCES = ("cpu", "memory", "ephemeral-storage")
"""What a tag of the run itself may change."""

ASKED_TAG, PLACED_TAG = "census_tf/placement_asked", "census_tf/placement_digest"
"""On a run that was placed: what its own tags asked for, and a digest of what came out. A retry inherits both."""


class PlacingRunCoordinator(QueuedRunCoordinator[DagsterInstance]):
    """Dagster's queue, with runs placed when they are submitted.

    `dagster.yaml` names it under ``run_coordinator`` with the deployment's ``platform`` (``ecs`` or ``kubernetes``).
    """

    def __init__(self, platform: Platform, inst_data: ConfigurableClassData | None = None, **queue: Any) -> None:
        super().__init__(inst_data=inst_data, **queue)
        self._platform = platform

    @classmethod
    def config_type(cls) -> Any:
        """Return what `dagster.yaml` may say."""
        platforms = dg.Enum("Platform", [dg.EnumValue(name) for name in PLACED_BY])
        return {**super().config_type(), "platform": dg.Field(platforms)}  # type: ignore[dict-item]

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Make one of what `dagster.yaml` says."""
        return cls(inst_data=inst_data, **config_value)

    def submit_run(self, context: SubmitRunContext) -> dg.DagsterRun:
        """Place the run, then queue it.

        Raises
        ------
        UserError
            When its plan cannot be read, its steps disagree, or its own tags would move it; Dagster marks it as failed.
        """
        run = context.dagster_run
        if run.status == dg.DagsterRunStatus.NOT_STARTED:
            try:
                steps = step_tags(self._instance, run)
                self._instance.add_run_tags(run.run_id, place(self._platform, steps, run.tags))
            except UserError:
                # Dagster would submit it again and again, to be refused each time.
                self._instance.add_run_tags(run.run_id, {"dagster/max_retries": "0"})
                raise
        return super().submit_run(context)


def step_tags(instance: DagsterInstance, run: dg.DagsterRun) -> dict[str, Tags]:
    """Return the tags of the steps that a run will execute, from its persisted plan.

    Raises
    ------
    UserError
        When there is no plan that can be read: such a run might need a GPU.
    """
    try:
        if run.execution_plan_snapshot_id is None:
            raise LookupError("it has none")
        plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
        steps = {step.key: step.tags or {} for step in plan.steps}
        return {key: steps[key] for key in plan.step_keys_to_execute}
    except Exception as error:
        raise UserError(
            f"run {run.run_id}: its execution plan cannot be read ({type(error).__name__}: {error}), so nobody knows "
            "which node it needs. It was not started; launch it again."
        ) from error


def place(platform: str, steps: Mapping[str, Tags], run: Tags) -> dict[str, str]:
    """Work out the tags that place a run.

    Steps that ask for nothing go where the others do.

    Parameters
    ----------
    platform
        Whose tags count.
    steps
        Tags of each step.
    run
        The run's own tags; those of a retry hold what its parent's placement was.

    Raises
    ------
    UserError
        When steps disagree, a step needs a GPU and no placement for this platform is declared, or the run's own tags
        change more than sizes.
    """
    names = PLACED_BY[platform]
    own = {name: run[name] for name in names if run.get(name)}
    if run.get(PLACED_TAG) == _digest(own):
        # Inherited from a run that was placed: the plan may say something newer.
        own = json.loads(run[ASKED_TAG])
        stale = {name: nothing for name, nothing in names.items() if run.get(name)} | {NODE_TAG: "cpu"}
    else:
        stale = {}
    wanted = _agreed(platform, steps)
    if not wanted:
        return stale | own if stale else {}
    placed = {name: value for name, value in wanted.items() if name in names}
    for name, value in own.items():
        placed[name] = _resized(name, placed.get(name, ""), value)
    return {
        **stale,
        **placed,
        **{name: wanted[name] for name in (NODE_TAG,) if name in wanted},
        ASKED_TAG: json.dumps(own),
        PLACED_TAG: _digest(placed),
    }


def _agreed(platform: str, steps: Mapping[str, Tags]) -> Tags:
    """Return what the one step that asks for a node, or all that do, ask for."""
    names = (NODE_TAG, *PLACED_BY[platform])
    asks = {key: {name: tags[name] for name in names if name in tags} for key, tags in steps.items()}
    asking = {key: tags for key, tags in asks.items() if tags}
    if not asking:
        return {}
    (first, wanted), *others = asking.items()
    for key, tags in others:
        if tags != wanted:
            raise UserError(
                f"steps {first} and {key} ask for different nodes, and a run has one: {wanted} and {tags}. Launch "
                "them as runs of their own."
            )
    if NODE_TAG in wanted and names[1] not in wanted:
        raise UserError(
            f"step {first} needs a GPU, and no placement of this deployment says where on {platform}: declare it in "
            "placement.yaml in the folder of sets (docs/placement.md)."
        )
    return wanted


def _resized(name: str, wanted: str, own: str) -> str:
    """Return a placing tag with the sizes that a run's own tag asks for."""
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
        f"the run's own tag {name} would move it from the node that its asset asks for: {own}, where the asset asks "
        f"for {wanted or 'nothing'}. A run's tag may change sizes only ({', '.join(SIZES)}; in dagster-k8s/config the "
        f"resources {', '.join(SIZE_RESOURCES)}). Change the set's placement instead."
    )


def _within(part: Any, whole: Any) -> bool:
    """Tell whether everything in `part` stands in `whole` with the same value."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(
            _within(value, whole.get(key, {} if isinstance(value, dict) else None)) for key, value in part.items()
        )
    return bool(part == whole)


def _digest(placed: Tags) -> str:
    return hashlib.sha256(json.dumps(sorted(placed.items())).encode()).hexdigest()[:16]
