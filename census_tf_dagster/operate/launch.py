"""The command `launch`: starts the backfill of a release or of shards, or attaches to a running one, and follows it."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

from census_tf_dagster.config.dagster_names import LOST_RUNS, PLAN, REUSED, SHARDS
from census_tf_dagster.errors import INTERRUPTED, UserError
from census_tf_dagster.operate.backfills import Backfill, LaunchScope, cancel, fetch, find_running, start
from census_tf_dagster.operate.follow import follow
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.remote_set import RemoteSet, find_set
from census_tf_dagster.operate.runs import RUNNING, fetch_runs, materializations
from census_tf_dagster.operate.shard_ranges import compact, parse_shards
from census_tf_dagster.operate.stuck_runs import find_stuck, needed_for_repair

DAEMON = """{ instance { daemonHealth { daemonStatus(daemonType: "BACKFILL") { healthy } } } }"""


@dataclass(frozen=True)
class LaunchRequest:
    """The arguments of the command."""

    set: str
    release: str
    shards: str | None
    """Shard numbers such as ``3,7-12``; None: the whole release."""
    recompute: bool
    wait: bool
    as_json: bool = False
    """Print one JSON object instead of lines. It applies only without `wait`."""


def launch(url: str, request: LaunchRequest) -> int:
    """Start a backfill, or attach to the running one of this release, and follow it.

    Dagster does the work. It continues when this command ends, and the same command finds it again.

    Returns
    -------
    int
        The exit code: 0 when everything succeeded (or, without `wait`, was started), 1 when something failed, 130 when
        the user interrupted the command.

    Raises
    ------
    UserError
        Before anything starts: when the webserver does not answer, no daemon runs, the set, release or shards are
        unknown, the plan that the shards need is missing, or a backfill of the same release is running with other work.
        (If that backfill started a moment earlier, the new one is cancelled.)
    """
    try:
        deployment = Deployment.at(url)
        remote_set = find_set(deployment, request.set)
        remote_set.check_release(request.release)
        work = _work(deployment, remote_set, request)
        with redirect_stdout(sys.stderr if request.as_json else sys.stdout):
            backfill = _backfill(deployment, remote_set, request.release, work)
        if request.as_json:
            page = f"{deployment.url}/runs/b/{backfill.id}"
            print(
                json.dumps({"backfill": backfill.id, "set": remote_set.name, "release": request.release, "page": page})
            )
            return 0
        if not request.wait:
            print(_how_to_follow(deployment, remote_set.name, request.release))
            return 0
        return follow(deployment, remote_set, request.release, backfill)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the backfill continues in Dagster.\n"
            + _how_to_follow(Deployment.at(url), request.set, request.release),
            file=sys.stderr,
        )
        return INTERRUPTED


def _work(deployment: Deployment, remote_set: RemoteSet, request: LaunchRequest) -> LaunchScope:
    everything = tuple(range(len(remote_set.shard_keys)))
    if request.shards is None:
        return LaunchScope(
            plan=True, shards=everything, array=True, recompute=request.recompute, reused=remote_set.reuses
        )
    shards = parse_shards(request.shards)
    remote_set.check_shards(shards)
    if not materializations(deployment, remote_set, PLAN, [request.release]):
        raise UserError(
            f"the plan of {remote_set.name} {request.release} is missing, and shards {compact(shards)} need it. Launch "
            "the whole release (without --shards), or materialize obs_id_plan in the web interface first."
        )
    partitions = {shard: remote_set.partition(request.release, shard) for shard in everything if shard not in shards}
    unfinished = False
    for asset in (SHARDS, *([REUSED] if remote_set.reuses else [])):
        stored = materializations(deployment, remote_set, asset, list(partitions.values()))
        unfinished |= any(partition not in stored for partition in partitions.values())
    return LaunchScope(
        plan=False, shards=shards, array=not unfinished, recompute=request.recompute, reused=remote_set.reuses
    )


def _backfill(deployment: Deployment, remote_set: RemoteSet, release: str, work: LaunchScope) -> Backfill:
    """Return the running backfill of the release, or start one."""
    if not deployment.ask(DAEMON)["instance"]["daemonHealth"]["daemonStatus"]["healthy"]:
        raise UserError(
            f"the deployment at {deployment.url} has no healthy dagster-daemon, so nothing would start. Run "
            "`dagster-daemon run -w workspace.yaml` with the same DAGSTER_HOME, then launch again."
        )
    if unfinished := find_running(deployment, remote_set, release):
        return _attach(deployment, remote_set, release, unfinished, work)
    backfill = fetch(deployment, remote_set, release, start(deployment, remote_set, release, work))
    # Another launch may have checked before this one started. All but the first are cancelled.
    first = find_running(deployment, remote_set, release)
    if first and first.id != backfill.id:
        cancel(deployment, backfill.id)
        return _attach(deployment, remote_set, release, first, work)
    print(f"launched backfill {backfill.id} of {remote_set.name} {release} ({remote_set.location}): {work}", flush=True)
    if work.plan and not materializations(deployment, remote_set, PLAN, list(remote_set.releases)):
        print(
            "this is the set's first launch. To measure error and cost before all shards run, run this on a GPU node: "
            f"census-tf-dagster canary {remote_set.name} {release}",
            flush=True,
        )
    if not work.array:
        print("without the array, because some of the other shards are not done", flush=True)
    return backfill


def _attach(
    deployment: Deployment, remote_set: RemoteSet, release: str, backfill: Backfill, work: LaunchScope
) -> Backfill:
    if not backfill.work.covers(work):
        raise UserError(
            f"backfill {backfill.id} of {remote_set.name} {release} is still running with {backfill.work}; you asked "
            f"for {work}. Follow it (`launch` with its shards), or cancel it: {deployment.url}/runs/b/{backfill.id}"
        )
    running = [
        run
        for run in fetch_runs(deployment, remote_set, {"statuses": sorted(RUNNING)})
        if run.partition.partition("|")[0] == release
    ]
    stuck = find_stuck(deployment, remote_set, release, running)
    if needed := needed_for_repair(deployment, remote_set, stuck):
        raise UserError(
            f"backfill {backfill.id} of {remote_set.name} {release} is stuck, and nothing repairs it: {stuck[0]}. To "
            f"have it repaired, {needed}; then launch again."
        )
    print(
        f"attached to backfill {backfill.id} of {remote_set.name} {release}, which is still running: {backfill.work}",
        flush=True,
    )
    for run in stuck:
        repair = f" (the sensor {LOST_RUNS} repairs this within minutes)" if run.repaired_by_sensor else ""
        print(f"stuck: {run}{repair}", flush=True)
    return backfill


def _how_to_follow(deployment: Deployment, name: str, release: str) -> str:
    return (
        f"  look:   census-tf-dagster status {name} {release} --url {deployment.url}\n"
        f"  follow: the same launch command again, or {deployment.url}/runs"
    )
