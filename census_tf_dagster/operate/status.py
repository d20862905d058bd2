"""The command `status`: which parts of a release are done, running, failed or missing, and the expected finish."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, LOST_RUNS, PLAN, REUSED, SHARDS
from census_tf_dagster.durations import duration
from census_tf_dagster.operate.approve import approval_text
from census_tf_dagster.operate.backfills import find_running
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.observations import progress_of
from census_tf_dagster.operate.remote_set import RemoteSet, find_set
from census_tf_dagster.operate.runs import (
    QUEUED,
    RUNNING,
    Materialization,
    Run,
    failure_reason,
    fetch_runs,
    latest,
    materializations,
    seconds_left,
)
from census_tf_dagster.operate.shard_ranges import compact
from census_tf_dagster.operate.stuck_runs import Stuck, find_stuck, needed_for_repair

REASONS = 3
"""How many failures are shown with their reason."""
STARTS_WITHIN_SECONDS = 120.0
"""A worker that has not started after this time waits for a node."""
RECENT_RUNS = 50
"""The estimate uses this many of the last finished shards."""

PARTITIONS = """query Partitions($keys: [AssetKeyInput!]!) {
  assetNodes(assetKeys: $keys) {
    assetKey { path }
    assetPartitionStatuses {
      __typename
      ... on DefaultPartitionStatuses { ...Keys }
      ... on MultiPartitionStatuses {
        ranges { primaryDimStartKey primaryDimEndKey secondaryDim { __typename ...Keys } }
      }
    }
  }
}
fragment Keys on DefaultPartitionStatuses { materializedPartitions failedPartitions materializingPartitions }"""

CHECK = """query Check($asset: AssetKeyInput!, $release: String!) {
  assetCheckExecutions(assetKey: $asset, checkName: "verified", partition: $release, limit: 1) { status }
}"""
VERIFIED = {"SUCCEEDED": True, "FAILED": False, "EXECUTION_FAILED": False}


@dataclass(frozen=True)
class ShardStates:
    """The numbers of all shards by state. Each number is in one state. ``failed``: it failed after it was last done."""

    @classmethod
    def of(
        cls, asset: str, release: str, remote_set: RemoteSet, states: Mapping[tuple[str, ...], str]
    ) -> "ShardStates":
        """Sort the shards of a release by the state of an asset."""
        by_state: dict[str, list[int]] = {state.name: [] for state in fields(cls)}
        for shard, key in enumerate(remote_set.shard_keys):
            by_state[states.get((asset, release, key), "missing")].append(shard)
        return cls(**{state: tuple(numbers) for state, numbers in by_state.items()})

    def __str__(self) -> str:
        return ", ".join(f"{len(some)} {state} ({compact(some)})" for state, some in asdict(self).items() if some)

    done: tuple[int, ...]
    running: tuple[int, ...]
    queued: tuple[int, ...]
    failed: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True)
class ReleaseStatus:
    """The state of one release of a set."""

    release: str
    plan: str
    """``missing``, ``queued``, ``running``, ``failed`` or ``done``. `approval` and `array` have the same states."""
    approval: str
    approved: str | None
    """The last approval and its author, or the request for one; None when there is neither."""
    shards: ShardStates
    copies: ShardStates | None
    """The states of copying each shard's reused cells; None for a set that reuses none."""
    array: str
    array_path: str | None
    verified: bool | None
    """The last result of the check `verified`; None when it never ran."""
    cells_planned: int | None
    cells_done: int
    """Cells of materialized shards (also when they run again), and cells that running shards have reported."""
    cells_set_aside: int
    """Planned cells without an embedding in materialized shards. The shards and consumers' list give the reasons."""
    cells_per_second: float
    """Total of all running shards that have reported; 0 when none has."""
    limited_by: dict[str, int]
    """The limiting stage, with the number of running shards that it limits."""
    waiting_for_node: tuple[int, ...]
    """Those of the running shards whose worker has no node yet."""
    waiting_since: float | None
    """Since when, in seconds since 1970; None: no shard waits."""
    backfill: str | None
    """The running backfill of this release; None when there is none."""
    seconds_left: float | None
    """The time until running and waiting shards are done; None: unknown; 0: none runs or waits."""
    failures: dict[int, str]
    """The reasons of some failed shards, by shard number."""
    stuck: tuple[Stuck, ...]
    """Runs that are stuck."""
    needed_for_repair: str | None
    """What a person must do so that the sensor repairs stuck runs; None: nothing."""

    def as_json(self) -> dict[str, Any]:
        """Return the status for JSON, with shards as compact ranges and the expected finish."""
        shards = {state: compact(numbers) for state, numbers in asdict(self.shards).items()}
        counts = {state: len(numbers) for state, numbers in asdict(self.shards).items()}
        finish = finish_time(self.seconds_left) if self.seconds_left else None
        copies = self.copies and {state: compact(numbers) for state, numbers in asdict(self.copies).items()}
        return {
            **asdict(self),
            "shards": shards,
            "shard_counts": counts,
            "copies": copies,
            "waiting_for_node": compact(self.waiting_for_node),
            "finish": finish and finish.isoformat(),
        }


