"""The sensor `lost_runs`: it ends runs whose worker is gone, and workers whose run is; it requests what was lost.

Dagster's own run monitoring cannot see the workers of its default launcher, so after a reboot their runs would block
the queue for ever. On ECS and Kubernetes it sees them, and the sensor ignores those runs. A retry is lost when
Dagster's daemon reads a failed run just before the run is marked for its retry (Dagster issue 33741). A node is lost
when ECS stops a task for which none came; Dagster looks at a run only once it has started. On Kubernetes, Dagster ends
a run that does not start in time and leaves its Job, which would start later on a GPU node (Dagster issue 16535).

This is a sensor because sensors are evaluated where the default launcher's workers run: in the code server's container.
"""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.executor.in_process import InProcessExecutor

from census_tf_dagster.config.dagster_names import (
    ASKED_AGAIN,
    LOOK_BACK_DAYS,
    LOST_RUNS,
    RETRIED_BY_TAG,
    WILL_RETRY_TAG,
)
from census_tf_dagster.io.worker_process import WorkerProcess
from census_tf_dagster.run_coordinator import MISSED_TAG, move_on_ecs

if TYPE_CHECKING:
    from dagster._core.events import DagsterEvent
    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.plan import ExecutionPlan

EVERY_SECONDS = 30
OWED_SECONDS = 60.0
"""Dagster's daemon looks every 5 s. A retry that has not started after this time was lost."""
MOST_ASKED = 5
"""The most requests for one retry."""
START_FAULT = re.compile(r"\b[A-Z]\w+Error\b|exit code -?\d+")
"""A reason why a task cannot start. ECS names each like ``CannotPullContainerError``, and a lack of capacity otherwise
(docs.aws.amazon.com/AmazonECS/latest/developerguide/stopped-task-error-codes.html)."""
FORGOTTEN_SECONDS = 3600.0
"""ECS describes a stopped task for about an hour. A new one may be unknown for a moment."""
LINGER_SECONDS = 60.0
"""A worker that has reported the end of its run may take so long to exit."""
TASK_TAG = "ecs/task_arn"
"""With this tag, Dagster's ECS launcher remembers the task of a run."""


class _MarkingExecutor(InProcessExecutor):
    """Dagster's in-process executor, which first writes its process into the tags of the run."""

    def execute(
        self, plan_context: "PlanOrchestrationContext", execution_plan: "ExecutionPlan"
    ) -> "Iterator[DagsterEvent]":
        run = plan_context.run_id
        plan_context.instance.add_run_tags(run, WorkerProcess.this(run).tags())
        yield from super().execute(plan_context, execution_plan)


def _create(context: dg.InitExecutorContext) -> dg.Executor:
    create = dg.in_process_executor.executor_creation_fn
    assert create is not None
    plain = create(context)
    return _MarkingExecutor(plain.retries, plain.step_dependency_config)


marking_executor = dg.ExecutorDefinition(
    name="in_process", config_schema=dg.in_process_executor.config_schema.as_field(), executor_creation_fn=_create
)
"""Executes all steps in the run's own process. The tags of the run name that process."""


def build_lost_runs() -> dg.Definitions:
    """Build the sensor `lost_runs`."""

    @dg.sensor(
        name=LOST_RUNS,
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Ends runs whose worker is gone and workers whose run is; requests lost nodes and retries.",
    )
    def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        instance = context.instance
        found = [
            *end_lost_runs(instance),
            *ask_for_nodes_again(instance),
            *ask_for_lost_retries(instance),
            *delete_jobs_left_behind(instance),
        ]
        for line in found:
            context.log.warning(line)
        return dg.SkipReason("; ".join(found) or "nothing was lost")

    return dg.Definitions(sensors=[lost_runs])


