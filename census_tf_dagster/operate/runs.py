"""Runs and materializations of a set, as the webserver tells them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from census_tf_dagster.config.dagster_names import ASKED_AGAIN, RECOMPUTE_TAG, RETRIED_BY_TAG, WILL_RETRY_TAG
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.worker_process import WorkerProcess
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet

PAGE = 500
QUEUED = frozenset({"QUEUED", "NOT_STARTED"})
RUNNING = frozenset({"STARTING", "STARTED", "MANAGED", "SUSPENDED", "CANCELING"})

RUNS = """query Runs($filter: RunsFilter!, $limit: Int!, $cursor: String) {
  runsOrError(filter: $filter, limit: $limit, cursor: $cursor) {
    __typename
    ... on Error { message }
    ... on Runs {
      results { runId status creationTime startTime endTime updateTime assetSelection { path } tags { key value } }
    }
  }
}"""

MATERIALIZATIONS = """query Materializations($asset: AssetKeyInput!, $partitions: [String!]!) {
  assetNodeOrError(assetKey: $asset) {
    __typename
    ... on Error { message }
    ... on AssetNode {
      latestMaterializationByPartition(partitions: $partitions) {
        runId timestamp partition
        metadataEntries {
          label
          ... on IntMetadataEntry { intRepr }
          ... on FloatMetadataEntry { floatValue }
          ... on PathMetadataEntry { path }
          ... on TextMetadataEntry { text }
        }
      }
    }
  }
}"""

EVENTS = """query Events($run: ID!, $cursor: String) {
  logsForRun(runId: $run, afterCursor: $cursor, limit: 1000) {
    __typename
    ... on Error { message }
    ... on EventConnection {
      cursor hasMore
      events {
        __typename
        ... on MessageEvent { message }
        ... on ErrorEvent { error { message causes { message } } }
        ... on ExecutionStepFailureEvent { failureMetadata { description } }
      }
    }
  }
}"""


ENDED_FROM_OUTSIDE = "This run has been marked as failed from outside"
"""What Dagster says of a run whose process it lost."""


@dataclass(frozen=True)
class Run:
    """A run of one of a set's assets. Times are seconds since 1970."""

    id: str
    asset: str
    partition: str
    """Partition key: a release, or release|shard."""
    status: str
    created: float
    started: float | None
    ended: float | None
    updated: float
    recompute: bool
    owed_retry: bool = False
    """Whether it failed, and Dagster announced a retry that has not started."""
    worker: WorkerProcess | None = None
    """The process that does its work, once that has begun."""

    @property
    def shard(self) -> int:
        """The number of the shard, of a shard's run."""
        return int(self.partition.rpartition("|")[2])


@dataclass(frozen=True)
class Materialization:
    """The last materialization of a partition."""

    run_id: str
    at: float
    numbers: Mapping[str, int]
    paths: Mapping[str, str]
    figures: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def fetch_runs(deployment: Deployment, of: RemoteSet, runs_filter: Mapping[str, object]) -> list[Run]:
    """Return the runs of one set that match a ``RunsFilter``, newest first."""
    found: list[Run] = []
    cursor = None
    while True:
        answer = deployment.ask(RUNS, filter=runs_filter, limit=PAGE, cursor=cursor)
        page = expect(answer["runsOrError"], "Runs", "runs")["results"]
        found += [run for one in page for run in _runs(one, of.name)]
        if len(page) < PAGE:
            return found
        cursor = page[-1]["runId"]


def _runs(one: dict[str, Any], set_name: str) -> Iterator[Run]:
    tags = {tag["key"]: tag["value"] for tag in one["tags"]}
    for key in one["assetSelection"] or ():
        if key["path"][0] == set_name and len(key["path"]) == 2 and "dagster/partition" in tags:
            yield Run(
                id=one["runId"],
                asset=key["path"][1],
                partition=tags["dagster/partition"],
                status=one["status"],
                created=one["creationTime"],
                started=one["startTime"],
                ended=one["endTime"],
                updated=one["updateTime"] or one["creationTime"],
                recompute=tags.get(RECOMPUTE_TAG) == "true",
                owed_retry=one["status"] == "FAILURE"
                and tags.get(WILL_RETRY_TAG) == "true"
                and RETRIED_BY_TAG not in tags,
                worker=WorkerProcess.of(one["runId"], tags),
            )