def finish_time(seconds: float) -> datetime:
    """Return the local time in this many seconds, to the minute."""
    return datetime.fromtimestamp(time.time() + seconds).astimezone().replace(second=0, microsecond=0)


def show_status(url: str, name: str, release: str | None, *, as_json: bool) -> None:
    """Print the status of a release, or of every release that has been started.

    Raises
    ------
    UserError
        When the webserver does not answer, or the set or release is unknown.
    """
    deployment = Deployment.at(url)
    remote_set = find_set(deployment, name)
    if release is not None:
        remote_set.check_release(release)
    statuses = release_statuses(deployment, remote_set, release)
    if as_json:
        print(json.dumps({"set": name, "url": deployment.url, "releases": [status.as_json() for status in statuses]}))
    elif statuses:
        print("\n\n".join(describe(remote_set, status) for status in statuses))
    else:
        print(f"{name}: none of its {len(remote_set.releases)} releases has been started")


def release_statuses(deployment: Deployment, remote_set: RemoteSet, release: str | None = None) -> list[ReleaseStatus]:
    """Return the status of one release, or of all that have been started, in the order in which they were added."""
    keys = [
        remote_set.key(asset) for asset in (PLAN, APPROVAL, SHARDS, ARRAY, *([REUSED] if remote_set.reuses else []))
    ]
    nodes = deployment.ask(PARTITIONS, keys=keys)["assetNodes"]
    recorded = {node["assetKey"]["path"][1]: node["assetPartitionStatuses"] for node in nodes}
    states: dict[tuple[str, ...], str] = {
        **{(PLAN, partition): state for partition, state in _states(recorded.get(PLAN))},
        **{(APPROVAL, partition): state for partition, state in _states(recorded.get(APPROVAL))},
        **{(ARRAY, partition): state for partition, state in _states(recorded.get(ARRAY))},
        **{
            (asset, *keys): state
            for asset in (SHARDS, REUSED)
            for keys, state in _shard_states(recorded.get(asset), remote_set.releases)
        },
    }
    active = list(latest(fetch_runs(deployment, remote_set, {"statuses": sorted(QUEUED | RUNNING)})).values())
    # Dagster's record of partitions does not distinguish waiting runs from working ones.
    for run in active:
        states[run.asset, *run.partition.split("|")] = "queued" if run.status in QUEUED else "running"
    there = {state[1] for state in states}
    wanted = (release,) if release is not None else tuple(one for one in remote_set.releases if one in there)
    return [_release_status(deployment, remote_set, one, states, active) for one in wanted]


