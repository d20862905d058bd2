"""Starts processes as forks of one that has imported Dagster, TileDB and torch, because importing them takes seconds.

    python -m tests.support.fork_server SOCKET OWNER MODULE...

It imports the MODULEs first. Each process still has an environment, a working folder, pipes and an exit status of its
own. The server ends when the process OWNER ends.
"""

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SERVERS = "CENSUS_TF_TEST_FORK_SERVERS"
"""The variable with the folder of the servers. A process that must start its own, may not inherit it."""
# All processes of a test run, also those that are started by others, share its servers.
if SERVERS not in os.environ:
    os.environ[SERVERS] = f"{tempfile.gettempdir()}/forks-{os.getpid()}-{os.urandom(4).hex()}"
_started: list["subprocess.Popen[bytes]"] = []


@dataclass(frozen=True)
class ForkServer:
    """A server. It starts when it is first needed.

    Attributes
    ----------
    name
        Its name among the servers of a test run.
    preload
        What it imports. None of these may start a thread when it is imported, which a fork would lack.
    python
        The interpreter.
    environment
        Variables that the server has besides those of the process that starts it.
    """

    name: str
    preload: tuple[str, ...]
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)

    def pid(self) -> int:
        """Return the process id of the server, which is the parent of all its processes."""
        with self.connect() as connection:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", peer)[0])

    def connect(self) -> socket.socket:
        place = Path(os.environ[SERVERS])
        place.mkdir(mode=0o700, exist_ok=True)
        address = place / f"{self.name}.socket"
        with (place / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not address.exists():
                self._start(address)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(address))
        return connection

    def _start(self, address: Path) -> None:
        owner = address.parent.name.split("-")[1]
        command = [self.python, "-m", "tests.support.fork_server", str(address), owner, *self.preload]
        # OpenMP reads this when torch is imported; `devices` sets it for its processes.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **self.environment}
        server = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        # Popen warns if it is forgotten while the process runs.
        _started.append(server)
        deadline = time.monotonic() + 120
        while not address.exists():
            assert server.poll() is None, f"the fork server {self.name} ended"
            assert time.monotonic() < deadline, f"the fork server {self.name} did not start"
            time.sleep(0.02)


OF_RUNS = (
    "cellxgene_census",
    "census_tf_dagster.definitions",
    "census_tf_dagster.pipeline.embed_shard",
    "census_tf_dagster.pipeline.finish_array",
    "census_tf_dagster.pipeline.plan_release",
    "tests.support.warm_devices",
)
"""What the run of an asset imports."""
OURS = ForkServer(
    "ours",
    (
        *OF_RUNS,
        "census_tf_dagster.cli",
        "census_tf_dagster.inference.engine",
        "dagster._cli.api",
        "dagster_aws.components",
    ),
)


class ForkedProcess:
    """A running `python -m MODULE ARGUMENTS`. Its methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        stdin: int = -1,
        stdout: int = 1,
        stderr: int = 2,
        new_session: bool = False,
        server: ForkServer = OURS,
    ) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        self._waiting = threading.Lock()
        order = {"command": self.args, "folder": str(folder), "environment": dict(environment)}
        content = json.dumps({**order, "new_session": new_session}).encode()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            self._connection = server.connect()
            socket.send_fds(
                self._connection,
                [struct.pack("!Q", len(content))],
                [nothing if stdin < 0 else stdin, stdout, stderr],
            )
            self._connection.sendall(content)
        finally:
            os.close(nothing)
        self.pid = self._number()

    def _number(self) -> int:
        """Read the process id, or later the exit status."""
        content = self._connection.recv(8, socket.MSG_WAITALL)
        assert len(content) == 8, "the fork server ended"
        return int(struct.unpack("!q", content)[0])

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        # Only one thread may read the status, as only one may reap a child.
        if not self._waiting.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        try:
            if self.returncode is None:
                if not select.select([self._connection], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                self.returncode = self._number()
                self._connection.close()
        finally:
            self._waiting.release()
        return self.returncode

    def send_signal(self, number: int) -> None:
        # A process may have ended before its status arrives here.
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(address: Path, owner: int, preload: Sequence[str]) -> dict[str, Any]:
    """Fork for each order. Return only in the forked processes, with their order."""
    listener = socket.socket(socket.AF_UNIX)
    # Who connects while this process imports, waits.
    unready = address.with_suffix(".new")
    listener.bind(str(unready))
    listener.listen(64)
    unready.rename(address)
    for name in preload:
        # `benchmarks/gpu.sh` runs some of the tests without some of the packages.
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.freeze()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    ended = os.pidfd_open(owner)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, woken, ended):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if ended in ready:
                shutil.rmtree(address.parent, ignore_errors=True)
                os._exit(0)
            if woken in ready:
                os.read(woken, 4096)
                _reap(running)
            if listener in ready:
                connection, _ = listener.accept()
                header, files, _, _ = socket.recv_fds(connection, 8, 3)
                if not header:  # Somebody asked for the process id of the server.
                    connection.close()
                    continue
                (length,) = struct.unpack("!Q", header)
                content = connection.recv(length, socket.MSG_WAITALL)
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                    for file in (*files, woken, wake, ended):
                        os.close(file)
                    for open_socket in (listener, connection, *running.values()):
                        open_socket.close()
                    return dict(json.loads(content))
                for file in files:
                    os.close(file)
                running[pid] = connection
                _tell(connection, pid)


def _reap(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as connection:
            _tell(connection, os.waitstatus_to_exitcode(status))


def _tell(connection: socket.socket, number: int) -> None:
    # Who started the process may have ended.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(struct.pack("!q", number))


def _become(order: dict[str, Any]) -> None:
    if order["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = order["command"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # Python ends so, but then takes apart all that is imported, which takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _become(_serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
