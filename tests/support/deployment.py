"""A real webserver and a real daemon for a project, and an operator who uses them."""

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from census_tf_dagster.config.dagster_names import UPSTREAM_CHECK
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet
from tests.support.fork_server import OURS, ForkedProcess, ForkServer
from tests.support.project import RELEASE, REPOSITORY, Project

POLL = 2.0
"""Seconds between two polls. Each poll takes CPU from the servers that it waits for."""
QUICK = "tests.support.quick_definitions"
"""Definitions whose sensors look every 10 s, and whose runs are forked."""
REAL = "census_tf_dagster.definitions"
MODULES = {"dagster-webserver": "dagster_webserver", "dagster-daemon": "dagster._daemon"}
"""What these commands run."""
CONTROL = ForkServer("control", ("dagster._daemon.cli", "dagster_webserver.cli"))
"""It imports no more, because no server of a deployment loads the data plane."""
PATIENCE = 600.0
"""The longest wait, in seconds, on a busy machine."""


# As the web interface sends them for one partition.
MATERIALIZE = """mutation LaunchPipelineExecution($executionParams: ExecutionParams!) {
  launchPipelineExecution(executionParams: $executionParams) {
    __typename
    ... on Error { message }
    ... on LaunchRunSuccess { run { runId } }
  }
}"""

RUNS = "{ runsOrError(limit: 1000) { ... on Runs { results { assetSelection { path } tags { key value } } } } }"


@dataclass
class Operator:
    """A person at a terminal with a running deployment."""

    project: Project
    port: int
    module: str = QUICK
    servers: dict[str, ForkedProcess] = field(default_factory=dict)
    begun: list[ForkedProcess] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, name: str, *code: str) -> None:
        """Start `dagster-webserver` or `dagster-daemon`, in a process group of its own.

        `code` says where the definitions are; left out: the module, by a code server of its own.
        """
        own = ["-h", "127.0.0.1", "-p", str(self.port)] if name == "dagster-webserver" else ["run"]
        arguments = [*own, *(code or ("-m", self.module))]
        self.servers[name] = self._start(MODULES[name], arguments, f"{name}.log", CONTROL)

    def _start(self, module: str, arguments: list[str], log: str, server: ForkServer = OURS) -> ForkedProcess:
        with (self.project.folder / log).open("a") as file:
            streams = {"stdout": file.fileno(), "stderr": file.fileno()}
            return ForkedProcess(
                module, arguments, self.project.folder, self.project.env, **streams, new_session=True, server=server
            )

    def stop(self, name: str) -> None:
        """End a server with its code server and runs."""
        server = self.servers.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def answers(self) -> bool:
        """Tell whether the webserver answers, and sees the daemon if there is one."""
        assert all(server.poll() is None for server in self.servers.values()), "a server ended"
        query = '{ instance { daemonHealth { daemonStatus(daemonType: "BACKFILL") { healthy } } } }'
        try:
            health = Deployment.at(self.url).ask(query)["instance"]["daemonHealth"]["daemonStatus"]["healthy"]
        except UserError:
            return False
        return bool(health) or "dagster-daemon" not in self.servers

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.project.command(*arguments, "--url", self.url)

    def begin(self, name: str, *arguments: str) -> "BackgroundCommand":
        process = self._start("census_tf_dagster", [*arguments, "--url", self.url], f"{name}.out")
        self.begun.append(process)
        return BackgroundCommand(process, self.project.folder / f"{name}.out")

    def status(self, name: str) -> dict[str, Any]:
        """The JSON of one release."""
        done = self.command("status", name, RELEASE, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        release: dict[str, Any]
        (release,) = json.loads(done.stdout)["releases"]
        return release

    def runs(self) -> Counter[tuple[str, str]]:
        """How often each (asset, partition) ran."""
        results = Deployment.at(self.url).ask(RUNS)["runsOrError"]["results"]
        return Counter(
            ("/".join(asset["path"]), tag["value"])
            for run in results
            for asset in run["assetSelection"] or ()
            for tag in run["tags"]
            if tag["key"] == "dagster/partition"
        )


@dataclass
class BackgroundCommand:
    """A command that runs in the background; its output goes to a file."""

    process: ForkedProcess
    out: Path

    def says(self, text: str) -> None:
        until(lambda: text in self.out.read_text() or self.process.poll() is not None, f"{text!r} in {self.out}")
        assert text in self.out.read_text()

    def end(self) -> tuple[int, str]:
        return self.process.wait(timeout=PATIENCE), self.out.read_text()


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(POLL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(project: Project, *, daemon: bool, module: str = QUICK) -> Iterator[Operator]:
    """Run the real webserver, and the real daemon, until the end of the block."""
    operator = Operator(project, free_port(), module)
    # Servers run in the project's folder.
    project.env["PYTHONPATH"] = str(REPOSITORY)
    try:
        for name in ("dagster-webserver", *(["dagster-daemon"] if daemon else [])):
            operator.serve(name)
        until(operator.answers, f"servers of {project.folder}")
        yield operator
    finally:
        for begun in operator.begun:
            begun.kill()
            begun.wait()
        for name in list(operator.servers):
            operator.stop(name)


@contextmanager
def running_locally(project: Project, *, daemon: bool, module: str = QUICK) -> Iterator[Operator]:
    """Run both; the daemon runs at most two runs at a time, as its own processes."""
    with (project.folder / "dagster_home" / "dagster.yaml").open("a") as file:
        file.write("concurrency:\n  runs:\n    max_concurrent_runs: 2\n")
    with running(project, daemon=daemon, module=module) as operator:
        yield operator


def materialize(deployment: Deployment, of: RemoteSet, shard: int, **own_tags: str) -> str:
    """Launch one shard as a click on Materialize does, with optional tags. Return the run's id."""
    key = of.shard_keys[shard]
    tags = {"dagster/partition": of.partition(RELEASE, shard)}
    tags |= own_tags | {"dagster/partition/release": RELEASE, "dagster/partition/shard": key}
    params = {
        "selector": {
            "repositoryLocationName": of.location,
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [of.key("shard_embeddings")],
            # The interface names the checks that an asset makes of itself, and no others.
            "assetCheckSelection": [{"assetKey": of.key("shard_embeddings"), "name": UPSTREAM_CHECK}],
        },
        "mode": "default",
        "runConfigData": "{}",
        "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
    }
    answer = deployment.ask(MATERIALIZE, executionParams=params)["launchPipelineExecution"]
    return str(expect(answer, "LaunchRunSuccess", "materialize")["run"]["runId"])