def _states(recorded: Any) -> Iterable[tuple[str, str]]:
    """Yield (partition, state). Dagster may answer with another type when it has no record."""
    if recorded and recorded["__typename"] == "DefaultPartitionStatuses":
        for kind, state in (("materialized", "done"), ("failed", "failed"), ("materializing", "running")):
            for partition in recorded[f"{kind}Partitions"]:
                yield partition, state


def _shard_states(recorded: Any, releases: tuple[str, ...]) -> Iterable[tuple[tuple[str, str], str]]:
    """Yield ((release, shard key), state). Dagster answers with ranges of releases whose shards have equal states."""
    if recorded and recorded["__typename"] == "MultiPartitionStatuses":
        for one in recorded["ranges"]:
            first, last = releases.index(one["primaryDimStartKey"]), releases.index(one["primaryDimEndKey"])
            for release in releases[first : last + 1]:
                for key, state in _states(one["secondaryDim"]):
                    yield (release, key), state


def _release_status(
    deployment: Deployment,
    remote_set: RemoteSet,
    release: str,
    states: Mapping[tuple[str, ...], str],
    active: Sequence[Run],
) -> ReleaseStatus:
    partitions = [remote_set.partition(release, shard) for shard in range(len(remote_set.shard_keys))]
    stored = materializations(deployment, remote_set, SHARDS, partitions)
    plan = materializations(deployment, remote_set, PLAN, [release]).get(release)
    array = materializations(deployment, remote_set, ARRAY, [release]).get(release)
    checks = deployment.ask(CHECK, asset=remote_set.key(ARRAY), release=release)["assetCheckExecutions"]
    backfill = find_running(deployment, remote_set, release)
    copied = materializations(deployment, remote_set, REUSED, partitions) if remote_set.reuses else {}
    mine = [run for run in active if run.asset == SHARDS and run.partition in partitions]
    shards = ShardStates.of(SHARDS, release, remote_set, states)
    progress = progress_of(deployment, remote_set, [run for run in mine if run.status in RUNNING])
    running = [run for run in active if run.status in RUNNING and run.partition.partition("|")[0] == release]
    # A worker starts within seconds once it has a node and its image.
    waiting = [run for run in mine if run.status == "STARTING" and time.time() - run.updated > STARTS_WITHIN_SECONDS]
    stuck = find_stuck(deployment, remote_set, release, running, progress)
    return ReleaseStatus(
        release=release,
        plan=states.get((PLAN, release), "missing"),
        approval=states.get((APPROVAL, release), "missing"),
        approved=approval_text(deployment, remote_set, release),
        shards=shards,
        copies=ShardStates.of(REUSED, release, remote_set, states) if remote_set.reuses else None,
        array=states.get((ARRAY, release), "missing"),
        array_path=array.paths.get("array") if array else None,
        verified=VERIFIED.get(checks[0]["status"]) if checks else None,
        cells_planned=plan.numbers.get("cells") if plan else None,
        cells_done=sum(one.numbers.get("cells", 0) for one in (*stored.values(), *copied.values()))
        + sum(one.cells_done for partition, one in progress.items() if partition not in stored),
        cells_set_aside=sum(one.numbers.get("cells_set_aside", 0) for one in stored.values()),
        cells_per_second=sum(one.cells_per_second for one in progress.values()),
        limited_by=dict(Counter(one.limited_by for one in progress.values())),
        waiting_for_node=tuple(sorted(run.shard for run in waiting)),
        waiting_since=min((run.updated for run in waiting), default=None),
        backfill=backfill.id if backfill else None,
        seconds_left=_shards_left(deployment, remote_set, stored, mine) if mine else 0.0,
        failures=dict(_failures(deployment, remote_set, release, shards.failed[:REASONS])),
        stuck=tuple(stuck),
        needed_for_repair=needed_for_repair(deployment, remote_set, stuck),
    )


