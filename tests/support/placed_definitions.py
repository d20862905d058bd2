"""The package's definitions with what a deployment may add: a sensor, a schedule and an automation condition.

The sensor and the schedule ask for one shard each of the set `gpu`, the condition for the one of the set `auto`.
"""

import dagster as dg

from census_tf_dagster.definitions import build_definitions, census_resource, load_sets, sets_folder, store_resource
from tests.support import forked_runs

__all__ = ["defs", "forked_runs"]

RELEASE = "2025-11-08"
"""The release of tests/support/project.py. That module imports packages that no server should import."""
SHARDS = dg.AssetKey(["gpu", "shard_embeddings"])
AUTO = dg.AssetKey(["auto", "shard_embeddings"])
MISSING = (
    dg.AutomationCondition.missing()
    & ~dg.AutomationCondition.in_progress()
    & ~dg.AutomationCondition.any_deps_missing()
    & ~dg.AutomationCondition.execution_failed()
)


@dg.sensor(target=[SHARDS], default_status=dg.DefaultSensorStatus.RUNNING, minimum_interval_seconds=5)
def sensor() -> dg.RunRequest:
    return dg.RunRequest(run_key="once", partition_key=f"{RELEASE}|1")


@dg.schedule(target=[SHARDS], cron_schedule="* * * * *", default_status=dg.DefaultScheduleStatus.RUNNING)
def schedule() -> dg.RunRequest:
    return dg.RunRequest(run_key="once", partition_key=f"{RELEASE}|2")


@dg.definitions
def defs() -> dg.Definitions:
    sets = build_definitions(load_sets(sets_folder()), census_resource(), store_resource())
    automatic = sets.map_asset_specs(
        func=lambda spec: spec.replace_attributes(automation_condition=MISSING) if spec.key == AUTO else spec
    )
    automation = dg.AutomationConditionSensorDefinition(
        "automation",
        target=dg.AssetSelection.assets(AUTO),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=5,
    )
    return dg.Definitions.merge(automatic, dg.Definitions(sensors=[sensor, automation], schedules=[schedule]))
