"""When assets of a set run by themselves: plan, approval, shards, array, each once for a release that is added.

A release that was there before a set's `auto_start` was switched on is not started: `launch` does that.
"""

import warnings
from collections.abc import Mapping

import dagster as dg

from census_tf_dagster.config.cost import Spending

AUTOMATIC_TAGS = ("dagster/from_automation_condition", "dagster/sensor_name", "dagster/schedule_name")
"""On runs that no person asked for. A retry inherits them."""

CONDITION_TAG = AUTOMATIC_TAGS[0]

EVERY_SECONDS = 30

Condition = dg.AutomationCondition[dg.AssetKey | dg.AssetCheckKey]


def once_for_new_partitions(spending: Spending) -> Condition | None:
    """Return the condition of plan, shards and array; None for a set that does not start by itself.

    What was materialized once is never asked for again: a new plan does not spend GPU time anew. Nor is what somebody
    has just launched, or what failed: mending that is a person's matter.
    """
    if not spending.auto_start:
        return None
    condition = (
        dg.AutomationCondition.on_missing()
        & ~dg.AutomationCondition.in_progress()
        & ~dg.AutomationCondition.execution_failed()
        # A plan that is being made again may lack an approval.
        & ~dg.AutomationCondition.any_deps_in_progress()
    )
    return condition.with_label("once_for_new_partitions")


def whenever_planned(spending: Spending) -> Condition | None:
    """Return the condition of the approval: every plan is judged, also one made again for a release."""
    return dg.AutomationCondition.eager().with_label("whenever_planned") if spending.auto_start else None


def is_automatic(tags: Mapping[str, str]) -> bool:
    """Tell whether a run with these tags was started without a person."""
    return any(tag in tags for tag in AUTOMATIC_TAGS)


def automation_sensor(name: str, spending: Spending) -> dg.AutomationConditionSensorDefinition | None:
    """Return what evaluates the conditions of the set `name`; None for a set that does not start by itself.

    One for each set, so that no run holds assets of two. It starts running: the set's YAML has said so.
    """
    if not spending.auto_start:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        return dg.AutomationConditionSensorDefinition(
            f"{name}_auto_start",
            target=dg.AssetSelection.groups(name),
            default_status=dg.DefaultSensorStatus.RUNNING,
            minimum_interval_seconds=EVERY_SECONDS,
            description=f"Starts what auto_start of {name} allows: plan, approval, shards, array of a new release.",
        )