def _failures(
    deployment: Deployment, remote_set: RemoteSet, release: str, shards: Iterable[int]
) -> Iterator[tuple[int, str]]:
    for shard in shards:
        wanted = {
            "tags": [{"key": "dagster/partition", "value": remote_set.partition(release, shard)}],
            "statuses": ["FAILURE", "CANCELED"],
        }
        for run in [run for run in fetch_runs(deployment, remote_set, wanted) if run.asset == SHARDS][:1]:
            reason = failure_reason(deployment, run.id).partition("\n")[0]
            yield shard, f"{reason} ({deployment.url}/runs/{run.id})"


def _shards_left(
    deployment: Deployment, remote_set: RemoteSet, stored: Mapping[str, Materialization], active: Sequence[Run]
) -> float | None:
    recent = sorted(stored.values(), key=lambda one: one.at)[-RECENT_RUNS:]
    finished = fetch_runs(deployment, remote_set, {"runIds": [one.run_id for one in recent]}) if recent else []
    return seconds_left(active, finished, stored, now=time.time())


def describe(remote_set: RemoteSet, status: ReleaseStatus) -> str:
    """Return the status as lines for an operator."""
    verified = {True: "yes", False: "no: materialize it again", None: "unknown"}[status.verified]
    lines = [
        f"{remote_set.name} {status.release}",
        f"  plan    {status.plan}",
        f"  shards  {len(remote_set.shard_keys)}: {status.shards}",
        *([f"  copies  {len(remote_set.shard_keys)}: {status.copies}"] if status.copies else []),
        f"  cells   {status.cells_done:,} of "
        + ("an unknown number" if status.cells_planned is None else f"{status.cells_planned:,}")
        + (f"; {status.cells_set_aside:,} of them set aside" if status.cells_set_aside else ""),
        f"  array   {status.array}; verified: {verified}" + (f"; {status.array_path}" if status.array_path else ""),
    ]
    if status.approved:
        lines.append(f"  gate    {'approved' if status.approval == 'done' else status.approval}: {status.approved}")
    if status.cells_per_second:
        limits = ", ".join(f"{stage} in {count}" for stage, count in status.limited_by.items())
        lines.append(f"  speed   {status.cells_per_second:,.1f} cells/s in running shards; limited by {limits}")
    if status.seconds_left is None:
        lines.append("  finish  shards: unknown, because none has finished or none runs")
    elif status.seconds_left:
        at = finish_time(status.seconds_left).strftime("%Y-%m-%d %H:%M")
        lines.append(f"  finish  shards: {at} (in {duration(status.seconds_left)})")
    if status.waiting_since is not None:
        since = datetime.fromtimestamp(status.waiting_since).astimezone().strftime("%Y-%m-%d %H:%M")
        count = len(status.waiting_for_node)
        lines.append(f"  nodes   {count} of the running shards wait for a node since {since}")
    lines += [f"  failed  shard {shard}: {reason}" for shard, reason in status.failures.items()]
    lines += [f"  stuck   {one}" for one in status.stuck]
    if status.needed_for_repair:
        lines.append(f"  repair  nothing repairs this: {status.needed_for_repair}")
    elif any(run.repaired_by_sensor for run in status.stuck):
        lines.append(f"  repair  the sensor {LOST_RUNS} repairs this within minutes")
    retried = {one.partition for one in status.stuck if one.asset == SHARDS}
    # A new launch would only wait for these runs.
    failed = [shard for shard in status.shards.failed if remote_set.partition(status.release, shard) not in retried]
    if failed:
        ended = f" and backfill {status.backfill} has ended" if status.backfill else ""
        again = f"launch {remote_set.name} {status.release} --shards {compact(failed)}"
        lines.append(f"  again   when the causes are corrected{ended}: census-tf-dagster {again}")
    if status.backfill:
        lines.append(f"  launch  backfill {status.backfill} is still running; the same `launch` command follows it")
    return "\n".join(lines)