def end_lost_runs(instance: dg.DagsterInstance) -> Iterator[str]:
    """End the runs whose worker is certainly gone, and yield a line about each.

    Dagster retries them if `dagster.yaml` says so. A run whose worker cannot be seen from here is not ended, because a
    second worker on its shard would cost money.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])):
        worker = WorkerProcess.of(run.run_id, run.tags)
        if worker is None or worker.alive() is not False:
            continue
        # A worker records the end of its run before it exits. It may have done so since the runs were read.
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.is_finished:
            continue
        why = f"The worker of this run is gone ({worker}): it was killed, ran out of memory, or its machine restarted."
        if now.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(now, why)
        else:
            instance.report_run_failed(now, why)
        yield f"run {run.run_id} ended: {worker} is gone"


def ask_for_nodes_again(instance: dg.DagsterInstance) -> Iterator[str]:
    """Start a new task for each run whose ECS task was stopped before a node came, and yield a line about each.

    ECS stops a task that has waited 10 to 30 minutes for capacity (github.com/aws/containers-roadmap/issues/2381).
    Dagster would notice it at the start timeout, and count it as one of the shard's tries. A run whose task stopped
    for another reason (an image that cannot be pulled, a worker that ended at once) fails now instead of then.
    """
    from dagster._core.launcher import LaunchRunContext, WorkerStatus

    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING])):
        run = record.dagster_run
        if TASK_TAG not in run.tags:
            continue
        try:
            health = instance.run_launcher.check_run_worker_health(run)
        except Exception as error:
            yield f"run {run.run_id}: its task cannot be seen ({type(error).__name__}: {error})"
            continue
        stopped = health.status == WorkerStatus.FAILED
        # ECS has forgotten the task. It stopped while no sensor was looking.
        silent = time.time() - record.update_timestamp.timestamp() > FORGOTTEN_SECONDS
        forgotten = health.status == WorkerStatus.UNKNOWN and silent
        # The worker may have begun, and ended, since the runs were read.
        now = instance.get_run_by_id(run.run_id)
        if not (stopped or forgotten) or now is None or now.status != dg.DagsterRunStatus.STARTING:
            continue
        said = health.msg or "its task stopped"
        if fault := START_FAULT.search(said):
            instance.report_run_failed(now, f"The worker could not start ({fault[0]}).\n{said}")
            yield f"run {run.run_id} failed: its worker could not start ({fault[0]})"
            continue
        wanted = "an on-demand node" if move_on_ecs(instance, now) else "one"
        placed = instance.get_run_by_id(run.run_id) or now
        try:
            instance.run_launcher.launch_run(LaunchRunContext(placed, workspace=None))
        except Exception as error:
            yield f"run {run.run_id}: no node came for its task, and a new one was refused ({error})"
            continue
        instance.add_run_tags(run.run_id, {MISSED_TAG: str(int(now.tags.get(MISSED_TAG, "0")) + 1)})
        instance.report_engine_event(f"No node came for the task of this run, so a new task waits for {wanted}.", now)
        yield f"run {run.run_id}: no node came for its task, and a new task waits for {wanted}"


def ask_for_lost_retries(instance: dg.DagsterInstance) -> Iterator[str]:
    """Request the retries that Dagster announced and did not start, and yield a line about each.

    Dagster's daemon retries a run once, when it reads the event of its failure. So this reports the failure again. If
    no retry is possible, it withdraws the announcement, and a backfill that waits for the retry ends.
    """
    statuses = [dg.DagsterRunStatus.FAILURE]
    recent = datetime.now(UTC) - timedelta(days=LOOK_BACK_DAYS)
    wanted = dg.RunsFilter(statuses=statuses, tags={WILL_RETRY_TAG: "true"}, updated_after=recent)
    for record in instance.get_run_records(wanted):
        run = record.dagster_run
        # This time may come from the clock of a worker, which may be ahead.
        if RETRIED_BY_TAG in run.tags or abs(time.time() - record.update_timestamp.timestamp()) < OWED_SECONDS:
            continue
        asked = _times_asked(instance, run.run_id)
        if not instance.run_retries_enabled or _backfill_has_ended(instance, run) or asked == MOST_ASKED:
            instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: "false"})
            instance.report_engine_event("This run will not be retried any more.", run)
            yield f"run {run.run_id}: it will not be retried any more"
        else:
            instance.report_run_failed(run, f"{ASKED_AGAIN}; it is requested again ({asked + 1}).")
            yield f"run {run.run_id}: its retry was lost, and was requested again"


def _times_asked(instance: dg.DagsterInstance, run_id: str) -> int:
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    return sum((event.get_dagster_event().message or "").startswith(ASKED_AGAIN) for event in events)


def _backfill_has_ended(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES

    name = run.tags.get("dagster/backfill")
    backfill = instance.get_backfill(name) if name else None
    return name is not None and (backfill is None or backfill.status in BULK_ACTION_TERMINAL_STATUSES)


def delete_jobs_left_behind(instance: dg.DagsterInstance) -> Iterator[str]:
    """Delete each Kubernetes Job whose run has ended without it, and yield a line about each.

    A run ends without its Job when it does not start in time, when its worker is declared lost and is not, or when
    deleting the Job failed at a cancellation. A Job whose run is not in Dagster's records belongs to another Dagster.
    """
    from dagster._core.storage.dagster_run import FINISHED_STATUSES

    configured = instance.get_ref().run_launcher_data if instance.is_persistent else None
    # To make an ECS launcher just to look at its class would ask AWS each time.
    if configured is None or configured.class_name != "KubernetesRunLauncher":
        return
    from census_tf_dagster.orchestration.run_launcher import KubernetesRunLauncher

    try:
        launcher = instance.run_launcher
        assert isinstance(launcher, KubernetesRunLauncher)
        jobs = launcher.unfinished_jobs()
    except Exception as error:
        yield f"the Jobs cannot be listed ({type(error).__name__}: {error})"
        return
    if not jobs:  # A filter without a run id would let all runs pass.
        return
    ended = dg.RunsFilter(run_ids=list(jobs.values()), statuses=FINISHED_STATUSES)
    runs = {record.dagster_run.run_id: record for record in instance.get_run_records(ended)}
    for name, run_id in jobs.items():
        if run_id not in runs or time.time() - (runs[run_id].end_time or 0) < LINGER_SECONDS:
            continue
        try:
            launcher.delete_job(name)
        except Exception as error:
            yield f"run {run_id} has ended, and its Job {name} cannot be deleted ({type(error).__name__}: {error})"
            continue
        instance.report_engine_event(f"This run has ended, so its Job {name} was deleted.", runs[run_id].dagster_run)
        yield f"run {run_id} has ended, so its Job {name} was deleted"
