"""Measure a deployment whose records are those of nine releases of 1,000 shards: queueing, pages, `status`, memory.

    python -m benchmarks.orchestration.fleet_records [--quick] [--json] [--storage sqlite|postgres]

It needs a checkout with the `dev` extra. Code server, webserver and daemon are started as on ECS, with
deploy/ecs/dagster.yaml, but without AWS: compute logs are local files, and the launcher is Dagster's default one.

A real worker embeds one shard of the first release. Its rows in Dagster's tables (run, tags, events, check) are then
copied for each shard of eight releases, under other ids, partitions and times. The backfills of these releases are
requested through the webserver and marked as done. Plans and arrays are reported without a run. The ninth release is
launched as `launch --shards` does. The limit on runs is 0 by then, so every shard ends in the queue.

The queries of a page are the web interface's own, sent at once, as a browser does. A page's time is that of its last
answer. A browser's own work is not measured.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import dagster as dg
import psutil
import requests
import yaml
from dagster._core.execution.backfill import BulkActionStatus
from sqlalchemy import text

from benchmarks.common import peak_gib
from benchmarks.orchestration.finished_run import BACKFILL_TAG, SHARD_TAG, FinishedRun
from benchmarks.orchestration.web_queries import read_queries
from census_tf_dagster.config.dagster_names import ARRAY, PLAN, SHARDS, UPSTREAM_CHECK
from census_tf_dagster.operate.backfills import LaunchScope, fetch, start
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet, find_set
from census_tf_dagster.operate.runs import materializations
from census_tf_dagster.operate.status import release_statuses
from tests.support.builders import tiny
from tests.support.deployment import free_port, until
from tests.support.placements import declare
from tests.support.postgres import postgres
from tests.support.project import RELEASE, REPOSITORY, Project

REPORT = """mutation Report($params: ReportRunlessAssetEventsParams!) {
  reportRunlessAssetEvents(eventParams: $params) { __typename ... on Error { message } }
}"""
HEALTH = '{ instance { daemonHealth { daemonStatus(daemonType: "BACKFILL") { healthy } } } }'
FIRST = date(2025, 11, 8)
assert FIRST.isoformat() == RELEASE
REPEATS = 5


class Servers:
    """The three processes of a deployment."""

    def __init__(self, project: Project) -> None:
        self.project, self.port, self.code_port = project, free_port(), free_port()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.deployment = Deployment.at(f"http://127.0.0.1:{self.port}")

    def start(self) -> None:
        """Start all three, and wait until they work."""
        code = str(self.code_port)
        where = ["-h", "127.0.0.1", "-p"]
        module = ["-m", "census_tf_dagster.definitions"]
        self._serve("code server", "dagster", "code-server", "start", *where, code, *module)
        self._serve("webserver", "dagster_webserver", *where, str(self.port), "--grpc-port", code)
        self._serve("daemon", "dagster._daemon", "run", "--grpc-port", code)
        until(self._work, "the servers")

    def _serve(self, name: str, module: str, *arguments: str) -> None:
        with (self.project.folder / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.project.folder,
                env=self.project.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _work(self) -> bool:
        assert all(server.poll() is None for server in self.running.values()), "a server ended"
        try:
            health = self.deployment.ask(HEALTH)["instance"]["daemonHealth"]["daemonStatus"]["healthy"]
            find_set(self.deployment, "tiny")
        except dg.DagsterError:
            raise
        except Exception:
            return False
        return bool(health)

    def stop(self) -> None:
        """End all three."""
        for server in reversed(self.running.values()):
            server.terminate()
        for server in self.running.values():
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        self.running = {}

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds that each has used so far, with its children."""
        return {
            name: sum(sum(one.cpu_times()[:2]) for one in _family(server.pid)) for name, server in self.running.items()
        }

    def peak_mib(self) -> dict[str, float]:
        """Return the peak memory of each, with its children."""
        return {
            name: 1024 * sum(peak_gib(one.pid) for one in _family(server.pid)) for name, server in self.running.items()
        }


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def main() -> None:
    """Measure each storage; print what each step takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 shards, three releases, SQLite")
    parser.add_argument("--storage", choices=["sqlite", "postgres"], help="one of the two (default: both)")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    arguments = parser.parse_args()
    shards, releases = (8, 3) if arguments.quick else (1000, 9)
    packages = ("dagster", "dagster-postgres", "sqlalchemy")
    print(f"python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}")
    kinds = [arguments.storage] if arguments.storage else ["sqlite"] if arguments.quick else ["sqlite", "postgres"]
    rows = [{"storage": kind} | measure(kind, shards, releases, quick=arguments.quick) for kind in kinds]
    if arguments.json:
        print(json.dumps({"rows": rows}))


def measure(storage: str, shards: int, releases: int, *, quick: bool) -> dict[str, Any]:
    """Fill a deployment, launch its last release, and measure."""
    names = [(FIRST + timedelta(weeks=26 * number)).isoformat() for number in range(releases)]
    say = _printer(f"{storage}, {shards:,} shards x {releases} releases")
    found: dict[str, Any] = {"shards": shards, "releases": releases}
    with _deployment(storage, shards) as (project, instance):
        instance.add_dynamic_partitions("census_release", names)
        servers = Servers(project)
        try:
            servers.start()
            remote_set = find_set(servers.deployment, "tiny")
            template = _template(servers.deployment, remote_set, instance)
            _report(servers.deployment, PLAN, names[1:])
            began = time.monotonic()
            backfills = [_request(servers.deployment, remote_set, release) for release in names[:-1]]
            servers.stop()
            for backfill in backfills:
                _end(instance, backfill)
            for number, (release, backfill) in enumerate(zip(names, backfills, strict=False)):
                at = time.time() - 86400 * (releases - number)
                begun = {key: at + shard for shard, key in enumerate(remote_set.shard_keys)}
                if release == RELEASE:
                    del begun[template.run.tags[SHARD_TAG]]
                template.copy(release, backfill, begun)
                print(f"{release}: recorded after {time.monotonic() - began:.0f} s", flush=True)
            found["events_per_run"] = len(instance.all_logs(template.run.run_id))
            found["stored_mib"] = _stored_mib(project, instance)
            say(f"each run has {found['events_per_run']} events; {found['stored_mib']:,.0f} MiB stored")
            _limit(project, 0)
            servers.start()
            _report(servers.deployment, ARRAY, names[:-1])
            found["queue"] = _queue(servers, instance, remote_set, names[-1], say)
            (done,) = release_statuses(servers.deployment, remote_set, names[-2])
            assert (len(done.shards.done), done.backfill) == (shards, None), "the records are incomplete"
            found["idle"] = _idle(servers, say, 5 if quick else 60)
            found["pages"] = _pages(servers, remote_set, names, found["queue"]["backfill"], say)
            found["commands"] = _commands(servers, names, say)
            found["peak_mib"] = servers.peak_mib()
            say(f"peak memory: {', '.join(f'{name} {mib:,.0f} MiB' for name, mib in found['peak_mib'].items())}")
        finally:
            servers.stop()
    return found


def _printer(what: str) -> Callable[[str], None]:
    return lambda text: print(f"{what}: {text}", flush=True)


@contextmanager
def _deployment(storage: str, shards: int) -> Iterator[tuple[Project, dg.DagsterInstance]]:
    """Make the project, its database and its DAGSTER_HOME."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        project = tiny(Project(place), cells=4 * shards, shards=shards, placement={})
        project.env["PYTHONPATH"] = str(REPOSITORY)
        declare(place / "sets")
        config = yaml.safe_load((REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text())
        del config["compute_logs"], config["run_launcher"]
        if storage == "postgres":
            project.env |= stack.enter_context(postgres())
        else:
            del config["storage"]
        (place / "dagster_home" / "dagster.yaml").write_text(yaml.safe_dump(config))
        os.environ.update(
            {name: value for name, value in project.env.items() if name.startswith(("DAGSTER_", "CENSUS_"))}
        )
        yield project, stack.enter_context(dg.DagsterInstance.from_config(project.env["DAGSTER_HOME"]))


def _limit(project: Project, runs: int) -> None:
    path = project.folder / "dagster_home" / "dagster.yaml"
    config = yaml.safe_load(path.read_text())
    config["concurrency"]["runs"]["max_concurrent_runs"] = runs
    path.write_text(yaml.safe_dump(config))


def _template(deployment: Deployment, remote_set: RemoteSet, instance: dg.DagsterInstance) -> FinishedRun:
    """Embed one shard of the first release for real, and return its run."""
    shard = len(remote_set.shard_keys) // 2
    work = LaunchScope(plan=True, shards=(shard,), array=False, recompute=False)
    backfill = start(deployment, remote_set, RELEASE, work)
    until(lambda: not fetch(deployment, remote_set, RELEASE, backfill).is_running, "a shard")
    partition = remote_set.partition(RELEASE, shard)
    # On a busy machine Dagster may have retried it.
    wanted = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.SUCCESS], tags={BACKFILL_TAG: backfill, "dagster/partition": partition}
    )
    (run,) = instance.get_runs(wanted)
    (stored,) = materializations(deployment, remote_set, SHARDS, [partition]).values()
    assert stored.numbers["cells_computed"], "the shard is empty"
    return FinishedRun(instance, run)


