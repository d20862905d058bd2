"""The job that follows a deployment's policy for old plans and arrays, and its schedule."""

import dagster as dg

from census_tf_dagster.config.retention import Retention
from census_tf_dagster.orchestration.resources import StoreResource

WEEKLY = "0 7 * * 1"


def build_retention(retention: Retention) -> dg.Definitions:
    """Build the job that follows a policy, and its schedule."""

    @dg.op(description="Lists what the policy would touch, and does it to what an earlier run listed a week ago.")
    def prune_old_arrays(context: dg.OpExecutionContext, store: StoreResource) -> None:
        from census_tf_dagster.store.prune import announce, apply, candidates

        uri, storage = store.uri(), store.storage()
        busy = frozenset(_busy(context.instance))
        chosen = [one for one in candidates(uri, storage, retention) if one.set_and_release not in busy]
        due = announce(uri, storage, chosen)
        for one in chosen:
            context.log.info(f"{'now' if one in due else 'in a week'}: {retention.policy} {one}")
        for line in apply(uri, storage, retention, due):
            context.log.warning(line)
        context.log.info(f"policy {retention.policy}: {len(chosen)} listed, {len(due)} done")

    @dg.job(description="Follows retention.yaml: lists what would go, and a week later does it.")
    def retention_job() -> None:
        prune_old_arrays()

    schedule = dg.ScheduleDefinition(
        name="retention_weekly",
        job=retention_job,
        cron_schedule=WEEKLY,
        description="Off until somebody switches it on. Its first run only lists.",
    )
    return dg.Definitions(jobs=[retention_job], schedules=[schedule])


def _busy(instance: dg.DagsterInstance) -> set[tuple[str, str]]:
    """Return the sets and releases that runs wait for or work on."""
    waiting = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)
    working = (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
    runs = instance.get_runs(dg.RunsFilter(statuses=[*waiting, *working]))
    return {
        (key.path[0], run.tags["dagster/partition"].partition("|")[0])
        for run in runs
        for key in run.asset_selection or ()
        if "dagster/partition" in run.tags
    }
