"""The package's definitions, with sensors that look every 10 s instead of every 30 or 60, and runs that are forked."""

from census_tf_dagster.orchestration import automation
from census_tf_dagster.orchestration.sensors import lost_runs, new_files
from tests.support import forked_runs

for module in (automation, lost_runs, new_files):
    module.EVERY_SECONDS = 10

from census_tf_dagster.definitions import defs  # noqa: E402

__all__ = ["defs", "forked_runs"]
