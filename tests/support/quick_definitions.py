"""The package's definitions, with sensors that run as often as Dagster's daemon looks: every 5 s, not 30 s."""

from census_tf_dagster.orchestration import automation
from census_tf_dagster.orchestration.sensors import lost_runs

for module in (automation, lost_runs):
    module.EVERY_SECONDS = 10

from census_tf_dagster.definitions import defs  # noqa: E402

__all__ = ["defs"]
