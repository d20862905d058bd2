"""The conditions under which Dagster starts the assets of a set: each once, for a release that was just added.

A release that was added before you switched on a set's `auto_start` is not started automatically; run `launch`. The
decision about money belongs to the asset `approval`.
"""

import warnings
from collections.abc import Mapping

import dagster as dg

from census_tf_dagster.config.cost import Spending

AUTOMATIC_TAGS = ("dagster/from_automation_condition", "dagster/sensor_name", "dagster/schedule_name")
"""The tags of runs that no person started. A retry inherits them."""

CONDITION_TAG = AUTOMATIC_TAGS[0]
"""The tag of runs that an automation condition started."""

EVERY_SECONDS = 30

Condition = dg.AutomationCondition[dg.AssetKey | dg.AssetCheckKey]


def once_for_new_partitions(spending: Spending) -> Condition | None:
    """Return the condition of plan, shards and array; None for a set that does not start automatically.

    A partition that was materialized once is never requested again, so a new plan spends no new GPU time. Partitions
    that are in progress are not requested either. Partitions that failed are left to a person.
    """
    if not spending.auto_start:
        return None
    condition = (
        dg.AutomationCondition.on_missing()
        & ~dg.AutomationCondition.in_progress()
        & ~dg.AutomationCondition.execution_failed()
        # While a plan is made again, it may not have an approval yet.
        & ~dg.AutomationCondition.any_deps_in_progress()
    )
    return condition.with_label("once_for_new_partitions")


def once_approved(spending: Spending, approval: dg.AssetKey) -> Condition | None:
    """Return the condition of the array of a file: each approval starts it, in a run of its own.

    Plan, approval and array of a file have the same partitions, and Dagster puts such assets into one run if it may. It
    may not here: the array's run occupies a GPU node, which the approval has to precede.
    """
    if not spending.auto_start:
        return None
    approved = dg.AutomationCondition.any_deps_match(dg.AutomationCondition.newly_updated())
    condition = (
        approved.allow(dg.AssetSelection.assets(approval)).since_last_handled()
        & ~dg.AutomationCondition.any_deps_missing()
        & ~dg.AutomationCondition.any_deps_in_progress()
        & ~dg.AutomationCondition.in_progress()
    )
    return condition.with_label("once_approved")


def whenever_planned(spending: Spending) -> Condition | None:
    """Return the condition of the approval, which checks every plan, including one that was made again."""
    return dg.AutomationCondition.eager().with_label("whenever_planned") if spending.auto_start else None


def is_automatic(tags: Mapping[str, str]) -> bool:
    """Tell whether a run with these tags was started automatically."""
    return any(tag in tags for tag in AUTOMATIC_TAGS)


def automation_sensor(name: str, spending: Spending) -> dg.AutomationConditionSensorDefinition | None:
    """Return the sensor that evaluates the conditions of a set; None when the set does not start automatically.

    Each set has its own sensor, so that no run mixes assets of two sets. The sensor is on from the start, because the
    set's YAML asked for it.
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
            description=f"Starts plan, approval, shards and array of a new release, as auto_start of {name} allows.",
        )
