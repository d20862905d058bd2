"""`status`: what of a set's releases is done, runs, failed or is missing, and when it should be ready."""

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
from census_tf_dagster.operate.stuck_runs import Stuck, find_stuck, nobody_mends

REASONS = 3
"""How many failures are told with their reason."""
RECENT_RUNS = 50
"""How many of the last finished shards the estimate looks at."""

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
    """Every shard's number is in exactly one of these. ``failed``: since it was last done."""

    @classmethod
    def of(cls, asset: str, release: str, found: RemoteSet, states: Mapping[tuple[str, ...], str]) -> "ShardStates":
        """Sort the shards of a release by what is known of an asset."""
        by_state: dict[str, list[int]] = {state.name: [] for state in fields(cls)}
        for shard, key in enumerate(found.shard_keys):
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
    """``missing``, ``queued``, ``running``, ``failed`` or ``done``; so are `approval` and `array`."""
    approval: str
    approved: str | None
    """What was approved last, and by whom; or what an approval is asked for."""
    shards: ShardStates
    copies: ShardStates | None
    """Of the cells that each shard reuses; None for a set that reuses none."""
    array: str
    array_path: str | None
    verified: bool | None
    """What the asset check of that name said last; None when it never did."""
    cells_planned: int | None
    cells_done: int
    """Cells of shards that were materialized, be they in work again, and those that running shards have told of."""
    cells_set_aside: int
    """Planned cells of shards that were materialized that have no embedding; shards and the consumers' list say why."""
    cells_per_second: float
    """Of all running shards that have told of themselves; 0 when none has."""
    limited_by: dict[str, int]
    """The stage that limits, and in how many running shards."""
    backfill: str | None
    """The launch of this release that goes on."""
    seconds_left: float | None
    """Until running and waiting shards are done; None when unknown, 0 when none runs or waits."""
    failures: dict[int, str]
    """Why shards failed, of some of them."""
    stuck: tuple[Stuck, ...]
    """Runs that do not move."""
    to_switch_on: str | None
    """What a person has to do so that those of `stuck` are mended that mend themselves; None: nothing."""

    def as_json(self) -> dict[str, Any]:
        """Return it with shards as compact ranges, and the time of finishing."""
        shards = {state: compact(numbers) for state, numbers in asdict(self.shards).items()}
        counts = {state: len(numbers) for state, numbers in asdict(self.shards).items()}
        finish = finish_time(self.seconds_left) if self.seconds_left else None
        copies = self.copies and {state: compact(numbers) for state, numbers in asdict(self.copies).items()}
        return {
            **asdict(self),
            "shards": shards,
            "shard_counts": counts,
            "copies": copies,
            "finish": finish and finish.isoformat(),
        }


def finish_time(seconds: float) -> datetime:
    """Return the local time in so many seconds, to the minute."""
    return datetime.fromtimestamp(time.time() + seconds).astimezone().replace(second=0, microsecond=0)


def show_status(url: str, name: str, release: str | None, *, as_json: bool) -> None:
    """Print the state of a release, or of every release that has anything.

    Raises
    ------
    UserError
        When the webserver does not answer, or set or release are unknown.
    """
    deployment = Deployment.at(url)
    found = find_set(deployment, name)
    if release is not None:
        found.check_release(release)
    statuses = release_statuses(deployment, found, release)
    if as_json:
        print(json.dumps({"set": name, "url": deployment.url, "releases": [one.as_json() for one in statuses]}))
    elif statuses:
        print("\n\n".join(describe(found, one) for one in statuses))
    else:
        print(f"{name}: nothing is there yet of any of its {len(found.releases)} releases")


def release_statuses(deployment: Deployment, found: RemoteSet, release: str | None = None) -> list[ReleaseStatus]:
    """Return the state of one release, or of those that have anything, in the order they were added."""
    keys = [found.key(asset) for asset in (PLAN, APPROVAL, SHARDS, ARRAY, *([REUSED] if found.reuses else []))]
    nodes = deployment.ask(PARTITIONS, keys=keys)["assetNodes"]
    recorded = {node["assetKey"]["path"][1]: node["assetPartitionStatuses"] for node in nodes}
    states: dict[tuple[str, ...], str] = {
        **{(PLAN, partition): state for partition, state in _states(recorded.get(PLAN))},
        **{(APPROVAL, partition): state for partition, state in _states(recorded.get(APPROVAL))},
        **{(ARRAY, partition): state for partition, state in _states(recorded.get(ARRAY))},
        **{
            (asset, *keys): state
            for asset in (SHARDS, REUSED)
            for keys, state in _shard_states(recorded.get(asset), found.releases)
        },
    }
    active = list(latest(fetch_runs(deployment, found, {"statuses": sorted(QUEUED | RUNNING)})).values())
    # Dagster's record of partitions does not tell a run that waits from one that works.
    for run in active:
        states[run.asset, *run.partition.split("|")] = "queued" if run.status in QUEUED else "running"
    there = {state[1] for state in states}
    wanted = (release,) if release is not None else tuple(one for one in found.releases if one in there)
    return [_release_status(deployment, found, one, states, active) for one in wanted]


def _states(recorded: Any) -> Iterable[tuple[str, str]]:
    """Yield (partition, state); where nothing is on record, Dagster's answer may be of another kind."""
    if recorded and recorded["__typename"] == "DefaultPartitionStatuses":
        for kind, state in (("materialized", "done"), ("failed", "failed"), ("materializing", "running")):
            for partition in recorded[f"{kind}Partitions"]:
                yield partition, state


