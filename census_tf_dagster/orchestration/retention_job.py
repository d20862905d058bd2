"""The job that applies a deployment's retention policy, and its schedule. `store.prune` does the work."""

import dagster as dg

from census_tf_dagster.config.retention import Retention
from census_tf_dagster.orchestration.resources import StoreResource

WEEKLY = "0 7 * * 1"
"""Mondays at 7."""


def build_retention(retention: Retention) -> dg.Definitions:
    """Build the job that applies a retention policy, and its schedule."""

    @dg.op(
        description="Lists the plans and arrays that the policy covers, and removes or archives those that were listed "
        "a week ago.",
    )
    def prune_old_arrays(context: dg.OpExecutionContext, store: StoreResource) -> None:
        from census_tf_dagster.store.prune import announce, apply, candidates

        uri, storage = store.uri(), store.storage()
        busy = frozenset(_busy(context.instance))
        chosen = [one for one in candidates(uri, storage, retention) if one.set_and_release not in busy]
        due = announce(uri, storage, chosen)
        for candidate in chosen:
            context.log.info(f"{'now' if candidate in due else 'in a week'}: {retention.policy} {candidate}")
        for line in apply(uri, storage, retention, due):
            context.log.warning(line)
        context.log.info(f"policy {retention.policy}: {len(chosen)} listed, {len(due)} done")

    @dg.job(
        description="Applies retention.yaml: lists old plans and arrays, and a week later removes or archives them."
    )
    def retention_job() -> None:
        prune_old_arrays()

    schedule = dg.ScheduleDefinition(
        name="retention_weekly",
        job=retention_job,
        cron_schedule=WEEKLY,
        description="It is off until you switch it on. Its first run only lists.",
    )
    return dg.Definitions(jobs=[retention_job], schedules=[schedule])


def _busy(instance: dg.DagsterInstance) -> set[tuple[str, str]]:
    """Return the (set, release) of every run that waits or works."""
    waiting = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)
    working = (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
    runs = instance.get_runs(dg.RunsFilter(statuses=[*waiting, *working]))
    return {
        (key.path[0], run.tags["dagster/partition"].partition("|")[0])
        for run in runs
        for key in run.asset_selection or ()
        if "dagster/partition" in run.tags
    }