def _report(deployment: Deployment, asset: str, releases: Sequence[str]) -> None:
    params = {"eventType": "ASSET_MATERIALIZATION", "assetKey": {"path": ["tiny", asset]}, "partitionKeys": releases}
    expect(
        deployment.ask(REPORT, params=params)["reportRunlessAssetEvents"], "ReportRunlessAssetEventsSuccess", "report"
    )


def _request(deployment: Deployment, remote_set: RemoteSet, release: str) -> str:
    everything = tuple(range(len(remote_set.shard_keys)))
    return start(
        deployment, remote_set, release, LaunchScope(plan=False, shards=everything, array=False, recompute=False)
    )


def _end(instance: dg.DagsterInstance, backfill_id: str) -> None:
    """Mark a backfill as done."""
    from census_tf_dagster.definitions import defs

    graph = defs().resolve_asset_graph()
    backfill = instance.get_backfill(backfill_id)
    assert backfill is not None
    data = backfill.get_asset_backfill_data(graph)
    done = data._replace(
        requested_runs_for_target_roots=True,
        requested_subset=data.target_subset,
        materialized_subset=data.target_subset,
    )
    ended = backfill.with_asset_backfill_data(done, instance, graph).with_status(BulkActionStatus.COMPLETED_SUCCESS)
    instance.update_backfill(ended.with_end_timestamp(time.time()))


