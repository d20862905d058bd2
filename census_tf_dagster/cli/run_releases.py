"""The commands that take a release to its array: `release`, `launch`, `approve` and `status`.

`release` reads and writes the Dagster instance of this machine (DAGSTER_HOME). The others ask a running deployment
(``--url``); `launch --dry-run` also opens the Census and the store.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from census_tf_dagster.cli.parsing import PROGRAM, Commands, add_json, add_set_and_release, add_url, print_progress
from census_tf_dagster.errors import UserError

if TYPE_CHECKING:
    import dagster as dg

WATCH_SECONDS = 10.0
"""`status --watch` prints the status this often."""


def add_commands(commands: Commands) -> None:
    """Declare the commands of this group."""
    release = commands.add_parser(
        "release",
        help="add or list Census releases",
        epilog=f"example: {PROGRAM} release list",
    )
    actions = release.add_subparsers(dest="action", required=True)
    add = actions.add_parser(
        "add",
        help="make a Census release a partition of every set",
        epilog=f"example: {PROGRAM} release add 2025-11-08",
    )
    add.add_argument("name", help="name of the release")
    add.set_defaults(run=lambda arguments: add_release(arguments.name, as_json=arguments.json))
    listing = actions.add_parser(
        "list",
        help="list the releases that were added",
        epilog=f"example: {PROGRAM} release list --json",
    )
    listing.set_defaults(run=lambda arguments: list_releases(as_json=arguments.json))

    launch = commands.add_parser(
        "launch",
        help="compute a release of a set in a running deployment, and follow it to its array",
        description=(
            "Start one backfill in a running deployment: the plan, all shards, then the array; with --shards only the "
            "chosen shards, then the array. The backfill continues if you interrupt this command; the same command "
            "follows it again. Exit code 1: something failed, and the reason was printed."
        ),
        epilog=f"example: {PROGRAM} launch demo_human 2025-11-08 --shards 0,2-3",
    )
    add_set_and_release(launch)
    launch.add_argument(
        "--shards", metavar="3,7-12", help="only these shards, then the array (default: plan, all shards, array)"
    )
    launch.add_argument("--recompute", action="store_true", help="compute cells again that are already in the array")
    launch.add_argument("--dry-run", action="store_true", help="show what would be computed and written; start nothing")
    launch.add_argument("--no-wait", dest="wait", action="store_false", help="return when the backfill has started")
    launch.set_defaults(run=_launch)

    approve = commands.add_parser(
        "approve",
        help="allow the shards of a release to spend what its plan says",
        description=(
            "Show what the current plan of a release costs, and approve it: the shards that wait for it start. You can "
            "do the same in the web interface: materialize the set's asset `approval`. An approval does not cover a "
            "later plan that needs more tokens."
        ),
        epilog=f"example: {PROGRAM} approve demo_human 2025-11-08",
    )
    add_set_and_release(approve)
    approve.add_argument("--plan", metavar="HASH", help="approve only if this is the current plan")
    approve.set_defaults(run=_approve)

    status = commands.add_parser(
        "status",
        help="show which parts of a set's releases are done, running, failed or missing, and the expected finish",
        epilog=f"example: {PROGRAM} status demo_human 2025-11-08",
    )
    status.add_argument("set", help="name of the set")
    status.add_argument("release", nargs="?", help="name of the release (default: all that have been started)")
    status.add_argument("--watch", action="store_true", help="show it again every 10 seconds, until Ctrl-C")
    status.set_defaults(run=_status)
    add_json(add, listing, launch, approve, status)
    add_url(launch, approve, status)


def _launch(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from census_tf_dagster.definitions import deployed_release
        from census_tf_dagster.operate.dry_run import describe, dry_run, measured_shards
        from census_tf_dagster.operate.shard_ranges import parse_shards

        shards = parse_shards(arguments.shards) if arguments.shards else None
        with deployed_release(arguments.set, arguments.release) as context:
            print_progress(f"reading obs of {context.release.uri}; this takes minutes for a whole Census")
            measured = measured_shards(arguments.url, arguments.set)
            result = dry_run(context, shards, recompute=arguments.recompute, measured=measured)
        print(json.dumps(asdict(result)) if arguments.json else describe(result))
        return 0
    if arguments.json and arguments.wait:
        raise UserError(
            "launch --json would follow the backfill, which prints lines for a person; expected --dry-run or --no-wait "
            "with --json. Add one of them; `status --json` reports the progress."
        )
    from census_tf_dagster.operate.launch import LaunchRequest, launch

    request = LaunchRequest(
        set=arguments.set,
        release=arguments.release,
        shards=arguments.shards,
        recompute=arguments.recompute,
        wait=arguments.wait,
        as_json=arguments.json,
    )
    return launch(arguments.url, request)


def _approve(arguments: argparse.Namespace) -> int:
    from census_tf_dagster.operate.approve import approve

    return approve(arguments.url, arguments.set, arguments.release, arguments.plan, as_json=arguments.json)


def _status(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.operate.status import show_status

    while True:
        show_status(arguments.url, arguments.set, arguments.release, as_json=arguments.json)
        if not arguments.watch:
            return
        time.sleep(WATCH_SECONDS)
        print(flush=True)


def _instance() -> "dg.DagsterInstance":
    import dagster as dg

    home = os.environ.get("DAGSTER_HOME")
    if home is None or not (Path(home).is_absolute() and Path(home).is_dir()):
        raise UserError(
            f"DAGSTER_HOME is {'not set' if home is None else repr(home)}; expected the absolute path of the Dagster "
            "instance's folder, which must exist. Set it, such as: export DAGSTER_HOME=$PWD/demo-data/dagster_home"
        )
    return dg.DagsterInstance.get()


def add_release(name: str, *, as_json: bool = False) -> None:
    """Add the partition of a release to the Dagster instance of DAGSTER_HOME.

    Raises
    ------
    UserError
        When the release's Census does not exist or was retracted, or DAGSTER_HOME is wrong.
    """
    from census_tf_dagster.definitions import census_resource
    from census_tf_dagster.orchestration.partitions import RELEASES

    census = census_resource()
    uri = census.uri(name)
    listed = census.listed(name)
    if listed and listed.retraction:
        raise UserError(f"release {name} was {listed.retraction}. Nothing was added.")
    with _instance() as instance:
        known = name in instance.get_dynamic_partitions(str(RELEASES.name))
        instance.add_dynamic_partitions(str(RELEASES.name), [name])
    if as_json:
        print(json.dumps({"release": name, "added": not known, "census": uri}))
    else:
        print(f"release {name} was there already" if known else f"release {name} added", f"({uri})")


def list_releases(*, as_json: bool = False) -> None:
    """Print the releases that were added, one per line."""
    from census_tf_dagster.orchestration.partitions import RELEASES

    with _instance() as instance:
        names = list(instance.get_dynamic_partitions(str(RELEASES.name)))
    if as_json:
        print(json.dumps({"releases": names}))
    else:
        for name in names:
            print(name)