def latest(runs: Iterable[Run]) -> dict[tuple[str, str], Run]:
    """Return the newest run of each (asset, partition): a retry hides what it retries."""
    return {(run.asset, run.partition): run for run in sorted(runs, key=lambda run: run.created)}


def materializations(
    deployment: Deployment, of: RemoteSet, asset: str, partitions: Sequence[str]
) -> dict[str, Materialization]:
    """Return the last materialization of those partitions that have one."""
    answer = deployment.ask(MATERIALIZATIONS, asset=of.key(asset), partitions=partitions)
    node = expect(answer["assetNodeOrError"], "AssetNode", f"{of.name}/{asset}")
    return {
        one["partition"]: Materialization(
            run_id=one["runId"],
            at=float(one["timestamp"]) / 1000,
            numbers={entry["label"]: int(entry["intRepr"]) for entry in one["metadataEntries"] if "intRepr" in entry},
            paths={entry["label"]: entry["path"] for entry in one["metadataEntries"] if "path" in entry},
            figures={entry["label"]: entry["floatValue"] for entry in one["metadataEntries"] if "floatValue" in entry},
            texts={entry["label"]: entry["text"] for entry in one["metadataEntries"] if "text" in entry},
        )
        for one in node["latestMaterializationByPartition"]
        if one is not None
    }


def seconds_left(
    active: Iterable[Run],
    finished: Iterable[Run],
    stored: Mapping[str, Materialization],
    *,
    now: float,
    unrequested: int = 0,
) -> float | None:
    """Estimate when shards will be done, from those that are and how many run at once now.

    Parameters
    ----------
    active
        Shard runs that run or wait.
    finished
        Shard runs that succeeded; one that found all its cells in the array says nothing about the others.
    stored
        Last materializations by partition: waiting for one of these again takes no time, unless it is to recompute.
    now
        Seconds since 1970.
    unrequested
        Shards that will be computed and have no run yet.

    Returns
    -------
    float | None
        Seconds, or None when nothing has finished, or nothing ran lately.
    """
    computed = {one.run_id for one in stored.values() if one.numbers.get("cells_computed", 1)}
    spans = [(run.started, run.ended) for run in finished if run.id in computed]
    ended = [(start, end) for start, end in spans if start is not None and end is not None]
    if not ended:
        return None
    each = max(1.0, fmean(end - start for start, end in ended))
    active = list(active)
    started = [now if run.started is None else min(now, run.started) for run in active if run.status in RUNNING]
    # Between the end of one run and the start of the next fewer run than do on average.
    busy = sum(max(0.0, end - max(start, now - each)) for start, end in [*ended, *((start, now) for start in started)])
    at_once = max(len(started), busy / each)
    if not at_once:
        return None
    rest = [max(0.0, each - (now - start)) for start in started]
    waiting = [run for run in active if run.status in QUEUED and (run.recompute or run.partition not in stored)]
    return max([*rest, (sum(rest) + each * (len(waiting) + unrequested)) / at_once])


def failure_reason(deployment: Deployment, run_id: str) -> str:
    """Return why a run failed: what it raised, or Dagster's last word on it."""
    reason = "no reason is on record"
    cursor = None
    while True:
        try:
            answer = deployment.ask(EVENTS, run=run_id, cursor=cursor)
            page = expect(answer["logsForRun"], "EventConnection", f"run {run_id}")
        except UserError as error:
            return str(error)
        for event in page["events"]:
            if event["__typename"] == "ExecutionStepFailureEvent":
                return _step_failure(event)
            if event["__typename"] in ("RunFailureEvent", "RunCanceledEvent"):
                raised = event.get("error")
                message = (raised["message"] if raised else event["message"]).strip()
                if message.startswith(ASKED_AGAIN):
                    continue
                reason = message
                if reason.startswith(ENDED_FROM_OUTSIDE):
                    reason = f"its process ended without a word: killed, out of memory, or its node is gone ({reason})"
        if not page["hasMore"]:
            return reason
        cursor = page["cursor"]


def _step_failure(event: dict[str, Any]) -> str:
    described = (event["failureMetadata"] or {}).get("description")
    if described:
        return str(described).strip()
    if not event["error"]:
        return str(event["message"]).strip()
    # The last cause is what was raised first; those before it wrap it.
    errors = [event["error"], *event["error"]["causes"]]
    return str(errors[-1]["message"]).strip()
