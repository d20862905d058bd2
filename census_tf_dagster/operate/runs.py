"""Reads the runs and materializations of a set from the webserver, and estimates the remaining time from them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from census_tf_dagster.config.dagster_names import ASKED_AGAIN, RECOMPUTE_TAG, RETRIED_BY_TAG, WILL_RETRY_TAG, key_of
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
"""The beginning of Dagster's message about a run whose process it lost."""


@dataclass(frozen=True)
class Run:
    """A run of one of a set's assets. Times are seconds since 1970."""

    id: str
    asset: str
    partition: str
    """The partition key: a release, or release|shard."""
    status: str
    created: float
    started: float | None
    ended: float | None
    updated: float
    recompute: bool
    owed_retry: bool = False
    """Whether it failed and its retry, which Dagster announced, has not started."""
    worker: WorkerProcess | None = None
    """The process that does its work; None before it starts."""

    @property
    def shard(self) -> int:
        """The number of the shard. Only runs of shards have one."""
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


def fetch_runs(deployment: Deployment, remote_set: RemoteSet, runs_filter: Mapping[str, object]) -> list[Run]:
    """Return the runs of a set that match Dagster's ``RunsFilter``, newest first."""
    found: list[Run] = []
    cursor = None
    while True:
        answer = deployment.ask(RUNS, filter=runs_filter, limit=PAGE, cursor=cursor)
        page = expect(answer["runsOrError"], "Runs", "runs")["results"]
        found += [run for one in page for run in _runs(one, remote_set.name)]
        if len(page) < PAGE:
            return found
        cursor = page[-1]["runId"]


def _runs(answer: dict[str, Any], set_name: str) -> Iterator[Run]:
    tags = {tag["key"]: tag["value"] for tag in answer["tags"]}
    for key in answer["assetSelection"] or ():
        if key["path"][0] == set_name and len(key["path"]) == 2 and "dagster/partition" in tags:
            yield Run(
                id=answer["runId"],
                asset=key["path"][1],
                partition=tags["dagster/partition"],
                status=answer["status"],
                created=answer["creationTime"],
                started=answer["startTime"],
                ended=answer["endTime"],
                updated=answer["updateTime"] or answer["creationTime"],
                recompute=tags.get(RECOMPUTE_TAG) == "true",
                owed_retry=answer["status"] == "FAILURE"
                and tags.get(WILL_RETRY_TAG) == "true"
                and RETRIED_BY_TAG not in tags,
                worker=WorkerProcess.of(answer["runId"], tags),
            )


def latest(runs: Iterable[Run]) -> dict[tuple[str, str], Run]:
    """Return the newest run of each (asset, partition). A retry replaces the run that it retries."""
    return {(run.asset, run.partition): run for run in sorted(runs, key=lambda run: run.created)}


def materializations(
    deployment: Deployment, remote_set: RemoteSet, asset: str, partitions: Sequence[str]
) -> dict[str, Materialization]:
    """Return the last materialization of each partition that has one."""
    answer = deployment.ask(MATERIALIZATIONS, asset=remote_set.key(asset), partitions=partitions)
    node = expect(answer["assetNodeOrError"], "AssetNode", f"{remote_set.name}/{asset}")
    return {
        one["partition"]: Materialization(
            run_id=one["runId"],
            at=float(one["timestamp"]) / 1000,
            numbers={name: int(entry["intRepr"]) for name, entry in entries.items() if "intRepr" in entry},
            paths={name: entry["path"] for name, entry in entries.items() if "path" in entry},
            figures={name: entry["floatValue"] for name, entry in entries.items() if "floatValue" in entry},
            texts={name: entry["text"] for name, entry in entries.items() if "text" in entry},
        )
        for one in node["latestMaterializationByPartition"]
        if one is not None
        for entries in [{key_of(entry["label"]): entry for entry in one["metadataEntries"]}]
    }


def seconds_left(
    active: Iterable[Run],
    finished: Iterable[Run],
    stored: Mapping[str, Materialization],
    *,
    now: float,
    unrequested: int = 0,
) -> float | None:
    """Estimate the time until all shards are done, from finished shards and from how many run at the same time.

    Parameters
    ----------
    active
        Runs of shards that are running or waiting.
    finished
        Runs of shards that succeeded. A run that found all its cells in the array is ignored.
    stored
        The last materializations by partition. A waiting run of one of these takes no time, unless it recomputes.
    now
        The present time, in seconds since 1970.
    unrequested
        How many shards will be computed and have no run yet.

    Returns
    -------
    float | None
        Seconds; None when no shard has finished, or none ran lately.
    """
    computed = {one.run_id for one in stored.values() if one.numbers.get("cells_computed", 1)}
    spans = [(run.started, run.ended) for run in finished if run.id in computed]
    ended = [(start, end) for start, end in spans if start is not None and end is not None]
    if not ended:
        return None
    each = max(1.0, fmean(end - start for start, end in ended))
    active = list(active)
    started = [now if run.started is None else min(now, run.started) for run in active if run.status in RUNNING]
    # Fewer runs than the average are active between the end of one run and the start of the next.
    busy = sum(max(0.0, end - max(start, now - each)) for start, end in [*ended, *((start, now) for start in started)])
    at_once = max(len(started), busy / each)
    if not at_once:
        return None
    rest = [max(0.0, each - (now - start)) for start in started]
    waiting = [run for run in active if run.status in QUEUED and (run.recompute or run.partition not in stored)]
    return max([*rest, (sum(rest) + each * (len(waiting) + unrequested)) / at_once])


def failure_reason(deployment: Deployment, run_id: str) -> str:
    """Return why a run failed: the error that it raised, or Dagster's last message about it."""
    reason = "Dagster has recorded no reason"
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
                    reason = (
                        f"its process ended without an error: killed, out of memory, or its node is gone ({reason})"
                    )
        if not page["hasMore"]:
            return reason
        cursor = page["cursor"]


def _step_failure(event: dict[str, Any]) -> str:
    described = (event["failureMetadata"] or {}).get("description")
    if described:
        return str(described).strip()
    if not event["error"]:
        return str(event["message"]).strip()
    # The last cause was raised first. The others wrap it.
    errors = [event["error"], *event["error"]["causes"]]
    return str(errors[-1]["message"]).strip()
