"""Measure how long the shards of a release take from the backfill to the queue, and the memory of webserver and daemon.

    python -m benchmarks.orchestration.queueing [--quick] [--json] [--repeats N]

Runs deploy/ecs/dagster.yaml on a real PostgreSQL with a real webserver and a real daemon (with the doubles of the
tests, so from a checkout with the `dev` extra). Nothing is launched: the limit on runs is 0, so every shard ends in the
queue. The daemon looks at a new backfill up to 30 s after it was requested, whatever the number of shards. `to first`
includes that time; `first to all` is the rest. Memory is the resident set of each server with its code server, when all
shards are queued.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import yaml

from benchmarks.common import spread
from census_tf_dagster.operate.backfills import LaunchScope, start
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.remote_set import find_set
from tests.support.builders import tiny
from tests.support.deployment import Operator, running
from tests.support.ecs_deployment import STOCK, doubles
from tests.support.project import RELEASE, Project

REPORT = """mutation Report($params: ReportRunlessAssetEventsParams!) {
  reportRunlessAssetEvents(eventParams: $params) { __typename }
}"""
VARIANTS: dict[str, dict[str, Any]] = {
    "as deployed": {},
    "no submit threads": {"backfills": {"use_threads": False}},
    "no placement": STOCK,
}


def main() -> None:
    """Measure each number of shards, as deployed and with settings taken away; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 shards, as deployed")
    parser.add_argument("--repeats", type=int, default=3, help="backfills of each kind")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    arguments = parser.parse_args()
    rows = []
    for shards in (8,) if arguments.quick else (96, 512):
        for name, changes in list(VARIANTS.items())[: 1 if arguments.quick else None]:
            rows.append({"shards": shards, "variant": name} | measure(shards, changes, arguments.repeats))
            row = rows[-1]
            print(
                f"{shards:>4} shards, {name:<18} to first {spread(row['to_first_s'])} s, first to all "
                f"{spread(row['first_to_all_s'])} s, webserver {row['webserver_mib']:.0f} MiB, "
                f"daemon {row['daemon_mib']:.0f} MiB",
                flush=True,
            )
    if arguments.json:
        print(json.dumps({"rows": rows}))


def measure(shards: int, changes: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Backfill the shards of one release so many times on one deployment."""
    with tempfile.TemporaryDirectory() as place:
        project = tiny(Project(Path(place)), shards=shards, placement={})
        with doubles(project):
            path = project.folder / "dagster_home" / "dagster.yaml"
            config = yaml.safe_load(path.read_text()) | changes
            config["concurrency"]["runs"]["max_concurrent_runs"] = 0
            path.write_text(yaml.safe_dump(config))
            assert project.command("release", "add", RELEASE).returncode == 0
            with running(project, daemon=True) as operator:
                deployment = Deployment.at(operator.url)
                params = {"eventType": "ASSET_MATERIALIZATION", "assetKey": {"path": ["tiny", "obs_id_plan"]}}
                deployment.ask(REPORT, params=params | {"partitionKeys": [RELEASE]})
                seconds = [_queued(operator, shards * number, shards) for number in range(repeats)]
                memory = {name: _resident(server.pid) for name, server in operator.servers.items()}
    return {
        "to_first_s": [first for first, _ in seconds],
        "first_to_all_s": [every - first for first, every in seconds],
        "webserver_mib": memory["dagster-webserver"],
        "daemon_mib": memory["dagster-daemon"],
    }


def _queued(operator: Operator, before: int, shards: int) -> tuple[float, float]:
    """Start a backfill; return the seconds until its first shard and until all of them were queued."""
    deployment, env = Deployment.at(operator.url), operator.project.env
    connection = psycopg2.connect(
        host=env["DAGSTER_PG_HOST"],
        port=env["DAGSTER_PG_PORT"],
        user=env["DAGSTER_PG_USER"],
        password=env["DAGSTER_PG_PASSWORD"],
        dbname=env["DAGSTER_PG_DB"],
    )
    connection.autocommit = True
    work = LaunchScope(plan=False, shards=tuple(range(shards)), array=False, recompute=False)
    start(deployment, find_set(deployment, "tiny"), RELEASE, work)
    asked, first = time.monotonic(), 0.0
    with connection.cursor() as cursor:
        while True:
            # Asked of the database, so that looking costs webserver and daemon nothing.
            cursor.execute("SELECT count(*) FROM runs WHERE status = 'QUEUED'")
            (queued,) = cursor.fetchone() or (0,)
            if queued > before and not first:
                first = time.monotonic() - asked
            if queued == before + shards:
                connection.close()
                return first, time.monotonic() - asked
            time.sleep(0.1)


def _resident(pid: int) -> float:
    """Return the MiB that a process and its children hold."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 2**20


if __name__ == "__main__":
    main()