def _stored_mib(project: Project, instance: dg.DagsterInstance) -> float:
    if "DAGSTER_PG_HOST" in project.env:
        with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
            return float(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()) / 2**20
    files = (project.folder / "dagster_home").rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file()) / 2**20


def _used(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


def _shown(used: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items())


def _idle(servers: Servers, say: Callable[[str], None], seconds: float) -> dict[str, float]:
    """Return the CPU seconds that the servers take in a minute when nothing happens."""
    before, began = servers.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    minutes = (time.monotonic() - began) / 60
    used = {name: seconds / minutes for name, seconds in _used(before, servers.cpu_seconds()).items()}
    say(f"idle, all shards queued: CPU s a minute: {_shown(used)}")
    return used


def _queue(
    servers: Servers, instance: dg.DagsterInstance, remote_set: RemoteSet, release: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Launch all shards of a release; return the seconds until they were queued, and the CPU seconds of the servers."""
    shards = len(remote_set.shard_keys)
    queued = dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED])
    began, first = time.monotonic(), 0.0
    backfill = _request(servers.deployment, remote_set, release)
    requested = time.monotonic() - began
    before = servers.cpu_seconds()
    while (count := instance.get_runs_count(queued)) < shards:
        if count and not first:
            first, before = time.monotonic() - began, servers.cpu_seconds()
        time.sleep(0.5)
    every = time.monotonic() - began
    used = _used(before, servers.cpu_seconds())
    say(
        f"requested in {requested:.1f} s; first run queued after {first:.1f} s, all {every - first:.1f} s later; CPU s "
        f"in that time: {_shown(used)} (daemon {used['daemon'] / shards:.3f} a shard)"
    )
    return {
        "backfill": backfill,
        "request_s": requested,
        "to_first_s": first,
        "first_to_all_s": every - first,
        "cpu_s": used,
    }


def _pages(
    servers: Servers, remote_set: RemoteSet, releases: Sequence[str], backfill: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Open each page several times."""
    key = remote_set.key(SHARDS)
    keys = [remote_set.key(asset) for asset in (PLAN, SHARDS, ARRAY)]
    last = {"assetKey": key, "partitionKey": remote_set.partition(releases[-2], len(remote_set.shard_keys) - 1)}
    check = {"assetKey": key, "checkName": UPSTREAM_CHECK}
    tabs = {"queuedFilter": {"statuses": ["QUEUED", "NOT_STARTED"]}, "view": "RUNS"}
    tabs["inProgressFilter"] = {"statuses": ["STARTED", "STARTING", "CANCELING"]}

    def feed(view: str, runs_filter: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        return "RunsFeedRootQuery", {"limit": 30, "filter": runs_filter, "view": view}

    counts = ("RunFeedTabsCountQuery", tabs)
    of_backfill = {"tags": [{"key": BACKFILL_TAG, "value": backfill}]}
    details = ("BackfillDetailsQuery", {"backfillId": backfill})
    pages: dict[str, list[tuple[str, Mapping[str, Any]]]] = {
        "runs": [feed("ROOTS", {}), counts],
        "runs, with those of backfills": [feed("RUNS", {}), counts],
        "runs, queued": [feed("RUNS", {"statuses": ["QUEUED", "NOT_STARTED"]}), counts],
        "backfills": [feed("BACKFILLS", {}), counts],
        "backfill": [details],
        "backfill, its runs": [details, feed("RUNS", of_backfill)],
        "asset": [
            ("AssetViewDefinitionQuery", {"assetKey": key}),
            ("AssetGraphLiveQuery", {"assetKeys": keys}),
            ("AssetStaleStatusDataQuery", {"assetKeys": keys}),
            ("AssetHealthQuery", {"assetKeys": keys}),
        ],
        "asset, partitions": [
            ("AssetViewDefinitionQuery", {"assetKey": key}),
            ("PartitionHealthQuery", {"assetKey": key}),
        ],
        "asset, one partition": [("AssetPartitionDetailQuery", last), ("AssetPartitionStaleQuery", last)],
        "asset, checks": [
            ("AssetChecksQuery", {"assetKey": key}),
            ("AssetCheckDetailsQuery", {**check, "limit": 31}),
        ],
        "asset, partitions of a check": [("AssetCheckPartitionHealthQuery", check)],
    }
    texts = read_queries(*{name for page in pages.values() for name, _ in page})
    url = f"{servers.deployment.url}/graphql"

    def ask(query: tuple[str, Mapping[str, Any]]) -> tuple[str, float, int]:
        name, variables = query
        began = time.monotonic()
        body = {"operationName": name, "query": texts[name], "variables": variables}
        answer = requests.post(url, json=body, timeout=600)
        took = time.monotonic() - began
        answer.raise_for_status()
        assert "errors" not in answer.json(), (name, answer.text[:2000])
        assert '"PythonError"' not in answer.text, (name, answer.text[:2000])
        return name, took, len(answer.content)

    rows = []
    for page, queries in pages.items():
        before, times, slowest = servers.cpu_seconds(), [], ("", 0.0, 0)
        with ThreadPoolExecutor(len(queries)) as pool:
            for _ in range(REPEATS):
                began = time.monotonic()
                answers = list(pool.map(ask, queries))
                times.append(time.monotonic() - began)
                slowest = max(answers, key=lambda one: one[1])
        used = {name: seconds / REPEATS for name, seconds in _used(before, servers.cpu_seconds()).items()}
        kib = sum(size for _, _, size in answers) / 1024
        rows.append({"page": page, "s": times, "cpu_s": used, "kib": kib, "slowest": slowest})
        say(
            f"page {page:<30} first {times[0]:6.2f} s, then {median(times[1:]):6.2f} s ({max(times[1:]):.2f} at most), "
            f"webserver CPU {used['webserver']:5.2f} s, {kib:,.0f} KiB; slowest: {slowest[0]} {slowest[1]:.2f} s"
        )
    return rows


def _commands(servers: Servers, releases: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run each command several times."""
    commands = {
        "status of the release that is queued": ["status", "tiny", releases[-1]],
        "status of a release that is done": ["status", "tiny", releases[-2]],
        "status of all releases": ["status", "tiny"],
        "launch --dry-run": ["launch", "tiny", RELEASE, "--dry-run"],
    }
    rows = []
    for name, arguments in commands.items():
        before, times, cpu = servers.cpu_seconds(), [], []
        for _ in range(REPEATS - 2):
            began, used = time.monotonic(), os.times()
            command = [sys.executable, "-m", "census_tf_dagster", *arguments, "--url", servers.deployment.url]
            done = subprocess.run(
                command, cwd=servers.project.folder, env=servers.project.env, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            times.append(time.monotonic() - began)
            cpu.append(sum(os.times()[2:4]) - sum(used[2:4]))
        answered = _used(before, servers.cpu_seconds())["webserver"] / len(times)
        rows.append({"command": name, "s": times, "cpu_s": cpu, "webserver_cpu_s": answered})
        say(
            f"command {name:<37} {median(times):6.2f} s ({min(times):.2f} to {max(times):.2f}), CPU {median(cpu):5.2f} "
            f"s in the command and {answered:5.2f} s in the webserver"
        )
    return rows


if __name__ == "__main__":
    main()