def _shard_states(recorded: Any, releases: tuple[str, ...]) -> Iterable[tuple[tuple[str, str], str]]:
    """Yield ((release, shard key), state): Dagster answers ranges of releases whose shards stand alike."""
    if recorded and recorded["__typename"] == "MultiPartitionStatuses":
        for one in recorded["ranges"]:
            first, last = releases.index(one["primaryDimStartKey"]), releases.index(one["primaryDimEndKey"])
            for release in releases[first : last + 1]:
                for key, state in _states(one["secondaryDim"]):
                    yield (release, key), state


def _release_status(
    deployment: Deployment,
    found: RemoteSet,
    release: str,
    states: Mapping[tuple[str, ...], str],
    active: Sequence[Run],
) -> ReleaseStatus:
    partitions = [found.partition(release, shard) for shard in range(len(found.shard_keys))]
    stored = materializations(deployment, found, SHARDS, partitions)
    plan = materializations(deployment, found, PLAN, [release]).get(release)
    array = materializations(deployment, found, ARRAY, [release]).get(release)
    checks = deployment.ask(CHECK, asset=found.key(ARRAY), release=release)["assetCheckExecutions"]
    backfill = find_running(deployment, found, release)
    copied = materializations(deployment, found, REUSED, partitions) if found.reuses else {}
    mine = [run for run in active if run.asset == SHARDS and run.partition in partitions]
    shards = ShardStates.of(SHARDS, release, found, states)
    told = progress_of(deployment, found, [run for run in mine if run.status in RUNNING])
    running = [run for run in active if run.status in RUNNING and run.partition.partition("|")[0] == release]
    stuck = find_stuck(deployment, found, release, running, told)
    return ReleaseStatus(
        release=release,
        plan=states.get((PLAN, release), "missing"),
        approval=states.get((APPROVAL, release), "missing"),
        approved=approval_text(deployment, found, release),
        shards=shards,
        copies=ShardStates.of(REUSED, release, found, states) if found.reuses else None,
        array=states.get((ARRAY, release), "missing"),
        array_path=array.paths.get("array") if array else None,
        verified=VERIFIED.get(checks[0]["status"]) if checks else None,
        cells_planned=plan.numbers.get("cells") if plan else None,
        cells_done=sum(one.numbers.get("cells", 0) for one in (*stored.values(), *copied.values()))
        + sum(one.cells_done for partition, one in told.items() if partition not in stored),
        cells_set_aside=sum(one.numbers.get("cells_set_aside", 0) for one in stored.values()),
        cells_per_second=sum(one.cells_per_second for one in told.values()),
        limited_by=dict(Counter(one.limited_by for one in told.values())),
        backfill=backfill.id if backfill else None,
        seconds_left=_shards_left(deployment, found, stored, mine) if mine else 0.0,
        failures=dict(_failures(deployment, found, release, shards.failed[:REASONS])),
        stuck=tuple(stuck),
        to_switch_on=nobody_mends(deployment, found, stuck),
    )


def _failures(
    deployment: Deployment, found: RemoteSet, release: str, shards: Iterable[int]
) -> Iterator[tuple[int, str]]:
    for shard in shards:
        wanted = {
            "tags": [{"key": "dagster/partition", "value": found.partition(release, shard)}],
            "statuses": ["FAILURE", "CANCELED"],
        }
        for run in [run for run in fetch_runs(deployment, found, wanted) if run.asset == SHARDS][:1]:
            reason = failure_reason(deployment, run.id).partition("\n")[0]
            yield shard, f"{reason} ({deployment.url}/runs/{run.id})"


def _shards_left(
    deployment: Deployment, found: RemoteSet, stored: Mapping[str, Materialization], active: Sequence[Run]
) -> float | None:
    recent = sorted(stored.values(), key=lambda one: one.at)[-RECENT_RUNS:]
    finished = fetch_runs(deployment, found, {"runIds": [one.run_id for one in recent]}) if recent else []
    return seconds_left(active, finished, stored, now=time.time())


def describe(found: RemoteSet, status: ReleaseStatus) -> str:
    """Return the lines that an operator reads."""
    verified = {True: "yes", False: "no: materialize it again", None: "unknown"}[status.verified]
    lines = [
        f"{found.name} {status.release}",
        f"  plan    {status.plan}",
        f"  shards  {len(found.shard_keys)}: {status.shards}",
        *([f"  copies  {len(found.shard_keys)}: {status.copies}"] if status.copies else []),
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
        lines.append("  finish  shards: unknown, nothing has finished or nothing runs")
    elif status.seconds_left:
        at = finish_time(status.seconds_left).strftime("%Y-%m-%d %H:%M")
        lines.append(f"  finish  shards: {at} (in {duration(status.seconds_left)})")
    lines += [f"  failed  shard {shard}: {reason}" for shard, reason in status.failures.items()]
    lines += [f"  stuck   {one}" for one in status.stuck]
    if status.to_switch_on:
        lines.append(f"  mends   nothing does: {status.to_switch_on}")
    elif any(one.mends_itself for one in status.stuck):
        lines.append(f"  mends   the sensor {LOST_RUNS} does, within minutes")
    retried = {one.partition for one in status.stuck if one.asset == SHARDS}
    # Those would be waited for by a launch, which helps them no more than waiting without it.
    failed = [shard for shard in status.shards.failed if found.partition(status.release, shard) not in retried]
    if failed:
        ended = f" and backfill {status.backfill} has ended" if status.backfill else ""
        again = f"launch {found.name} {status.release} --shards {compact(failed)}"
        lines.append(f"  again   when that is mended{ended}: python -m census_tf_dagster {again}")
    if status.backfill:
        lines.append(f"  launch  backfill {status.backfill} goes on; the same `launch` command follows it")
    return "\n".join(lines)
