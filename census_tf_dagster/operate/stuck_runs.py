"""Runs that do not move: those whose worker is gone or silent, and those whose retry was lost.

The sensor `lost_runs` mends what it can; `status` and `launch` say what it has to do, and whether it does.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from census_tf_dagster.config.dagster_names import LOOK_BACK_DAYS, LOST_RUNS, SHARDS, WILL_RETRY_TAG
from census_tf_dagster.durations import duration
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.observations import ShardProgress, progress_of
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.runs import Run, fetch_runs

SILENT_SECONDS = 1800.0
"""A shard that works says so every half minute; loading a model takes minutes."""

SENSOR = """query Sensor($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) { ... on Sensor { sensorState { status } } }
  instance { daemonHealth { daemonStatus(daemonType: "SENSOR") { healthy } } }
}"""


@dataclass(frozen=True)
class Stuck:
    """A run that does not move, and why."""

    run: str
    asset: str
    partition: str
    why: str
    mends_itself: bool
    """Whether the sensor `lost_runs` can mend it."""
    page: str
    """The run in the web interface."""

    def __str__(self) -> str:
        return f"{self.asset} {self.partition} {self.why}: {self.page}"


def find_stuck(
    deployment: Deployment,
    of: RemoteSet,
    release: str,
    running: Sequence[Run],
    told: Mapping[str, ShardProgress] | None = None,
) -> list[Stuck]:
    """Return the runs of a release that do not move.

    Parameters
    ----------
    deployment, of, release
        Whose runs.
    running
        Those of the release that are running.
    told
        What running shards have said last, by partition; None: ask for it.
    """
    if told is None:
        told = progress_of(deployment, of, [run for run in running if run.asset == SHARDS])
    found = [(run, *judged) for run in running if (judged := _judge(run, told.get(run.partition)))]
    wanted: dict[str, object] = {
        "statuses": ["FAILURE"],
        "tags": [{"key": WILL_RETRY_TAG, "value": "true"}],
        "updatedAfter": time.time() - LOOK_BACK_DAYS * 86400,
    }
    for run in fetch_runs(deployment, of, wanted):
        if run.owed_retry and run.partition.partition("|")[0] == release:
            since = duration(time.time() - (run.ended or run.updated))
            found.append((run, f"failed {since} ago, and the retry that Dagster announced has not started", True))
    pages = f"{deployment.url}/runs"
    return [Stuck(run.id, run.asset, run.partition, why, itself, f"{pages}/{run.id}") for run, why, itself in found]


def _judge(run: Run, told: ShardProgress | None) -> tuple[str, bool] | None:
    """Return why a running run does not move, and whether the sensor can mend that."""
    alive = run.worker.alive() if run.worker else None
    if alive is False:
        return f"has lost its worker ({run.worker})", True
    silent = time.time() - max(run.started or run.updated, told.at if told else 0.0)
    if alive or run.asset != SHARDS or silent < SILENT_SECONDS:
        return None
    where = f"its worker ({run.worker}) cannot be seen from here" if run.worker else "it names no worker"
    why = f"has said nothing for {duration(silent)}, and {where}; if that is gone, end the run with Terminate, forced"
    return why, False


def nobody_mends(deployment: Deployment, of: RemoteSet, stuck: Iterable[Stuck]) -> str | None:
    """Return what a person has to switch on so that the sensor mends what it can; None when it does so by itself."""
    if not any(one.mends_itself for one in stuck):
        return None
    selector = {
        "repositoryLocationName": of.location,
        "repositoryName": "__repository__",
        "sensorName": LOST_RUNS,
    }
    answer = deployment.ask(SENSOR, selector=selector)
    if answer["sensorOrError"].get("sensorState", {}).get("status") != "RUNNING":
        return f"switch on the sensor {LOST_RUNS} ({deployment.url}/automation)"
    if not answer["instance"]["daemonHealth"]["daemonStatus"]["healthy"]:
        return "start the dagster-daemon with the same DAGSTER_HOME"
    return None
