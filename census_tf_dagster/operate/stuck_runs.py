"""Finds runs that are stuck: their worker is gone or reports nothing, or their retry was lost.

The sensor `lost_runs` repairs what it can. This module only finds and explains; `status` and `launch` print the result.
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
"""A working shard reports every half minute, and loading a model takes minutes. A longer silence is suspicious."""

SENSOR = """query Sensor($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) { ... on Sensor { sensorState { status } } }
  instance { daemonHealth { daemonStatus(daemonType: "SENSOR") { healthy } } }
}"""


@dataclass(frozen=True)
class Stuck:
    """A stuck run and the reason."""

    run: str
    asset: str
    partition: str
    why: str
    repaired_by_sensor: bool
    """Whether the sensor `lost_runs` can repair it."""
    page: str
    """Address of the run in the web interface."""

    def __str__(self) -> str:
        return f"{self.asset} {self.partition} {self.why}: {self.page}"


def find_stuck(
    deployment: Deployment,
    remote_set: RemoteSet,
    release: str,
    running: Sequence[Run],
    progress: Mapping[str, ShardProgress] | None = None,
) -> list[Stuck]:
    """Return the stuck runs of a release.

    Parameters
    ----------
    deployment, remote_set, release
        The deployment, set and release of the runs.
    running
        The running runs of the release.
    progress
        The last progress of running shards, by partition; None: ask the deployment.
    """
    if progress is None:
        progress = progress_of(deployment, remote_set, [run for run in running if run.asset == SHARDS])
    found = [(run, *reason) for run in running if (reason := why_stuck(run, progress.get(run.partition)))]
    wanted: dict[str, object] = {
        "statuses": ["FAILURE"],
        "tags": [{"key": WILL_RETRY_TAG, "value": "true"}],
        "updatedAfter": time.time() - LOOK_BACK_DAYS * 86400,
    }
    for run in fetch_runs(deployment, remote_set, wanted):
        if run.owed_retry and run.partition.partition("|")[0] == release:
            since = duration(time.time() - (run.ended or run.updated))
            found.append((run, f"failed {since} ago, and the retry that Dagster announced has not started", True))
    pages = f"{deployment.url}/runs"
    return [Stuck(run.id, run.asset, run.partition, why, sensor, f"{pages}/{run.id}") for run, why, sensor in found]


def why_stuck(run: Run, progress: ShardProgress | None) -> tuple[str, bool] | None:
    """Return why a running run is stuck, and whether the sensor can repair it; None when it is not stuck."""
    alive = run.worker.alive() if run.worker else None
    if alive is False:
        return f"has lost its worker ({run.worker})", True
    silent = time.time() - max(run.started or run.updated, progress.at if progress else 0.0)
    if alive or run.asset != SHARDS or silent < SILENT_SECONDS:
        return None
    where = f"its worker ({run.worker}) cannot be seen from here" if run.worker else "its worker is unknown"
    why = f"has reported nothing for {duration(silent)}, and {where}; if the worker is gone, force-terminate the run"
    return why, False


def needed_for_repair(deployment: Deployment, remote_set: RemoteSet, stuck: Iterable[Stuck]) -> str | None:
    """Return what a person must do so that the sensor repairs stuck runs; None when nothing is needed."""
    if not any(run.repaired_by_sensor for run in stuck):
        return None
    selector = {
        "repositoryLocationName": remote_set.location,
        "repositoryName": "__repository__",
        "sensorName": LOST_RUNS,
    }
    answer = deployment.ask(SENSOR, selector=selector)
    if answer["sensorOrError"].get("sensorState", {}).get("status") != "RUNNING":
        return f"switch on the sensor {LOST_RUNS} ({deployment.url}/automation)"
    if not answer["instance"]["daemonHealth"]["daemonStatus"]["healthy"]:
        return "start the dagster-daemon with the same DAGSTER_HOME"
    return None
