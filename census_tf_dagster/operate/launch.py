"""`launch`: take a release of a set to its array, or chosen shards of it, and follow that to its end."""

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
from census_tf_dagster.operate.stuck_runs import find_stuck, nobody_mends

DAEMON = """{ instance { daemonHealth { daemonStatus(daemonType: "BACKFILL") { healthy } } } }"""


@dataclass(frozen=True)
class LaunchRequest:
    """What an operator asks for."""

    set: str
    release: str
    shards: str | None
    """Such as ``3,7-12``; None for the whole release."""
    recompute: bool
    wait: bool
    as_json: bool = False
    """Print one JSON object instead of lines, when it does not wait."""


def launch(url: str, request: LaunchRequest) -> int:
    """Launch, or attach to the launch of this release that goes on, and follow it; return the exit code.

    The work is Dagster's: it goes on when this command ends, and the same command finds it again.

    Returns
    -------
    int
        0 when all of it succeeded (or was only started, without waiting), 1 when not, 130 when interrupted.

    Raises
    ------
    UserError
        Before anything is launched: when the webserver does not answer, no daemon runs, set, release or shards are
        unknown, the plan that shards need is missing, or a launch of the same release goes on that does other work
        (where that came first by a moment, what was launched is cancelled).
    """
    try:
        deployment = Deployment.at(url)
        found = find_set(deployment, request.set)
        found.check_release(request.release)
        work = _work(deployment, found, request)
        with redirect_stdout(sys.stderr if request.as_json else sys.stdout):
            backfill = _backfill(deployment, found, request.release, work)
        if request.as_json:
            page = f"{deployment.url}/runs/b/{backfill.id}"
            print(json.dumps({"backfill": backfill.id, "set": found.name, "release": request.release, "page": page}))
            return 0
        if not request.wait:
            print(_how_to_follow(deployment, found.name, request.release))
            return 0
        return follow(deployment, found, request.release, backfill)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what was launched goes on in Dagster.\n"
            + _how_to_follow(Deployment.at(url), request.set, request.release),
            file=sys.stderr,
        )
        return INTERRUPTED


def _work(deployment: Deployment, found: RemoteSet, request: LaunchRequest) -> LaunchScope:
    everything = tuple(range(len(found.shard_keys)))
    if request.shards is None:
        return LaunchScope(plan=True, shards=everything, array=True, recompute=request.recompute, reused=found.reuses)
    shards = parse_shards(request.shards)
    found.check_shards(shards)
    if not materializations(deployment, found, PLAN, [request.release]):
        raise UserError(
            f"the plan of {found.name} {request.release} is missing, and shards {compact(shards)} need it: launch the "
            "whole release (without --shards), or materialize obs_id_plan in the web interface first."
        )
    partitions = {shard: found.partition(request.release, shard) for shard in everything if shard not in shards}
    unfinished = False
    for asset in (SHARDS, *([REUSED] if found.reuses else [])):
        stored = materializations(deployment, found, asset, list(partitions.values()))
        unfinished |= any(partition not in stored for partition in partitions.values())
    return LaunchScope(
        plan=False, shards=shards, array=not unfinished, recompute=request.recompute, reused=found.reuses
    )


def _backfill(deployment: Deployment, found: RemoteSet, release: str, work: LaunchScope) -> Backfill:
    """Find the backfill that goes on, or start one."""
    if not deployment.ask(DAEMON)["instance"]["daemonHealth"]["daemonStatus"]["healthy"]:
        raise UserError(
            f"the deployment at {deployment.url} has no dagster-daemon: nothing would start. Run `dagster-daemon run "
            "-w workspace.yaml` with the same DAGSTER_HOME, then launch again."
        )
    if unfinished := find_running(deployment, found, release):
        return _attach(deployment, found, release, unfinished, work)
    backfill = fetch(deployment, found, release, start(deployment, found, release, work))
    # Another launch may have looked before this one had started; all but the first give way.
    first = find_running(deployment, found, release)
    if first and first.id != backfill.id:
        cancel(deployment, backfill.id)
        return _attach(deployment, found, release, first, work)
    print(f"launched backfill {backfill.id} of {found.name} {release} ({found.location}): {work}", flush=True)
    if work.plan and not materializations(deployment, found, PLAN, list(found.releases)):
        print(
            "this is the set's first launch; to know error and cost before all shards run, on such a node: "
            f"python -m census_tf_dagster canary {found.name} {release}",
            flush=True,
        )
    if not work.array:
        print("without the array: it needs the other shards, which have not all been done", flush=True)
    return backfill


def _attach(deployment: Deployment, found: RemoteSet, release: str, backfill: Backfill, work: LaunchScope) -> Backfill:
    if not backfill.work.covers(work):
        raise UserError(
            f"backfill {backfill.id} of {found.name} {release} goes on with {backfill.work}; asked for: {work}. Follow "
            f"it (`launch` with its shards), or cancel it: {deployment.url}/runs/b/{backfill.id}"
        )
    running = [
        run
        for run in fetch_runs(deployment, found, {"statuses": sorted(RUNNING)})
        if run.partition.partition("|")[0] == release
    ]
    stuck = find_stuck(deployment, found, release, running)
    if to_switch_on := nobody_mends(deployment, found, stuck):
        raise UserError(
            f"backfill {backfill.id} of {found.name} {release} waits for what nothing mends: {stuck[0]}. To have it "
            f"mended, {to_switch_on}; then launch again."
        )
    print(f"attached to backfill {backfill.id} of {found.name} {release}, which goes on: {backfill.work}", flush=True)
    for one in stuck:
        mends = f" (the sensor {LOST_RUNS} mends this within minutes)" if one.mends_itself else ""
        print(f"stuck: {one}{mends}", flush=True)
    return backfill


def _how_to_follow(deployment: Deployment, name: str, release: str) -> str:
    command = "python -m census_tf_dagster"
    return (
        f"  look:   {command} status {name} {release} --url {deployment.url}\n"
        f"  follow: the same launch command again, or {deployment.url}/runs"
    )
