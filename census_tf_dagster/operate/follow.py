"""Follows a backfill to its end: prints a line when its progress changes, and at the end each failure and its cause."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from census_tf_dagster.config.dagster_names import ARRAY, PLAN, REUSED, SHARDS
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.backfills import SUCCEEDED, Backfill, fetch
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.runs import (
    QUEUED,
    RUNNING,
    Run,
    failure_reason,
    fetch_runs,
    latest,
    materializations,
    seconds_left,
)
from census_tf_dagster.operate.shard_ranges import compact

POLL_SECONDS = 2.0
LINE_EVERY_SECONDS = 30.0
"""A line is printed at least this often."""
PATIENCE_SECONDS = 600.0
"""How long the webserver may be unreachable, for example during a deployment, before following ends."""
OVERLAP_SECONDS = 10.0
"""A run may be stored a little later than its update time says."""
REASONS, REASON_LINES = 20, 5
"""How many failures are printed with their reason, and how many lines of each reason."""


@dataclass(frozen=True)
class Progress:
    """The progress of a backfill. A new line is printed only when it changes."""

    plan: str | None
    done: int
    running: int
    failed: int
    left: int
    array: str | None
    copied: int | None = None
    """Shards whose reused cells are copied; None when the set reuses none."""
    stuck: int = 0
    """Runs whose worker is gone, or whose retry has not started."""


def follow(deployment: Deployment, remote_set: RemoteSet, release: str, backfill: Backfill) -> int:
    """Print the progress until the backfill ends, then the outcome. Return 0 for success and 1 for failure.

    Raises
    ------
    UserError
        When the webserver has not answered for ten minutes.
    """
    watch = _Watch(deployment, remote_set, release, backfill)
    answered = printed = time.monotonic()
    shown: Progress | str | None = None
    while True:
        now: Progress | str
        try:
            backfill = watch.update()
            now, text = watch.progress, watch.text()
            answered = time.monotonic()
        except UserError as error:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise
            now, text = str(error), f"the status is unknown, trying again: {error}"
        if now != shown or time.monotonic() - printed >= LINE_EVERY_SECONDS:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
            shown, printed = now, time.monotonic()
        if not backfill.is_running:
            return _outcome(deployment, remote_set, release, backfill, watch.runs)
        time.sleep(POLL_SECONDS)


class _Watch:
    """Reads what has changed since the last update."""

    def __init__(self, deployment: Deployment, remote_set: RemoteSet, release: str, backfill: Backfill) -> None:
        self.deployment, self.remote_set, self.release, self.backfill = deployment, remote_set, release, backfill
        self.by_id: dict[tuple[str, str], Run] = {}
        self.runs: Mapping[tuple[str, str], Run] = {}
        self.progress = Progress(None, 0, 0, 0, len(backfill.work.shards), None)
        self.partitions = [remote_set.partition(release, shard) for shard in backfill.work.shards]
        self.stored = materializations(deployment, remote_set, SHARDS, self.partitions)

    def update(self) -> Backfill:
        """Read the backfill, then its runs. In this order the runs are final if the backfill has ended."""
        self.backfill = fetch(self.deployment, self.remote_set, self.release, self.backfill.id)
        wanted: dict[str, object] = {"tags": [{"key": "dagster/backfill", "value": self.backfill.id}]}
        if self.by_id:
            wanted["updatedAfter"] = max(run.updated for run in self.by_id.values()) - OVERLAP_SECONDS
        # One run may contain the plan and its approval.
        self.by_id.update({(run.id, run.asset): run for run in fetch_runs(self.deployment, self.remote_set, wanted)})
        self.runs = latest(self.by_id.values())
        states = [_state(self.runs.get((SHARDS, partition))) for partition in self.partitions]
        done = states.count("done")
        if done != self.progress.done:
            self.stored = materializations(self.deployment, self.remote_set, SHARDS, self.partitions)
        plan, array = self.runs.get((PLAN, self.release)), self.runs.get((ARRAY, self.release))
        self.progress = Progress(
            plan=_state(plan) if self.backfill.work.plan else None,
            done=done,
            running=states.count("running"),
            failed=states.count("failed"),
            left=len(states) - done - states.count("running") - states.count("failed"),
            array=_state(array) if self.backfill.work.array else None,
            copied=sum(_state(self.runs.get((REUSED, one))) == "done" for one in self.partitions)
            if self.backfill.work.reused
            else None,
            stuck=sum(run.owed_retry or (run.status in RUNNING and _is_lost(run)) for run in self.runs.values()),
        )
        return self.backfill

    def text(self) -> str:
        """Return the progress as one line."""
        now = self.progress
        parts = [f"plan {now.plan}"] if now.plan else []
        parts.append(
            f"shards {now.done}/{len(self.partitions)} done, {now.running} running, {now.failed} failed, "
            f"{now.left} left"
        )
        parts += [] if now.copied is None else [f"copies {now.copied}/{len(self.partitions)} done"]
        parts += [f"array {now.array}"] if now.array else []
        parts += [f"{now.stuck} stuck (`status` says why)"] if now.stuck else []
        if now.running or now.left:
            seconds = self._seconds_left()
            parts.append("time left unknown" if seconds is None else f"about {duration(seconds)} left for shards")
        elif self.backfill.is_running:
            parts.append("Dagster checks every 30 s what to start next")
        return "; ".join(parts)

    def _seconds_left(self) -> float | None:
        shards = [run for run in self.runs.values() if run.asset == SHARDS]
        unrequested = [
            partition
            for partition in self.partitions
            if (SHARDS, partition) not in self.runs and (self.backfill.work.recompute or partition not in self.stored)
        ]
        return seconds_left(
            [run for run in shards if run.status in QUEUED | RUNNING],
            [run for run in shards if run.status == "SUCCESS"],
            self.stored,
            now=time.time(),
            unrequested=len(unrequested),
        )


def _is_lost(run: Run) -> bool:
    return run.worker is not None and run.worker.alive() is False


def _state(run: Run | None) -> str:
    if run is None or run.status in QUEUED:
        return "waiting"
    if run.status in RUNNING:
        return "running"
    return "done" if run.status == "SUCCESS" else "failed"


def _outcome(
    deployment: Deployment, remote_set: RemoteSet, release: str, backfill: Backfill, runs: Mapping[tuple[str, str], Run]
) -> int:
    """Print the outcome and return the exit code."""
    # A run may contain the plan and its approval. It is printed once.
    failed = list({run.id: run for run in runs.values() if _state(run) != "done"}.values())
    if backfill.status in SUCCEEDED and not failed:
        took = duration(time.time() - backfill.created)
        print(f"done: {remote_set.name} {release}: {backfill.work}, {took} after the launch")
        if backfill.work.array and (array := materializations(deployment, remote_set, ARRAY, [release]).get(release)):
            print(f"array: {array.paths.get('array')}")
        return 0
    lines: list[str] = [f"backfill {backfill.id} of {remote_set.name} {release} ended as {backfill.status}"]
    if backfill.error:
        lines.append(f"Dagster's error: {backfill.error}")
    for run in failed[:REASONS]:
        reason = failure_reason(deployment, run.id).splitlines()[:REASON_LINES]
        lines.append(f"{run.asset} {run.partition} {run.status.lower()}: {deployment.url}/runs/{run.id}")
        lines += [f"    {line}" for line in reason]
    if len(failed) > REASONS:
        lines.append(f"and {len(failed) - REASONS} more")
    print("\n".join([*lines, _what_to_do(remote_set, release, backfill, failed)]), file=sys.stderr)
    return 1


def _what_to_do(remote_set: RemoteSet, release: str, backfill: Backfill, failed: list[Run]) -> str:
    command = f"census-tf-dagster launch {remote_set.name} {release}"
    if not backfill.work.plan:
        command += f" --shards {compact(backfill.work.shards)}"
    recompute = " --recompute" if backfill.work.recompute else ""
    if backfill.status == "CANCELED":
        return f"It was cancelled. To continue: {command}{recompute}"
    if failed and all(run.asset in (SHARDS, REUSED) for run in failed):
        command = f"census-tf-dagster launch {remote_set.name} {release}"
        shards = compact({run.shard for run in failed})
        return f"Correct the causes above, then launch only these shards: {command} --shards {shards}{recompute}"
    # If only the array failed, all shards were computed.
    again = recompute if not failed or any(run.asset != ARRAY for run in failed) else ""
    return f"Correct the causes above, then launch again (finished shards do nothing): {command}{again}"
